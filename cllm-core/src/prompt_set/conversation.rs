//! Messages as people have them (OpenAI's, ShareGPT's, content in parts), and the turns of a
//! conversation that can be answered.

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};

use super::dataset_file::{RowError, parse_json_text, type_name};
use crate::chat_template::Message;
use crate::thought_text::with_thought;

/// The roles that templates know, each with its other names in lower case.
const ROLES: [(&str, &[&str]); 6] = [
    ("system", &[]),
    ("developer", &[]),
    ("user", &["human"]),
    ("assistant", &["gpt", "chatgpt", "model", "bot"]),
    ("tool", &["function", "observation", "function_response"]),
    ("ipython", &[]),
];
/// Keys of calls that an assistant's message makes.
const CALLS: [&str; 2] = ["tool_calls", "function_call"];
const REASONING: &str = "reasoning_content";

/// The turns of a conversation that are prompts to answer, or that supervised fine-tuning teaches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Turns {
    /// Every turn of the assistant, each as an answer to the conversation before it.
    All,
    /// The last one, which is the reference.
    #[default]
    Last,
}

/// What a conversation is divided into.
pub(super) struct Split {
    /// Never empty.
    pub(super) turns: Vec<Turn>,
    /// Number of turns that call a tool, which no text can hold.
    pub(super) num_calling: usize,
}

/// A turn to answer: the messages before it, and its text if the data have it.
#[derive(Debug, PartialEq)]
pub(super) struct Turn {
    pub(super) messages: Vec<Message>,
    pub(super) reference: Option<String>,
    /// Keys of the turn's own message that a text cannot hold.
    pub(super) lost_keys: Vec<String>,
}

/// Whether a value is a list of messages, rather than text in parts.
pub(super) fn is_messages(value: &Value) -> bool {
    let first = value.as_array().and_then(|list| list.first());
    first.is_some_and(|message| ["role", "from"].iter().any(|key| message.get(key).is_some()))
}

/// Parses a list of messages, or JSON text that holds one.
pub(super) fn parse_messages(value: Value) -> Result<Vec<Message>, RowError> {
    let Value::Array(messages) = parse_json_text(value, "messages")? else {
        return Err(RowError::new("has messages that are no list", ""));
    };
    messages.into_iter().enumerate().map(|(index, message)| parse_message(index + 1, message)).collect()
}

fn parse_message(number: usize, message: Value) -> Result<Message, RowError> {
    let Value::Object(mut message) = message else {
        let found = type_name(&message);
        return Err(RowError::new("has a message that is no object", format!("message {number} is {found}")));
    };
    message.retain(|_, value| !value.is_null());
    let role = message.shift_remove("role").or_else(|| message.shift_remove("from"));
    let role = match &role {
        Some(Value::String(name)) => known_role(name).ok_or_else(|| unknown_role(number, &format!("`{name}`")))?,
        Some(other) => return Err(unknown_role(number, type_name(other))),
        None => return Err(RowError::new("has a message without a role", format!("message {number}"))),
    };
    let content = message.shift_remove("content").or_else(|| message.shift_remove("value"));
    let content = match content {
        Some(content) => text_of(content).map_err(|found| {
            RowError::new("has a message that is not text", format!("message {number} has {found}"))
        })?,
        None if let Some(key) = calls_key(&message) => {
            let detail = format!("message {number} has `{key}`: give it an empty text to keep it");
            return Err(RowError::new("has a message with tool calls and no text", detail));
        }
        None => return Err(RowError::new("has a message without text", format!("message {number}"))),
    };
    Ok(Message { role: role.to_owned(), content, other: message })
}

fn known_role(name: &str) -> Option<&'static str> {
    let name = name.trim().to_lowercase();
    ROLES.into_iter().find(|(role, aliases)| *role == name || aliases.contains(&name.as_str())).map(|(role, _)| role)
}

fn unknown_role(number: usize, found: &str) -> RowError {
    let known = ROLES.map(|(role, _)| role).join(", ");
    let advice = match found {
        "`function_call`" => "write it as the assistant's, with an empty text and `tool_calls`".to_owned(),
        _ => format!("rename it to one of {known}"),
    };
    let detail = format!("message {number} is from {found}: {advice}");
    RowError::new("has a message of an unknown role", detail)
}

/// The key with the calls that a message makes, if it makes any.
fn calls_key(other: &Map<String, Value>) -> Option<&'static str> {
    let is_empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty) || value == "";
    CALLS.into_iter().find(|key| other.get(*key).is_some_and(|calls| !is_empty(calls)))
}

/// The text of a value: text itself, a number, a boolean, or a list of text parts, which are
/// joined. Otherwise says what was found. A list of texts is none: they may be alternatives.
pub(super) fn text_of(value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(match text.strip_prefix('\u{feff}') {
            Some(text) => text.to_owned(),
            None => text,
        }),
        Value::Number(number) => Ok(number_text(&number)),
        Value::Bool(_) => Ok(value.to_string()),
        Value::Array(parts) if !parts.is_empty() => parts.into_iter().map(text_of_part).collect(),
        Value::Null | Value::Array(_) | Value::Object(_) => Err(type_name(&value).to_owned()),
    }
}

/// A number as text. Whole numbers have no fraction: programs write them as floats where another
/// row has none, as pandas does.
fn number_text(number: &Number) -> String {
    match number.to_string().strip_suffix(".0") {
        Some(whole) if number.is_f64() => whole.to_owned(),
        _ => number.to_string(),
    }
}

fn text_of_part(part: Value) -> Result<String, String> {
    match part {
        Value::Object(mut part) => match (part.get("type").and_then(Value::as_str), part.get("text")) {
            (None | Some("text" | "input_text" | "output_text"), Some(Value::String(_))) => {
                part.remove("text").map_or(Err("null".to_owned()), text_of)
            }
            (Some(kind), _) => Err(format!("a part of type `{kind}`")),
            (None, _) => Err("a part without text".to_owned()),
        },
        other => Err(format!("a list that holds {}", type_name(&other))),
    }
}

/// Divides a conversation into the turns to answer. One that does not end with the assistant's
/// turn is to be answered as a whole, and has no reference of its own.
pub(super) fn split_turns(messages: Vec<Message>, turns: Turns) -> Result<Split, RowError> {
    if messages.iter().all(is_system) {
        return Err(RowError::new("has no messages to answer", ""));
    }
    if messages.windows(2).any(|pair| pair.iter().all(is_assistant)) {
        return Err(RowError::new("has two turns of the assistant in a row", ""));
    }
    let last = messages.len() - 1;
    let is_wanted = |index: &usize| turns == Turns::All || *index == last;
    let (mut found, mut num_calling) = (Vec::new(), 0);
    for index in (0..messages.len()).filter(is_wanted).filter(|&index| answers_something(&messages, index)) {
        if calls_key(&messages[index].other).is_some() {
            num_calling += 1;
        } else {
            found.push(turn(&messages[..index], &messages[index]));
        }
    }
    if !is_assistant(&messages[last]) {
        found.push(Turn { messages, reference: None, lost_keys: Vec::new() });
    }
    match (found.is_empty(), num_calling) {
        (false, _) => Ok(Split { turns: found, num_calling }),
        (true, 0) => Err(RowError::new("has nothing before the assistant's turn", "")),
        (true, _) => Err(RowError::new("has no turn to answer that calls no tool", "a reference is text alone")),
    }
}

/// Whether the message at `index` is a turn of the assistant that answers another message. A
/// greeting is none.
pub fn answers_something(messages: &[Message], index: usize) -> bool {
    let is_turn_of_others = |message: &Message| !is_system(message) && !is_assistant(message);
    is_assistant(&messages[index]) && messages[..index].iter().any(is_turn_of_others)
}

fn turn(before: &[Message], answer: &Message) -> Turn {
    let text = match answer.other.get(REASONING).and_then(Value::as_str) {
        Some(thought) if !thought.trim().is_empty() => with_thought(thought, &answer.content),
        _ => answer.content.clone(),
    };
    let lost_keys = answer.other.keys().filter(|key| !CALLS.contains(&key.as_str()) && *key != REASONING);
    Turn { messages: before.to_vec(), reference: Some(text), lost_keys: lost_keys.cloned().collect() }
}

fn is_assistant(message: &Message) -> bool {
    message.role == "assistant"
}

/// Whether a message instructs the model, rather than being a turn.
pub(super) fn is_system(message: &Message) -> bool {
    ["system", "developer"].contains(&message.role.as_str())
}
