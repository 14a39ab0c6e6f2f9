//! Converts GGUF files written by the test itself, and refuses broken ones.

use std::path::Path;

use cllm_core::checkpoint;
use cllm_core::cuda::libtorch;
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::prompt_set::Prompt;
use cllm_core::tokenizer::Tokenizer;
use cllm_testing::fuzz::fuzz;
use cllm_train::gguf::convert;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// The contents of a GGUF file.
#[derive(Clone)]
struct GgufContents {
    /// Key, type code and bytes of each metadata value.
    values: Vec<(String, u32, Vec<u8>)>,
    /// Name, sizes (fastest dimension first), type code and bytes of each tensor.
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl GgufContents {
    fn set(&mut self, key: &str, kind: u32, bytes: Vec<u8>) {
        self.values.retain(|(old, ..)| old != key);
        self.values.push((key.to_owned(), kind, bytes));
    }

    fn text(&mut self, key: &str, text: &str) {
        self.set(key, 8, string(text));
    }

    fn integer(&mut self, key: &str, number: i64) {
        self.set(key, 4, (number as u32).to_le_bytes().to_vec());
    }

    fn texts(&mut self, key: &str, texts: &[String]) {
        let items = texts.iter().flat_map(|text| string(text));
        self.set(key, 9, list_head(8, texts.len()).into_iter().chain(items).collect());
    }

    fn file(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.values.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.values {
            bytes.extend(string(key));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(value);
        }
        let mut data = Vec::new();
        for (name, sizes, kind, content) in &self.tensors {
            bytes.extend(string(name));
            bytes.extend((sizes.len() as u32).to_le_bytes());
            sizes.iter().for_each(|size| bytes.extend(size.to_le_bytes()));
            bytes.extend(kind.to_le_bytes());
            bytes.extend((data.len() as u64).to_le_bytes());
            data.extend(content);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(data);
        bytes
    }
}

fn string(text: &str) -> Vec<u8> {
    (text.len() as u64).to_le_bytes().into_iter().chain(text.bytes()).collect()
}

fn list_head(kind: u32, count: usize) -> Vec<u8> {
    kind.to_le_bytes().into_iter().chain((count as u64).to_le_bytes()).collect()
}

fn config(family: &str, tied: bool) -> ModelConfig {
    ModelConfig::from_json(&json!({
        "model_type": family, "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 100_000.0, "tie_word_embeddings": tied,
    }))
    .unwrap()
}

/// A query or key projection of Llama with its rows in the order of llama.cpp's converter.
fn interleaved(weight: &Tensor, heads: i64) -> Tensor {
    let shape = weight.size();
    weight.view([heads, 2, shape[0] / heads / 2, shape[1]]).transpose(1, 2).reshape(shape)
}

fn stored_name(name: &str) -> String {
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ];
    pairs.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// The GGUF contents of a model, with a tokenizer that is trained into `folder`.
fn contents(model: &Transformer, family: &str, folder: &Path) -> GgufContents {
    let config = model.config();
    let mut contents = GgufContents { values: Vec::new(), tensors: Vec::new() };
    contents.text("general.architecture", family);
    for (key, number) in [
        ("block_count", config.num_layers),
        ("context_length", config.max_positions as i64),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_heads),
        ("attention.head_count_kv", config.num_kv_heads),
    ] {
        contents.integer(&format!("{family}.{key}"), number);
    }
    for (key, number) in [("rope.freq_base", 100_000f32), ("attention.layer_norm_rms_epsilon", 1e-5)] {
        contents.set(&format!("{family}.{key}"), 6, number.to_le_bytes().to_vec());
    }
    for (name, weight) in model.named_parameters() {
        let stored = if family == "llama" && name.contains("q_proj") {
            interleaved(&weight, config.num_heads)
        } else if family == "llama" && name.contains("k_proj") {
            interleaved(&weight, config.num_kv_heads)
        } else {
            weight
        };
        let sizes = stored.size().iter().rev().map(|&size| size as u64).collect();
        let (kind, data) = if name.contains("up_proj") { (8, q8_0(&stored)) } else { (0, bytes(&stored)) };
        contents.tensors.push((stored_name(&name), sizes, kind, data));
    }
    tokenizer(&mut contents, folder);
    contents
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    libtorch::tensor_to_bytes(tensor).unwrap()
}

fn q8_0(tensor: &Tensor) -> Vec<u8> {
    let values: Vec<f32> = tensor.flatten(0, -1).try_into().unwrap();
    let mut out = Vec::new();
    for block in values.chunks(32) {
        // A power of two, which is exact in float16.
        let scale = 2f32.powi(-10);
        out.extend([0x00, 0x14]);
        out.extend(block.iter().map(|value| (value / scale).round().clamp(-127.0, 127.0) as i8 as u8));
    }
    out
}

fn tokenizer(contents: &mut GgufContents, folder: &Path) {
    cllm_testing::train_tokenizer(["Tom has 12 apples and Ann has 7 pears. ".repeat(20)], 300, folder);
    let read = |name: &str| -> Value { serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap() };
    let trained = read("tokenizer.json");
    let vocab = trained["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocab.len()];
    vocab.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize] = token.clone());
    let merges: Vec<String> = trained["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()))
        .collect();
    let kinds = (0..tokens.len()).flat_map(|id| if id < 4 { 3i32 } else { 1 }.to_le_bytes());
    contents.set("tokenizer.ggml.token_type", 9, list_head(5, tokens.len()).into_iter().chain(kinds).collect());
    contents.texts("tokenizer.ggml.tokens", &tokens);
    contents.texts("tokenizer.ggml.merges", &merges);
    contents.text("tokenizer.ggml.model", "gpt2");
    contents.text("tokenizer.ggml.pre", "smollm");
    contents.text("tokenizer.chat_template", read("tokenizer_config.json")["chat_template"].as_str().unwrap());
    contents.integer("tokenizer.ggml.bos_token_id", 1);
    contents.integer("tokenizer.ggml.eos_token_id", 0);
    contents.integer("tokenizer.ggml.eot_token_id", 3);
}

fn assert_converts(family: &str, tied: bool) {
    let dir = tempfile::tempdir().unwrap();
    let model = Transformer::random(config(family, tied), 5, Device::Cpu, Kind::Float);
    // A wrong order would not show in biases and norms with equal elements.
    let _no_grad = tch::no_grad_guard();
    for (index, (_, mut weight)) in model.named_parameters().into_iter().enumerate() {
        if weight.dim() == 1 {
            let ramp = Tensor::arange(weight.size()[0], (Kind::Float, Device::Cpu)) * 0.001 + index as f64 * 0.01;
            weight.copy_(&ramp);
        }
    }
    let gguf = dir.path().join("model.gguf");
    std::fs::write(&gguf, contents(&model, family, dir.path()).file()).unwrap();
    let folder = dir.path().join("model");
    convert(&gguf, &folder).unwrap();

    let read = checkpoint::load(&folder, Device::Cpu, Kind::Float).unwrap();
    let (actual, expected) = (read.config(), model.config());
    assert_eq!(actual.parameter_shapes(), expected.parameter_shapes());
    assert_eq!((actual.rope_theta, actual.rms_norm_eps), (100_000.0, 1e-5));
    assert_eq!((actual.max_positions, &actual.rope_scaling), (expected.max_positions, &expected.rope_scaling));
    for ((name, weight), (_, original)) in read.named_parameters().iter().zip(model.named_parameters()) {
        let rounded = original.to_kind(Kind::BFloat16).to_kind(Kind::Float);
        // Half a step of Q8_0, and rounding to bfloat16.
        let bound = if name.contains("up_proj") { 2f64.powi(-11) + 1e-3 } else { 0.0 };
        let difference = (weight - rounded).abs().max().double_value(&[]);
        assert!(difference <= bound, "{name} differs by {difference}");
    }

    let (trained, tokenizer) = (Tokenizer::load(dir.path()).unwrap(), Tokenizer::load(&folder).unwrap());
    assert_eq!(tokenizer.eos_ids(), [0, 3]);
    for prompt in [Prompt::question("Tom has 12 apples."), Prompt::Text("<|user|> 345 Änn\n\n  pears".to_owned())] {
        assert_eq!(tokenizer.encode_prompt(&prompt).unwrap(), trained.encode_prompt(&prompt).unwrap());
    }
}

#[test]
fn a_llama_file_converts_to_the_model_it_was_made_from() {
    assert_converts("llama", false);
}

#[test]
fn a_qwen2_file_keeps_its_biases_order_and_tied_embedding() {
    assert_converts("qwen2", true);
}

/// The error message for a file that `damage` has changed. Nothing may be left behind.
fn refusal_of_damaged(damage: impl FnOnce(&mut GgufContents)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let model = Transformer::random(config("llama", true), 5, Device::Cpu, Kind::Float);
    let mut contents = contents(&model, "llama", dir.path());
    damage(&mut contents);
    refusal(dir.path(), &contents.file())
}

/// The error message for a file with these bytes.
fn refusal(dir: &Path, bytes: &[u8]) -> String {
    let gguf = dir.join("model.gguf");
    std::fs::write(&gguf, bytes).unwrap();
    let error = convert(&gguf, &dir.join("out")).expect_err("the file is bad");
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(error.to_string().contains("model.gguf"), "{error}");
    assert!(!dir.join("out").exists(), "{error}");
    let hidden = std::fs::read_dir(dir)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'));
    assert_eq!(hidden.count(), 0);
    error.to_string()
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = Transformer::random(config("llama", true), 5, Device::Cpu, Kind::Float);
    let whole = contents(&model, "llama", dir.path()).file();
    for length in [4, 20, 200, 5000, whole.len() / 2, whole.len() - 100] {
        let message = refusal(dir.path(), &whole[..length]);
        assert!(message.contains("cut off"), "{length}: {message}");
    }
    assert!(refusal(dir.path(), b"PK\x03\x04 no such thing").contains("not a GGUF file"));
}

#[test]
fn unsupported_features_are_named() {
    #[track_caller]
    fn assert_refused(damage: impl FnOnce(&mut GgufContents), part: &str) {
        let message = refusal_of_damaged(damage);
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
    assert_refused(|contents| contents.text("general.architecture", "gemma2"), "`gemma2`");
    assert_refused(|contents| contents.tensors[3].2 = 10, "Q2_K");
    assert_refused(|contents| contents.text("tokenizer.ggml.pre", "tekken"), "`tekken`");
    assert_refused(|contents| contents.text("tokenizer.ggml.model", "t5"), "`t5`");
    assert_refused(|contents| contents.text("llama.rope.scaling.type", "longrope"), "`longrope`");
    assert_refused(|contents| contents.integer("llama.rope.dimension_count", 8), "rotates 8 of the 16");
    assert_refused(|contents| contents.integer("llama.expert_count", 4), "mixture of experts");
    assert_refused(|contents| contents.integer("llama.block_count", 2_000_000_000), "2000000000 layers");
    assert_refused(|contents| contents.integer("tokenizer.ggml.eos_token_id", 3000), "eos_token_id` is 3000");
    assert_refused(|contents| contents.text("llama.embedding_length", "many"), "not an integer");
    assert_refused(|contents| drop(contents.tensors.remove(5)), "lacks the tensor");
    assert_refused(|contents| contents.tensors[1].1[0] /= 2, "shape");
    let extra = |contents: &mut GgufContents| {
        contents.tensors.push(("blk.0.ffn_gate_exps.weight".to_owned(), vec![1], 0, vec![0; 4]))
    };
    assert_refused(extra, "`blk.0.ffn_gate_exps.weight` that is not part of any supported model");
}

#[test]
fn a_folder_with_files_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let model = Transformer::random(config("llama", true), 5, Device::Cpu, Kind::Float);
    let gguf = dir.path().join("model.gguf");
    std::fs::write(&gguf, contents(&model, "llama", dir.path()).file()).unwrap();
    let folder = dir.path().join("letters");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("letter.txt"), "dear").unwrap();
    assert!(convert(&gguf, &folder).unwrap_err().to_string().contains("already exists"));
    assert_eq!(std::fs::read(folder.join("letter.txt")).unwrap(), b"dear");
    std::fs::remove_file(folder.join("letter.txt")).unwrap();
    convert(&gguf, &folder).unwrap();
    let error = convert(dir.path(), &dir.path().join("new")).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("is a folder"), "{error}");
}

#[test]
fn fuzz_gguf() {
    let dir = tempfile::tempdir().unwrap();
    let model = Transformer::random(config("llama", true), 5, Device::Cpu, Kind::Float);
    let seed = dir.path().join("seed.gguf");
    std::fs::write(&seed, contents(&model, "llama", dir.path()).file()).unwrap();
    let (gguf, folder) = (dir.path().join("model.gguf"), dir.path().join("out"));
    fuzz("gguf", &[seed], |input| {
        std::fs::write(&gguf, input).unwrap();
        let _ = convert(&gguf, &folder);
        let _ = std::fs::remove_dir_all(&folder);
    });
}
