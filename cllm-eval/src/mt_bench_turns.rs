//! The two turns of an MT-bench question. The prompt of the second turn contains the model's own
//! answer to the first, so it is completed once that answer exists.

use cllm_core::chat_template::{Conversation, Message};
use cllm_core::prompt_set::{Prompt, Sample};
use cllm_core::task::Task;
use cllm_core::{Error, Result};

/// Returns each first turn followed by its second turn. The [`conversation`] of the second still
/// lacks the first answer.
///
/// # Errors
/// When a sample is not a first turn.
pub fn both_turns(first: Vec<Sample>) -> Result<Vec<Sample>> {
    let mut both = Vec::with_capacity(2 * first.len());
    for sample in first {
        let id = sample.id.strip_suffix("/1").ok_or_else(|| not_a_first_turn(&sample))?;
        let second = Sample { id: format!("{id}/2"), prompt: conversation(&sample, "")?, ..sample.clone() };
        both.extend([sample, second]);
    }
    Ok(both)
}

/// Whether a sample of [`both_turns`] is a second turn.
pub fn is_second(sample: &Sample) -> bool {
    Task::from_source(&sample.source) == Task::MtBench && sample.id.ends_with("/2")
}

/// The prompt of a second turn: the first question, the answer to it, and the second question.
///
/// # Errors
/// When the sample's `meta` does not contain two turns.
pub fn conversation(sample: &Sample, answer: &str) -> Result<Prompt> {
    let turn = |index: usize| sample.meta.as_ref().and_then(|meta| meta["turns"][index].as_str());
    let (Some(first), Some(second)) = (turn(0), turn(1)) else { return Err(not_a_first_turn(sample)) };
    let mut conversation = match &sample.prompt {
        Prompt::Conversation(conversation) => conversation.clone(),
        Prompt::Text(_) => Conversation::default(),
    };
    conversation.messages.retain(|message| message.role == "system");
    let turns = [("user", first), ("assistant", answer), ("user", second)];
    conversation.messages.extend(turns.map(|(role, content)| Message::new(role, content)));
    Ok(Prompt::Conversation(conversation))
}

fn not_a_first_turn(sample: &Sample) -> Error {
    Error::usage(format!(
        "prompt `{}` is not a first turn of mt-bench with both turns in its meta: prepare it again",
        sample.id
    ))
}

#[cfg(test)]
mod tests {
    use cllm_core::prompt_set;

    use super::*;

    #[test]
    fn the_second_turn_contains_the_first_answer() {
        let dir = tempfile::tempdir().unwrap();
        let row = r#"{"question_id": 81, "category": "writing", "turns": ["One?", "Two?"]}"#;
        std::fs::write(dir.path().join("question.jsonl"), row).unwrap();
        let both = both_turns(Task::MtBench.load(dir.path(), "test").unwrap()).unwrap();
        assert_eq!([both[0].id.as_str(), &both[1].id], ["81/1", "81/2"]);
        assert_eq!([is_second(&both[0]), is_second(&both[1])], [false, true]);
        let Prompt::Conversation(Conversation { messages, .. }) = conversation(&both[1], "1.").unwrap() else {
            panic!("a conversation expected")
        };
        let actual: Vec<_> = messages.iter().map(|message| (message.role.as_str(), message.content.as_str())).collect();
        assert_eq!(actual, [("user", "One?"), ("assistant", "1."), ("user", "Two?")]);
        let mut with_system = both.clone();
        prompt_set::insert_system_message(&mut with_system, "Be brief.");
        let Prompt::Conversation(Conversation { messages, .. }) = conversation(&with_system[1], "1.").unwrap() else {
            panic!("a conversation expected")
        };
        assert_eq!((messages[0].role.as_str(), messages.len()), ("system", 4));
        assert!(both_turns(both).is_err(), "a second turn has no second turn");
        std::fs::write(dir.path().join("question.jsonl"), row.replace(", \"Two?\"", "")).unwrap();
        assert!(Task::MtBench.load(dir.path(), "test").unwrap_err().to_string().contains("line 1"));
    }
}
