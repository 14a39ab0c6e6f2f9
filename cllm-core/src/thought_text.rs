//! Thoughts of thinking models (Qwen3, DeepSeek-R1) in texts: what stands between `<think>` and
//! `</think>` before the answer proper.

pub(crate) const START: &str = "<think>";
pub(crate) const END: &str = "</think>";
/// What closes a thought, as the chat template of Qwen3 writes it.
pub(crate) const CLOSING: &str = "\n</think>\n\n";

/// What follows a model's thought: the text after the last `</think>`, and nothing of a thought
/// that never ends.
pub fn without_thought(text: &str) -> &str {
    let answer = text.rsplit_once(END).map_or(text, |(_, after)| after);
    if answer.trim_start().starts_with(START) { "" } else { answer }
}

/// A thought and the answer after it in one text, as the chat template of Qwen3 writes them.
pub fn with_thought(thought: &str, answer: &str) -> String {
    format!("{START}\n{}{CLOSING}{}", thought.trim_matches('\n'), answer.trim_start_matches('\n'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_model_thought_is_no_answer() {
        for (text, answer) in [
            ("SELECT 1", "SELECT 1"),
            ("<think>\n\n</think>\n\nSELECT 1", "\n\nSELECT 1"),
            ("never opened</think>2", "2"),
            ("<think>a</think>b<think>c</think>d", "d"),
            ("<think>\nIt is cut", ""),
            ("<think>a</think>\n<think>It is cut", ""),
            ("if a <think> b", "if a <think> b"),
        ] {
            assert_eq!(without_thought(text), answer, "{text}");
        }
        assert_eq!(without_thought(&with_thought("\n1 + 1\n", "\n\n2")), "\n\n2");
    }
}
