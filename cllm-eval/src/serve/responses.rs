//! Responses of OpenAI's protocol. `usage` says in addition how many forwards the answers took, and
//! a chunk of a stream how many tokens it has and when they were decoded.

use std::time::{SystemTime, UNIX_EPOCH};

use cllm_core::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::answers::{Order, WholeAnswer};
use super::scoring::TokenScore;

/// What all parts of a response begin with.
#[derive(Clone)]
pub(super) struct Head {
    id: String,
    created: u64,
    model: String,
    pub(super) is_chat: bool,
}

/// Numbers of tokens so far.
#[derive(Clone, Copy, Default)]
pub(super) struct Usage {
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    pub(super) cached_tokens: usize,
    pub(super) forwards: usize,
}

pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

impl Head {
    pub(super) fn new(model: &str, is_chat: bool) -> Self {
        let kind = if is_chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{kind}-{:016x}", rand::random::<u64>());
        Head { id, created: unix_seconds(), model: model.to_owned(), is_chat }
    }

    fn object(&self, is_chunk: bool) -> &'static str {
        match (self.is_chat, is_chunk) {
            (true, true) => "chat.completion.chunk",
            (true, false) => "chat.completion",
            (false, _) => "text_completion",
        }
    }

    fn json(&self, is_chunk: bool, choices: Vec<Value>) -> Value {
        let Head { id, created, model, .. } = self;
        json!({ "id": id, "object": self.object(is_chunk), "created": created, "model": model, "choices": choices })
    }

    /// A chunk of a stream with a part of a choice. The first part of a chat names the role.
    pub(super) fn chunk(&self, index: usize, text: &str, is_first: bool, reason: Option<&str>) -> Value {
        let mut choice = match (self.is_chat, is_first, reason) {
            (true, true, _) => json!({ "index": index, "delta": { "role": "assistant", "content": text } }),
            (true, _, Some(_)) if text.is_empty() => json!({ "index": index, "delta": {} }),
            (true, ..) => json!({ "index": index, "delta": { "content": text } }),
            (false, ..) => json!({ "index": index, "text": text }),
        };
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = json!(reason);
        self.json(true, vec![choice])
    }

    /// The log-probabilities of some tokens of a choice, which begin at `offsets` of its text. Of the
    /// first token of a text there is none: there is one score less then.
    pub(super) fn logprobs(
        &self,
        tokenizer: &Tokenizer,
        ids: &[i32],
        offsets: &[usize],
        scores: &[TokenScore],
    ) -> Value {
        match self.is_chat {
            true => chat_logprobs(tokenizer, ids, scores),
            false => completion_logprobs(tokenizer, ids, offsets, scores),
        }
    }

    /// The last chunk of a stream whose client asked for it.
    pub(super) fn usage_chunk(&self, usage: Usage) -> Value {
        with_usage(self.json(true, Vec::new()), usage)
    }

    /// A response as a whole.
    pub(super) fn whole(&self, order: &Order, answers: &[WholeAnswer], echo: bool) -> Value {
        let mut usage =
            Usage { prompt_tokens: order.prompts.iter().map(|prompt| prompt.ids.len()).sum(), ..Usage::default() };
        for answer in answers {
            usage.completion_tokens += answer.ids.len();
            usage.cached_tokens += answer.num_cached;
            usage.forwards += answer.num_forwards;
        }
        let choices = answers.iter().map(|answer| self.whole_choice(order, answer, echo));
        with_usage(self.json(false, choices.collect()), usage)
    }

    fn whole_choice(&self, order: &Order, answer: &WholeAnswer, echo: bool) -> Value {
        let prompt = &order.prompts[answer.prompt];
        let logprobs = answer.scores.as_ref().map(|scores| {
            let ids = if echo { &[&prompt.ids[..], &answer.ids].concat() } else { &answer.ids };
            self.logprobs(&order.model.tokenizer, ids, &answer.offsets, scores)
        });
        let mut choice = match self.is_chat {
            true => json!({ "index": answer.index, "message": { "role": "assistant", "content": answer.text } }),
            false if echo => json!({ "index": answer.index, "text": prompt.text.clone() + &answer.text }),
            false => json!({ "index": answer.index, "text": answer.text }),
        };
        choice["logprobs"] = json!(logprobs);
        choice["finish_reason"] = json!(answer.reason);
        choice
    }
}

fn with_usage(mut response: Value, usage: Usage) -> Value {
    let Usage { prompt_tokens, completion_tokens, cached_tokens, forwards } = usage;
    response["usage"] = json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": { "cached_tokens": cached_tokens },
        "forwards": forwards,
        "tokens_per_forward": (forwards > 0).then(|| completion_tokens as f64 / forwards as f64),
    });
    response
}

fn chat_logprobs(tokenizer: &Tokenizer, ids: &[i32], scores: &[TokenScore]) -> Value {
    let content = ids.iter().zip(scores).map(|(&id, score)| {
        let mut token = chat_token(tokenizer, id, score.logprob);
        let top = score.top.iter().map(|&(id, logprob)| chat_token(tokenizer, id, logprob));
        token["top_logprobs"] = top.collect();
        token
    });
    json!({ "content": content.collect::<Vec<_>>() })
}

fn chat_token(tokenizer: &Tokenizer, id: i32, logprob: f64) -> Value {
    let token = tokenizer.token_text(id);
    json!({ "token": token, "logprob": logprob, "bytes": token.as_bytes() })
}

fn completion_logprobs(tokenizer: &Tokenizer, ids: &[i32], offsets: &[usize], scores: &[TokenScore]) -> Value {
    let scores: Vec<Option<&TokenScore>> =
        std::iter::repeat_n(None, ids.len() - scores.len()).chain(scores.iter().map(Some)).collect();
    let tokens: Vec<String> = ids.iter().map(|&id| tokenizer.token_text(id)).collect();
    let top = ids.iter().zip(&scores).map(|(&id, score)| {
        let score = score.as_ref()?;
        // The token itself is there, too. Of tokens that are written alike, the likeliest counts.
        let all = std::iter::once((id, score.logprob)).chain(score.top.iter().rev().copied());
        let pairs = all.map(|(id, logprob)| (tokenizer.token_text(id), json!(logprob)));
        Some(pairs.collect::<serde_json::Map<_, _>>())
    });
    json!({
        "text_offset": offsets,
        "token_logprobs": scores.iter().map(|score| score.map(|score| score.logprob)).collect::<Vec<_>>(),
        "top_logprobs": top.collect::<Vec<_>>(),
        "tokens": tokens,
    })
}
