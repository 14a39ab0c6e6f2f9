//! Turns a row of any known form into samples. What a row means is never guessed: one with two
//! prompts, or with two references that differ, is an error.

use serde_json::{Map, Value};

use super::conversation::{Split, Turn, Turns, is_messages, is_system, parse_messages, split_turns, text_of};
use super::dataset_file::{RowError, parse_json_text, type_name};
use super::field_map::{FieldMap, Role};
use super::sample::{DEFAULT_SOURCE, Prompt, Sample};
use crate::chat_template::{Conversation, Message, RESERVED_KWARGS};

/// The fields that hold a prompt, with its form.
const PROMPTS: [(&str, Role); 6] = [
    ("messages", Role::Messages),
    ("conversations", Role::Messages),
    ("conversation", Role::Messages),
    ("prompt", Role::Prompt),
    ("instruction", Role::Question),
    ("question", Role::Question),
];
/// Fields that hold what a question is about, such as Alpaca's `input` and Dolly's `context`.
const CONTEXTS: [&str; 2] = ["input", "context"];
/// Earlier turns in a form that is not read.
const HISTORY: &str = "history";
const REFERENCES: [&str; 5] = ["reference", "completion", "response", "output", "answer"];
const SYSTEMS: [&str; 2] = ["system", "system_prompt"];
/// Fields that only a chat template reads.
const TEMPLATE_FIELDS: [&str; 2] = ["tools", "chat_template_kwargs"];
const FORMS: &str = "`messages`, `conversations`, `prompt`, `question`, or `instruction` with `input` or `context`; the answer in \
     `reference`, `completion`, `response`, `output`, `answer` or the assistant's last message; for others, `cllm-data \
     prepare jsonl --map prompt=FIELD,reference=FIELD` names the fields";

/// What a row gives.
#[derive(Debug, Default)]
pub(super) struct RowSamples {
    pub(super) samples: Vec<Sample>,
    /// Fields that only `meta` keeps.
    pub(super) meta_fields: Vec<String>,
    /// Keys of answered messages that no sample keeps.
    pub(super) lost_keys: Vec<String>,
    /// Number of turns that are no prompts of their own, because they call a tool.
    pub(super) num_calling: usize,
    /// Number of samples that have no reference because their answer is empty.
    pub(super) num_empty: usize,
}

/// The answer that a field beside the prompt holds.
#[derive(Debug, PartialEq)]
enum Answer {
    Text(String),
    /// Messages that continue the conversation (TRL's `completion`).
    Messages(Vec<Message>),
}

/// Reads the row with this number, counted from 1, which makes its id if it has none.
pub(super) fn parse_row(
    number: usize,
    row: Map<String, Value>,
    fields: &FieldMap,
    turns: Turns,
) -> Result<RowSamples, RowError> {
    let mut row = Row::new(row, fields);
    let id = row.take_name(Role::Id, "id")?.unwrap_or_else(|| format!("{DEFAULT_SOURCE}-{number}"));
    let source = row.take_name(Role::Source, "source")?.unwrap_or_else(|| DEFAULT_SOURCE.to_owned());
    let prompt = row.take_prompt()?;
    let answer = row.take_answer()?;
    let (mut answered, num_calling) = match (prompt, answer) {
        (Prompt::Text(text), answer) => (vec![(Prompt::Text(text), plain_answer(answer)?)], 0),
        (Prompt::Conversation(conversation), answer) => answered_turns(conversation, answer, turns)?,
    };
    let num_empty = answered.iter_mut().filter_map(|(_, turn)| remove_empty(&mut turn.reference)).count();
    let lost_keys = answered.iter().flat_map(|(_, turn)| turn.lost_keys.clone()).collect();
    let (meta, meta_fields) = row.into_meta();
    let sample = |(index, (prompt, Turn { reference, .. })): (usize, (Prompt, Turn))| Sample {
        id: match (&prompt, turns) {
            (Prompt::Conversation(_), Turns::All) => format!("{id}#{}", index + 1),
            _ => id.clone(),
        },
        source: source.clone(),
        prompt,
        reference,
        meta: meta.clone(),
    };
    let samples = answered.into_iter().enumerate().map(sample).collect();
    Ok(RowSamples { samples, meta_fields, lost_keys, num_calling, num_empty })
}

/// Removes a reference without text: fine-tuning on it would teach to end at once.
fn remove_empty(reference: &mut Option<String>) -> Option<String> {
    reference.take_if(|text| text.trim().is_empty())
}

fn plain_answer(answer: Option<(String, Answer)>) -> Result<Turn, RowError> {
    let reference = match answer {
        Some((_, Answer::Text(text))) => Some(text),
        None => None,
        Some((_, Answer::Messages(_))) => {
            return Err(RowError::new("has a prompt of plain text and an answer of messages", "make both the same"));
        }
    };
    Ok(Turn { messages: Vec::new(), reference, lost_keys: Vec::new() })
}

/// The turns of a conversation, with the answer that a field beside it holds, and the number of
/// turns that call a tool instead.
fn answered_turns(
    mut conversation: Conversation,
    answer: Option<(String, Answer)>,
    turns: Turns,
) -> Result<(Vec<(Prompt, Turn)>, usize), RowError> {
    let text = match answer {
        Some((_, Answer::Messages(messages))) => {
            conversation.messages.extend(messages);
            None
        }
        Some((field, Answer::Text(text))) => Some((field, text)),
        None => None,
    };
    let Split { turns: mut found, num_calling } = split_turns(std::mem::take(&mut conversation.messages), turns)?;
    if let (Some((field, text)), Some(last)) = (text, found.last_mut()) {
        match &last.reference {
            None => last.reference = Some(text),
            Some(own) if own.trim() == text.trim() => {}
            Some(_) => {
                let detail = format!(
                    "the assistant's last turn, which is the reference of a conversation, and `{field}` beside it"
                );
                return Err(RowError::new("has two references that differ", detail));
            }
        }
    }
    let prompt = |mut turn: Turn| {
        let messages = std::mem::take(&mut turn.messages);
        (Prompt::Conversation(Conversation { messages, ..conversation.clone() }), turn)
    };
    Ok((found.into_iter().map(prompt).collect(), num_calling))
}

struct Row<'m> {
    /// The fields that have not been read yet.
    fields: Map<String, Value>,
    /// The names of all fields, for messages.
    names: Vec<String>,
    map: &'m FieldMap,
}

impl<'m> Row<'m> {
    fn new(fields: Map<String, Value>, map: &'m FieldMap) -> Self {
        let fields = fields.into_iter().filter(|(_, value)| !value.is_null());
        let without_mark = |(name, value): (String, Value)| match name.strip_prefix('\u{feff}') {
            Some(name) => (name.to_owned(), value),
            None => (name, value),
        };
        let fields: Map<String, Value> = fields.map(without_mark).collect();
        Row { names: fields.keys().cloned().collect(), fields, map }
    }

    fn take(&mut self, field: &str) -> Option<Value> {
        self.fields.shift_remove(field)
    }

    fn take_text(&mut self, field: &str) -> Result<Option<String>, RowError> {
        let not_text = |found| RowError::new("has a field that is not text", format!("`{field}` has {found}"));
        self.take(field).map(text_of).transpose().map_err(not_text)
    }

    /// The id or the source.
    fn take_name(&mut self, role: Role, default: &str) -> Result<Option<String>, RowError> {
        let Some(field) = self.map.get(role) else { return self.take_text(default) };
        self.take_text(field)?.ok_or_else(|| self.lacks(field)).map(Some)
    }

    /// The error for a row without the field that `--map` names.
    fn lacks(&self, field: &str) -> RowError {
        RowError::new("lacks a field that --map names", format!("`{field}`, its fields are {}", self.names.join(", ")))
    }

    fn take_prompt(&mut self) -> Result<Prompt, RowError> {
        let (field, form) = self.prompt_field()?;
        let Some(value) = self.take(&field) else { return Err(self.lacks(&field)) };
        let mut messages = match form {
            Role::Messages => parse_messages(value)?,
            _ if is_messages(&value) => parse_messages(value)?,
            _ => {
                let not_text = |found| RowError::new("has a prompt that is not text", format!("`{field}` has {found}"));
                let text = text_of(value).map_err(not_text)?;
                if form == Role::Prompt {
                    return self.plain_prompt(text);
                }
                vec![Message::new("user", self.with_context(text)?)]
            }
        };
        self.insert_system(&mut messages)?;
        Ok(Prompt::Conversation(Conversation { messages, ..self.take_template_fields()? }))
    }

    /// The field that holds the prompt, and its form.
    fn prompt_field(&mut self) -> Result<(String, Role), RowError> {
        if let Some((role, field)) = self.map.prompt() {
            return Ok((field.to_owned(), role));
        }
        let present: Vec<_> = PROMPTS.into_iter().filter(|(name, _)| self.fields.contains_key(*name)).collect();
        match present[..] {
            [(name, form)] => Ok((name.to_owned(), form)),
            [(name, Role::Messages), (text, _)] if self.is_first_question(name, text) => {
                self.take(text);
                Ok((name.to_owned(), Role::Messages))
            }
            [] => {
                let names = if self.names.is_empty() { "none".to_owned() } else { self.names.join(", ") };
                Err(RowError::new("has no known form", format!("its fields are {names}; known forms: {FORMS}")))
            }
            [(first, _), (second, _), ..] => {
                let detail = format!("`{first}` and `{second}`: {}", advice("prompt"));
                Err(RowError::new("has two prompts", detail))
            }
        }
    }

    /// Whether the field `text` only repeats the first turn of the user in `messages`.
    fn is_first_question(&self, messages: &str, text: &str) -> bool {
        let Some(text) = self.fields[text].as_str() else { return false };
        let messages = parse_messages(self.fields[messages].clone()).unwrap_or_default();
        let first = messages.iter().find(|message| message.role == "user");
        first.is_some_and(|message| message.content.trim() == text.trim())
    }

    /// A text that is continued as it is, so that nothing reads a system text, tools or variables
    /// beside it.
    fn plain_prompt(&mut self, text: String) -> Result<Prompt, RowError> {
        for name in SYSTEMS.into_iter().chain(TEMPLATE_FIELDS) {
            if self.take(name).is_some_and(|value| !is_empty(&value)) {
                let detail =
                    format!("`{name}`: `--map question=FIELD` makes the text a question for the chat template");
                return Err(RowError::new("has what a chat template reads beside a prompt of plain text", detail));
            }
        }
        Ok(Prompt::Text(text))
    }

    /// An instruction followed by what it is about.
    fn with_context(&mut self, text: String) -> Result<String, RowError> {
        if self.map.prompt().is_some() {
            return Ok(text);
        }
        if self.fields.get(HISTORY).is_some_and(|history| history.as_array().is_none_or(|turns| !turns.is_empty())) {
            return Err(RowError::new("has a `history` beside its question", "write all turns as `messages`"));
        }
        let mut parts = vec![text];
        for field in CONTEXTS {
            parts.extend(self.take_text(field)?);
        }
        parts.retain(|part| !part.is_empty());
        Ok(parts.join("\n"))
    }

    /// Puts the row's system text before a conversation that has none of its own.
    fn insert_system(&mut self, messages: &mut Vec<Message>) -> Result<(), RowError> {
        for field in SYSTEMS {
            let Some(text) = self.take_text(field)?.filter(|text| !text.is_empty()) else { continue };
            match messages.iter().find(|message| is_system(message)) {
                Some(own) if own.content != text => {
                    let detail = format!("a message of the conversation, and `{field}`");
                    return Err(RowError::new("has two system texts that differ", detail));
                }
                Some(_) => {}
                None => messages.insert(0, Message::new("system", text)),
            }
        }
        Ok(())
    }

    /// A conversation without messages, with what the template needs besides.
    fn take_template_fields(&mut self) -> Result<Conversation, RowError> {
        let [tools, kwargs] = TEMPLATE_FIELDS.map(|name| self.take(name).unwrap_or(Value::Null));
        let tools = match parse_json_text(tools, "tools")? {
            Value::Null => Vec::new(),
            Value::Array(tools) => tools,
            other => return Err(RowError::new("has tools that are no list", format!("found {}", type_name(&other)))),
        };
        let chat_template_kwargs = match parse_json_text(kwargs, "chat_template_kwargs")? {
            Value::Null => Map::new(),
            Value::Object(kwargs) => kwargs,
            other => {
                let detail = format!("found {}", type_name(&other));
                return Err(RowError::new("has chat_template_kwargs that are no object", detail));
            }
        };
        if let Some(name) = RESERVED_KWARGS.into_iter().find(|&name| chat_template_kwargs.contains_key(name)) {
            let detail = format!("`{name}` comes from the row itself: leave it out");
            return Err(RowError::new("has chat_template_kwargs that no row may set", detail));
        }
        Ok(Conversation { messages: Vec::new(), tools, chat_template_kwargs })
    }

    /// The field that holds the answer, and the answer.
    fn take_answer(&mut self) -> Result<Option<(String, Answer)>, RowError> {
        let mapped = self.map.get(Role::Reference);
        if let Some(field) = mapped.filter(|field| !self.fields.contains_key(*field)) {
            return Err(self.lacks(field));
        }
        let fields = mapped.map_or(REFERENCES.to_vec(), |field| vec![field]);
        let mut first: Option<(&str, Answer)> = None;
        for field in fields {
            let Some(value) = self.take(field) else { continue };
            let answer = parse_answer(field, value)?;
            match &first {
                Some((known, other)) if *other != answer => {
                    let detail = format!("`{known}` and `{field}`: {}", advice("reference"));
                    return Err(RowError::new("has two references that differ", detail));
                }
                Some(_) => {}
                None => first = Some((field, answer)),
            }
        }
        Ok(first.map(|(field, answer)| (field.to_owned(), answer)))
    }

    /// What is left becomes the fields of `meta`, whose own fields win. Also returns the names of
    /// the former.
    fn into_meta(mut self) -> (Option<Value>, Vec<String>) {
        let own = self.take("meta");
        let names: Vec<String> = self.fields.keys().cloned().collect();
        let meta = match own {
            own if names.is_empty() => return (own, names),
            Some(Value::Object(own)) => own,
            Some(other) => [("meta".to_owned(), other)].into_iter().collect(),
            None => Map::new(),
        };
        self.fields.extend(meta);
        (Some(self.fields.into()), names)
    }
}

/// Whether a value, or the value that JSON text stands for, says nothing.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => ["", "[]", "{}", "null"].contains(&text.trim()),
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

fn parse_answer(field: &str, value: Value) -> Result<Answer, RowError> {
    if is_messages(&value) {
        return parse_messages(value).map(Answer::Messages);
    }
    let not_text = |found| RowError::new("has a reference that is not text", format!("`{field}` has {found}"));
    text_of(value).map(Answer::Text).map_err(not_text)
}

/// How to choose the field that holds a prompt or a reference.
fn advice(role: &str) -> String {
    format!("choose one with `cllm-data prepare jsonl --map {role}=FIELD`")
}
