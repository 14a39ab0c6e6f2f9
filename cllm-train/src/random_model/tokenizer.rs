//! A byte-level BPE tokenizer of the size of the published one. Nobody trained it: letters join into
//! pairs, threes and fours, the frequent letters of English first. A text has one and a half times as
//! many tokens as with the published tokenizer.

use std::path::Path;

use cllm_core::model::ModelShape;
use cllm_core::{Error, Result, atomic_file};
use serde_json::{Map, Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::word_split::{WordSplit, byte_level_step};

/// How byte-level tokenizers write a blank.
const BLANK: char = 'Ġ';
const LETTERS: &str = "etaoinshrdlcumwfgypbvkjxqz";
/// Number of words of three letters. With these, words of English have 30 % fewer tokens than without.
const NUM_TRIPLES: usize = 8000;

const CHATML: &str = "{% for message in messages %}\
{% if loop.first and message.role != 'system' %}SYSTEM{% endif %}\
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
const LLAMA3: &str = "{{ bos_token }}{% for message in messages %}\
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
/// Llama 2 and Mistral: a system message stands at the beginning of the first question.
const INST: &str = "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}\
{% if message.role == 'system' %}{% set ns.system = '<<SYS>>\n' + message.content + '\n<</SYS>>\n\n' %}\
{% elif message.role == 'user' %}{{ '[INST] ' + ns.system + message.content + ' [/INST]' }}{% set ns.system = '' %}\
{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}";

/// What the files of a published tokenizer say, as far as the programs read it.
struct Layout {
    /// Number of ids.
    vocab_size: usize,
    /// The special tokens that prompts and answers have, with their ids.
    special: Vec<(usize, &'static str)>,
    /// Tokens that are matched like special ones and belong to the text.
    added: Vec<(usize, &'static str)>,
    chat_template: String,
    /// How text is split into words, as llama.cpp calls it.
    word_split: &'static str,
    /// The token before every text.
    bos: Option<&'static str>,
    eos: &'static str,
    /// Ids in generation_config.json.
    eos_ids: Vec<usize>,
}

impl Layout {
    fn of(shape: ModelShape) -> Self {
        match shape {
            ModelShape::Qwen3_0_6B | ModelShape::Qwen3_1_7B | ModelShape::Qwen3_4B | ModelShape::Qwen3_8B => {
                Layout::qwen3(151_669, 151_643, [151_667, 151_668])
            }
            ModelShape::Qwen3Tiny => Layout::qwen3(512, 400, [403, 404]),
            ModelShape::Qwen2_5_0_5B | ModelShape::Qwen2_5_1_5B | ModelShape::Qwen2_5_3B | ModelShape::Qwen2_5_7B => {
                Layout::chatml(151_665, 151_643, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
            }
            ModelShape::SmolLm2_135M | ModelShape::SmolLm2_1_7B => {
                let system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
                Layout { eos_ids: vec![2], word_split: "smollm", ..Layout::chatml(49_152, 0, system) }
            }
            ModelShape::Llama3_2_1B | ModelShape::Llama3_2_3B | ModelShape::Llama3_1_8B => Layout::llama3(),
            ModelShape::Mistral7B => Layout::inst(32_768, &[(3, "[INST]"), (4, "[/INST]")]),
            ModelShape::Llama2_7B => Layout::inst(32_000, &[]),
        }
    }

    /// `first_id` is the id of `<|endoftext|>`, which the marks of turns follow.
    fn chatml(vocab_size: usize, first_id: usize, system: &str) -> Self {
        let system = format!("{{{{ '<|im_start|>system\\n{system}<|im_end|>\\n' }}}}");
        Layout {
            vocab_size,
            special: (first_id..).zip(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]).collect(),
            added: Vec::new(),
            chat_template: CHATML.replace("SYSTEM", &system),
            word_split: "qwen2",
            bos: None,
            eos: "<|im_end|>",
            eos_ids: vec![first_id + 2, first_id],
        }
    }

    fn qwen3(vocab_size: usize, first_id: usize, [think, think_end]: [usize; 2]) -> Self {
        let no_thought = "{% if enable_thinking is defined and not enable_thinking %}\
                          {{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}";
        let template = CHATML.replace("SYSTEM", "");
        Layout {
            added: vec![(think, "<think>"), (think_end, "</think>")],
            chat_template: template.trim_end_matches("{% endif %}").to_owned() + no_thought,
            ..Layout::chatml(vocab_size, first_id, "")
        }
    }

    fn llama3() -> Self {
        let special = [
            (128_000, "<|begin_of_text|>"),
            (128_001, "<|end_of_text|>"),
            (128_006, "<|start_header_id|>"),
            (128_007, "<|end_header_id|>"),
            (128_008, "<|eom_id|>"),
            (128_009, "<|eot_id|>"),
        ];
        Layout {
            vocab_size: 128_256,
            special: special.into(),
            added: Vec::new(),
            chat_template: LLAMA3.to_owned(),
            word_split: "llama-bpe",
            bos: Some("<|begin_of_text|>"),
            eos: "<|eot_id|>",
            eos_ids: vec![128_001, 128_008, 128_009],
        }
    }

    fn inst(vocab_size: usize, marks: &[(usize, &'static str)]) -> Self {
        Layout {
            vocab_size,
            special: [&[(0, "<unk>"), (1, "<s>"), (2, "</s>")], marks].concat(),
            added: Vec::new(),
            chat_template: INST.to_owned(),
            word_split: "gpt-2",
            bos: Some("<s>"),
            eos: "</s>",
            eos_ids: vec![2],
        }
    }
}

/// Writes tokenizer.json, tokenizer_config.json and generation_config.json into a folder.
///
/// # Errors
/// File-system errors.
pub(super) fn write(shape: ModelShape, folder: &Path) -> Result<()> {
    let layout = Layout::of(shape);
    atomic_file::write(&folder.join("tokenizer.json"), tokenizer_json(&layout)?.to_string().as_bytes())?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": layout.bos,
        "eos_token": layout.eos,
        "pad_token": layout.eos,
        "chat_template": layout.chat_template,
        "clean_up_tokenization_spaces": false,
        "model_max_length": shape.json()["max_position_embeddings"],
    });
    atomic_file::write_json(&folder.join("tokenizer_config.json"), &config)?;
    atomic_file::write_json(&folder.join("generation_config.json"), &json!({ "eos_token_id": layout.eos_ids }))
}

fn tokenizer_json(layout: &Layout) -> Result<Value> {
    let WordSplit { normalizer, pre_tokenizer, is_llama3 } =
        WordSplit::from_rule(layout.word_split).map_err(Error::internal)?;
    let bos = layout.bos.map(|bos| {
        let id = layout.special.iter().find(|(_, token)| *token == bos).map(|(id, _)| id);
        json!({
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": bos, "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { bos: { "id": bos, "ids": [id], "tokens": [bos] } },
        })
    });
    let (vocab, merges) = vocabulary(layout);
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added_tokens(layout),
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": bos,
        "decoder": byte_level_step(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": is_llama3,
            "vocab": vocab, "merges": merges,
        },
    }))
}

fn added_tokens(layout: &Layout) -> Vec<Value> {
    let special = layout.special.iter().map(|token| (token, true));
    let all = special.chain(layout.added.iter().map(|token| (token, false)));
    all.map(|((id, content), is_special)| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": is_special,
        })
    })
    .collect()
}

/// The ids that are not taken by special tokens are bytes, then merged letters. Special tokens are in
/// the vocabulary too: elsewhere, their ids could not have others behind them.
fn vocabulary(layout: &Layout) -> (Map<String, Value>, Vec<[String; 2]>) {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let special = || layout.special.iter().chain(&layout.added);
    let mut ids = (0..layout.vocab_size).filter(|id| special().all(|(taken, _)| taken != id));
    let mut vocab: Map<String, Value> = special().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    vocab.extend(alphabet.into_iter().map(String::from).zip(ids.by_ref().map(Value::from)));
    let merges = merges(ids.clone().count());
    vocab.extend(merges.iter().map(|merge| merge.concat()).zip(ids.map(Value::from)));
    (vocab, merges)
}

/// The first `count` merges: two letters, a pair and a letter, two pairs. Only the first letter may be
/// a blank.
fn merges(count: usize) -> Vec<[String; 2]> {
    let letters: Vec<String> = LETTERS.chars().map(String::from).collect();
    let first_letters = [&[BLANK.to_string()], &letters[..]].concat();
    let words = |merges: &[[String; 2]]| merges.iter().map(|merge| merge.concat()).collect::<Vec<_>>();
    let pairs: Vec<_> = combine(&first_letters, &letters).collect();
    let inner_pairs = words(&combine(&letters, &letters).collect::<Vec<_>>());
    let triples: Vec<_> = combine(&words(&pairs), &letters).take(NUM_TRIPLES).collect();
    let fours: Vec<_> = combine(&words(&pairs), &inner_pairs).take(count).collect();
    pairs.into_iter().chain(triples).chain(fours).take(count).collect()
}

/// All pairs of a first and a second part, those with the smallest sum of positions first.
fn combine(first: &[String], second: &[String]) -> impl Iterator<Item = [String; 2]> {
    let diagonals = 0..(first.len() + second.len()).saturating_sub(1);
    diagonals.flat_map(move |sum| {
        let on_diagonal = (sum + 1).saturating_sub(second.len())..first.len().min(sum + 1);
        on_diagonal.map(move |index| [first[index].clone(), second[sum - index].clone()])
    })
}

#[cfg(test)]
mod tests {
    use cllm_core::prompt_set::Prompt;
    use cllm_core::tokenizer::Tokenizer;

    use super::*;

    const SHAPES: [ModelShape; 7] = [
        ModelShape::Qwen3_8B,
        ModelShape::Qwen3Tiny,
        ModelShape::Qwen2_5_7B,
        ModelShape::Llama3_1_8B,
        ModelShape::Mistral7B,
        ModelShape::SmolLm2_135M,
        ModelShape::Llama2_7B,
    ];

    /// Writes the tokenizer of a shape with its config.json.
    fn tokenizer(shape: ModelShape) -> Tokenizer {
        let dir = tempfile::tempdir().unwrap();
        write(shape, dir.path()).unwrap();
        std::fs::write(dir.path().join("config.json"), shape.json().to_string()).unwrap();
        Tokenizer::load(dir.path()).unwrap()
    }

    #[test]
    fn every_family_has_its_size_its_ids_and_turns_that_end() {
        for shape in SHAPES {
            let (layout, tokenizer) = (Layout::of(shape), tokenizer(shape));
            assert_eq!(tokenizer.vocab_size(), layout.vocab_size, "{shape}");
            for (id, token) in layout.special.iter().chain(&layout.added) {
                assert_eq!(tokenizer.token_id(token), Some(*id as i32), "{shape}: {token}");
            }
            let text = "A café has 12 tables, and then\n  some.";
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), text, "{shape}");
            assert!(ids.len() < text.len(), "{shape}: letters are merged");
            let (prompt, prompt_ids) = tokenizer.encode_prompt(&Prompt::question("Why?")).unwrap();
            assert!(prompt.contains("Why?") && prompt_ids.len() < prompt.len(), "{shape}: {prompt}");
            let end = *tokenizer.encode_target("So.").unwrap().last().unwrap();
            assert_eq!(Some(end), tokenizer.token_id(layout.eos), "{shape}");
            let published = shape.json()["eos_token_id"].clone();
            let published = published.as_array().cloned().unwrap_or_else(|| vec![published]);
            for id in published {
                assert!(tokenizer.eos_ids().contains(&(id.as_i64().unwrap() as i32)), "{shape}: {id}");
            }
        }
    }

    #[test]
    fn prompts_are_in_the_style_of_the_family() {
        let prompt = |shape: ModelShape| tokenizer(shape).encode_prompt(&Prompt::question("Why?")).unwrap();
        let (text, ids) = prompt(ModelShape::Qwen3_8B);
        assert_eq!(text, "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!((ids[0], ids.iter().filter(|&&id| id == 151_645).count()), (151_644, 1));
        let (text, _) = prompt(ModelShape::SmolLm2_135M);
        assert!(text.starts_with("<|im_start|>system\nYou are a helpful AI assistant named SmolLM"), "{text}");
        let (text, ids) = prompt(ModelShape::Llama3_1_8B);
        assert_eq!(text.matches("<|begin_of_text|>").count(), 1, "{text}");
        assert_eq!((ids[0], ids[1]), (128_000, 128_006));
        assert_eq!(prompt(ModelShape::Mistral7B).0, "<s>[INST] Why? [/INST]");
    }
}
