//! Turns a conversation into examples of supervised fine-tuning: one for each turn of the assistant,
//! or one for several turns where the tokens of one begin the prompt of the next.

use cllm_core::chat_template::Conversation;
use cllm_core::prompt_set::{Prompt, Sample, Turns, answers_something};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Result, TrainingTurn};

use super::dataset::Example;

/// The examples of a sample; none if it has no turn to teach. Turns are joined only as far as
/// `max_tokens`, so that the end of a long conversation does not exclude its beginning.
pub(super) fn examples(
    sample: &Sample,
    turns: Turns,
    tokenizer: &Tokenizer,
    max_tokens: usize,
) -> Result<Vec<Example>> {
    let mut encoded = match (&sample.prompt, turns) {
        (Prompt::Conversation(conversation), Turns::All) => earlier_turns(conversation, tokenizer)?,
        _ => Vec::new(),
    };
    if let Some(reference) = &sample.reference {
        encoded.push(tokenizer.encode_reference(&sample.prompt, reference)?);
    }
    let num_turns = encoded.len();
    let mut examples: Vec<Example> = Vec::new();
    for (index, turn) in encoded.into_iter().enumerate() {
        let fits = turn.prompt_ids.len() + turn.target_ids.len() <= max_tokens;
        match examples.last_mut().filter(|last| fits && begins(last, &turn.prompt_ids)) {
            Some(last) => append(last, turn),
            None => {
                let is_last = index + 1 == num_turns;
                let id = if is_last { sample.id.clone() } else { format!("{}/turn-{}", sample.id, index + 1) };
                examples.push(Example::labelled(id, turn.prompt_ids, turn.target_ids));
            }
        }
    }
    Ok(examples)
}

/// The assistant's turns in the messages, each after what it answers.
fn earlier_turns(conversation: &Conversation, tokenizer: &Tokenizer) -> Result<Vec<TrainingTurn>> {
    let messages = &conversation.messages;
    let turn = |index: usize| {
        let before = Conversation { messages: messages[..index].to_vec(), ..conversation.clone() };
        tokenizer.encode_turn(&before, &messages[index])
    };
    (0..messages.len()).filter(|&index| answers_something(messages, index)).map(turn).collect()
}

/// Whether the tokens of an example begin a prompt.
fn begins(example: &Example, prompt_ids: &[i32]) -> bool {
    let rest = prompt_ids.strip_prefix(&example.prompt_ids[..]);
    rest.is_some_and(|rest| rest.starts_with(&example.response_ids))
}

/// Appends a turn whose prompt begins with the tokens of the example.
fn append(example: &mut Example, turn: TrainingTurn) {
    let between = &turn.prompt_ids[example.num_clean_tokens()..];
    example.response_ids.extend(between);
    example.labelled.resize(example.response_ids.len(), false);
    example.response_ids.extend(&turn.target_ids);
    example.labelled.resize(example.response_ids.len(), true);
}
