//! Trains a small tokenizer for a model with random weights: byte-level BPE with one token per
//! digit, and a chat template.

use std::path::Path;

use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, DecoderWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerBuilder};

use cllm_core::{Error, Result, atomic_file, interrupt};

/// Tokens of the chat template. `<|end|>` ends every turn and is the EOS token.
const TURN_TOKENS: [&str; 4] = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"];
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";

/// Trains a tokenizer of at most `vocab_size` ids on `texts` and writes its files into `folder`.
///
/// # Errors
/// [`Error::Usage`] if `vocab_size` is too small for the 256 bytes and the turn tokens; file-system
/// errors.
pub fn train(texts: &[String], vocab_size: usize, folder: &Path) -> Result<()> {
    let min_vocab_size = 256 + TURN_TOKENS.len();
    if vocab_size < min_vocab_size {
        return Err(Error::usage(format!(
            "vocab_size={vocab_size} is too small: at least {min_vocab_size} ids are needed"
        )));
    }
    let failed = |error: tokenizers::Error| Error::usage(format!("the tokenizer cannot be trained: {error}"));
    let byte_level = ByteLevel::default().add_prefix_space(false);
    let pre_tokenizers: Vec<PreTokenizerWrapper> = vec![Digits::new(true).into(), byte_level.into()];
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(Some(NFC))
        .with_pre_tokenizer(Some(Sequence::new(pre_tokenizers)))
        .with_post_processor(Some(PostProcessorWrapper::from(byte_level)))
        .with_decoder(Some(DecoderWrapper::from(byte_level)))
        .build()
        .map_err(failed)?;
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocab_size)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(TURN_TOKENS.iter().map(|&token| AddedToken::from(token, true)).collect())
        .build();
    // Counting the words of many texts takes long, so a signal can end it.
    let texts = texts.iter().map(String::as_str).take_while(|_| interrupt::requested().is_none());
    tokenizer.train(&mut trainer, texts).map_err(failed)?;
    interrupt::check()?;
    let text = tokenizer.to_string(true).map_err(failed)?;
    atomic_file::write(&folder.join("tokenizer.json"), text.as_bytes())?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_TOKENS[0],
        "pad_token": TURN_TOKENS[0],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": false,
    });
    atomic_file::write_json(&folder.join("tokenizer_config.json"), &config)?;
    atomic_file::write_json(&folder.join("generation_config.json"), &json!({ "eos_token_id": 0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_and_turns_are_single_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let texts = vec!["Tom has 12 apples. Tom has 12 apples.".to_owned(); 50];
        train(&texts, 300, dir.path()).unwrap();
        let tokenizer = tokenizers::Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
        let encoding = tokenizer.encode("<|user|>Tom has 12 apples.<|end|>", false).unwrap();
        let tokens = encoding.get_tokens();
        assert_eq!((tokens[0].as_str(), tokens[tokens.len() - 1].as_str()), ("<|user|>", "<|end|>"));
        assert!(tokens.iter().any(|token| token == "1") && tokens.iter().any(|token| token == "2"));
        assert!(tokens.len() < 10, "words are merged: {tokens:?}");
        assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), "Tom has 12 apples.");
    }
}
