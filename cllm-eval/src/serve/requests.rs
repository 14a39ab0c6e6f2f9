//! Requests of OpenAI's protocol, checked.

use cllm_core::chat_template::{Conversation, Message};
use cllm_core::decode::Sampling;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::api_error::ApiError;
use super::fields::Fields;

const MAX_CHOICES: usize = 128;
const MAX_STOPS: usize = 32;
const MAX_STOP_BYTES: usize = 1000;
/// The largest numbers of likeliest tokens that OpenAI gives beside a token.
const MAX_TOP_LOGPROBS: u64 = 20;
const MAX_COMPLETION_LOGPROBS: u64 = 5;
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// A request, with everything that both endpoints have in common.
#[derive(Debug)]
pub(super) struct Ask {
    /// `None`: the first model.
    pub(super) model: Option<String>,
    pub(super) prompts: Prompts,
    /// Answers to each prompt.
    pub(super) n: usize,
    pub(super) max_tokens: Option<usize>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    pub(super) seed: Option<u64>,
    pub(super) stops: Vec<String>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    /// The number of likeliest tokens to give beside each token, if log-probabilities are asked for.
    pub(super) top_logprobs: Option<usize>,
    /// Whether an answer begins with its prompt.
    pub(super) echo: bool,
}

#[derive(Debug)]
pub(super) enum Prompts {
    Chat(Box<Conversation>),
    Texts(Vec<PromptText>),
}

impl Prompts {
    pub(super) fn is_chat(&self) -> bool {
        matches!(self, Prompts::Chat(_))
    }
}

/// A prompt as text or as token ids.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub(super) enum PromptText {
    Text(String),
    Ids(Vec<i32>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

impl Ask {
    /// Reads the body of a request to `/v1/chat/completions`.
    ///
    /// # Errors
    /// Names the field that is missing, wrong or not supported.
    pub(super) fn chat(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let messages: Vec<Map<String, Value>> = fields
            .take("messages", "a list of messages, each an object with `role` and `content`")?
            .unwrap_or_default();
        if messages.is_empty() {
            return Err(ApiError::field("messages", "is missing or empty: send at least one message"));
        }
        let messages = messages.into_iter().enumerate().map(|(index, fields)| message(index, fields));
        let conversation = Conversation {
            messages: messages.collect::<Result<_, _>>()?,
            tools: Vec::new(),
            chat_template_kwargs: template_kwargs(&mut fields)?,
        };
        let wants_logprobs = fields.take("logprobs", "true or false")?.unwrap_or(false);
        let top_logprobs = fields.take_within("top_logprobs", 0..=MAX_TOP_LOGPROBS)?;
        if top_logprobs.is_some() && !wants_logprobs {
            return Err(ApiError::field("top_logprobs", "needs `logprobs` to be true"));
        }
        let top_logprobs = wants_logprobs.then_some(top_logprobs.unwrap_or(0) as usize);
        let max_tokens = fields.take_within("max_completion_tokens", 1..=u32::MAX)?;
        let ask = Ask::common(&mut fields, Prompts::Chat(Box::new(conversation)), 1)?;
        let max_tokens = max_tokens.map(|number| number as usize).or(ask.max_tokens);
        fields.refuse_rest()?;
        Ok(Ask { top_logprobs, max_tokens, ..ask })
    }

    /// Reads the body of a request to `/v1/completions`.
    ///
    /// # Errors
    /// As [`Ask::chat`].
    pub(super) fn completion(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let expected = "a text, a list of texts, a list of token ids, or a list of such lists";
        let prompt: Option<Value> = fields.take("prompt", expected)?;
        let prompts = prompts(prompt.ok_or_else(|| ApiError::field("prompt", "is missing"))?);
        let prompts = prompts.ok_or_else(|| ApiError::field("prompt", format!("expected {expected}")))?;
        if prompts.is_empty() || prompts.len() > MAX_CHOICES {
            return Err(ApiError::field(
                "prompt",
                format!("expected 1 to {MAX_CHOICES} prompts, found {}", prompts.len()),
            ));
        }
        let top_logprobs = fields.take_within("logprobs", 0..=MAX_COMPLETION_LOGPROBS)?.map(|number| number as usize);
        let echo = fields.take("echo", "true or false")?.unwrap_or(false);
        let ask = Ask::common(&mut fields, Prompts::Texts(prompts), 0)?;
        if ask.max_tokens == Some(0) && !echo {
            return Err(ApiError::field("max_tokens", "0 asks for nothing without `echo`"));
        }
        fields.refuse_rest()?;
        Ok(Ask { top_logprobs, echo, ..ask })
    }

    fn common(fields: &mut Fields, prompts: Prompts, min_tokens: u32) -> Result<Self, ApiError> {
        let stream_options = fields.take("stream_options", "an object with `include_usage`")?;
        let stream = fields.take("stream", "true or false")?.unwrap_or(false);
        if stream_options.is_some() && !stream {
            return Err(ApiError::field("stream_options", "needs `stream` to be true"));
        }
        Ok(Ask {
            model: fields.take("model", "the id of a model")?,
            prompts,
            n: fields.take_within("n", 1..=MAX_CHOICES)?.unwrap_or(1),
            max_tokens: fields.take_within("max_tokens", min_tokens..=u32::MAX)?.map(|number| number as usize),
            temperature: fields.take_within("temperature", 0.0..=2.0)?,
            top_p: fields.take_within("top_p", 0.0..=1.0)?,
            seed: fields.take::<i64>("seed", "a whole number")?.map(i64::cast_unsigned),
            stops: stops(fields)?,
            stream,
            include_usage: stream_options.is_some_and(|options: StreamOptions| options.include_usage),
            top_logprobs: None,
            echo: false,
        })
    }

    /// How tokens are sampled; `default_temperature` is that of the server.
    pub(super) fn sampling(&self, default_temperature: f64) -> Sampling {
        Sampling::from_temperature(self.temperature.unwrap_or(default_temperature))
            .with_top_p(self.top_p.unwrap_or(1.0))
    }
}

fn stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let stops = match fields.take("stop", "a text, or a list of texts")? {
        None => Vec::new(),
        Some(OneOrMany::One(stop)) => vec![stop],
        Some(OneOrMany::Many(stops)) => stops,
    };
    if stops.len() > MAX_STOPS || stops.iter().any(|stop: &String| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
        let message = format!("expected at most {MAX_STOPS} texts of 1 to {MAX_STOP_BYTES} bytes");
        return Err(ApiError::field("stop", message));
    }
    Ok(stops)
}

fn prompts(value: Value) -> Option<Vec<PromptText>> {
    // An empty list of ids is an empty prompt, which is refused later with a better message.
    match serde_json::from_value::<PromptText>(value.clone()) {
        Ok(prompt) => Some(vec![prompt]),
        Err(_) => serde_json::from_value(value).ok(),
    }
}

fn template_kwargs(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let name = "chat_template_kwargs";
    let kwargs: Map<String, Value> =
        fields.take(name, "an object with variables of the chat template")?.unwrap_or_default();
    match ["messages", "add_generation_prompt", "tools"].into_iter().find(|&key| kwargs.contains_key(key)) {
        Some(key) => Err(ApiError::field(format!("{name}.{key}"), "comes from the request itself: leave it out")),
        None => Ok(kwargs),
    }
}

/// Reads a message. Its content is a text, or a list of parts that are texts.
fn message(index: usize, mut fields: Map<String, Value>) -> Result<Message, ApiError> {
    let param = |key: &str| format!("messages[{index}].{key}");
    fields.retain(|_, value| !value.is_null());
    let role = match fields.shift_remove("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role,
        _ => return Err(ApiError::field(param("role"), format!("expected one of {}", ROLES.join(", ")))),
    };
    let content = match fields.shift_remove("content") {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => parts.iter().map(text_of_part).collect(),
        _ => None,
    };
    let content = content.ok_or_else(|| {
        ApiError::field(
            param("content"),
            "expected a text, or a list of parts of type `text`; other media are not supported",
        )
    })?;
    let name = fields.shift_remove("name");
    if let Some(key) = fields.keys().next() {
        return Err(ApiError::field(param(key), "is not supported: leave it out").with_code("unsupported_parameter"));
    }
    let mut message = Message::new(role, content);
    message.other.extend(name.map(|name| ("name".to_owned(), name)));
    Ok(message)
}

fn text_of_part(part: &Value) -> Option<&str> {
    if part["type"] == "text" { part["text"].as_str() } else { None }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chat(fields: Value) -> Result<Ask, ApiError> {
        let mut body = json!({ "messages": [{ "role": "user", "content": "hi" }] });
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        Ask::chat(body.to_string().as_bytes())
    }

    fn completion(fields: Value) -> Result<Ask, ApiError> {
        Ask::completion(fields.to_string().as_bytes())
    }

    #[test]
    fn prompts_are_texts_or_ids_alone_or_in_lists() {
        let of = |prompt: Value| match completion(json!({ "prompt": prompt })).unwrap().prompts {
            Prompts::Texts(prompts) => prompts,
            Prompts::Chat(_) => panic!("a chat"),
        };
        let text = |text: &str| PromptText::Text(text.to_owned());
        assert_eq!(of(json!("a")), [text("a")]);
        assert_eq!(of(json!(["a", "b"])), [text("a"), text("b")]);
        assert_eq!(of(json!([1, 2])), [PromptText::Ids(vec![1, 2])]);
        assert_eq!(of(json!([[1], [2, 3]])), [PromptText::Ids(vec![1]), PromptText::Ids(vec![2, 3])]);
        for wrong in [json!(3), json!([1.5]), json!({}), json!([true]), json!([[[1]]])] {
            let error = completion(json!({ "prompt": wrong })).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("prompt"), "{wrong}");
        }
    }

    #[test]
    fn content_in_parts_is_joined_and_other_keys_of_messages_are_refused() {
        let parts = json!([{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }]);
        let ask = chat(json!({ "messages": [{ "role": "user", "content": parts, "name": "me", "refusal": null }] }));
        let Prompts::Chat(conversation) = ask.unwrap().prompts else { panic!("no chat") };
        assert_eq!((conversation.messages[0].content.as_str(), conversation.messages[0].other.len()), ("ab", 1));
        for (message, param) in [
            (json!({ "role": "robot", "content": "" }), "messages[0].role"),
            (json!({ "role": "user" }), "messages[0].content"),
            (json!({ "role": "user", "content": [{ "type": "image_url" }] }), "messages[0].content"),
            (json!({ "role": "assistant", "content": "", "tool_calls": [1] }), "messages[0].tool_calls"),
        ] {
            assert_eq!(chat(json!({ "messages": [message] })).unwrap_err().param.as_deref(), Some(param));
        }
    }

    #[test]
    fn what_is_not_supported_is_refused_and_what_changes_nothing_is_not() {
        for (fields, param) in [
            (json!({ "top_p": 1.1 }), "top_p"),
            (json!({ "top_logprobs": 2 }), "top_logprobs"),
            (json!({ "stream_options": {} }), "stream_options"),
            (json!({ "stream": true, "stream_options": { "x": 1 } }), "stream_options"),
            (json!({ "chat_template_kwargs": { "messages": 1 } }), "chat_template_kwargs.messages"),
            (json!({ "tools": [1] }), "tools"),
            (json!({ "max_tokens": 0 }), "max_tokens"),
            (json!({ "n": 0 }), "n"),
            (json!({ "stop": ["", "a"] }), "stop"),
            (json!({ "temperature": -1 }), "temperature"),
            (json!({ "prompt": "a" }), "prompt"),
        ] {
            assert_eq!(chat(fields.clone()).unwrap_err().param.as_deref(), Some(param), "{fields}");
        }
        let ask = chat(json!({ "top_p": 0.95, "temperature": 0, "max_completion_tokens": 7, "seed": -1 })).unwrap();
        assert_eq!((ask.max_tokens, ask.seed), (Some(7), Some(u64::MAX)));
        let sampling = |fields, default| chat(fields).unwrap().sampling(default);
        assert_eq!(sampling(json!({ "temperature": 0, "top_p": 0.9 }), 1.0), Sampling::Greedy);
        assert_eq!(sampling(json!({ "temperature": 1e-9 }), 1.0), Sampling::Greedy);
        assert_eq!(sampling(json!({ "top_p": 0.9 }), 0.0), Sampling::Greedy);
        assert_eq!(sampling(json!({ "top_p": 1 }), 0.5), Sampling::Temperature(0.5));
        let nucleus = Sampling::Nucleus { temperature: 0.5, top_p: 0.9 };
        assert_eq!(sampling(json!({ "top_p": 0.9 }), 0.5), nucleus);
        assert!(completion(json!({ "prompt": "a", "max_tokens": 0 })).is_err());
        assert_eq!(completion(json!({ "prompt": "a", "max_tokens": 0, "echo": true })).unwrap().max_tokens, Some(0));
    }
}
