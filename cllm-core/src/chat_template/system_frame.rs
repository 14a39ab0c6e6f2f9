//! Where a rendered prompt has its system message, so that prompts can be compared without it.

use super::{Conversation, Message, Renderer};

/// Texts that stand for a system message and a question.
const SYSTEM: &str = "cllm-system-message";
const QUESTION: &str = "cllm-question";

/// What a chat template writes before and after a system message at the start of a conversation.
#[derive(Debug)]
pub struct SystemFrame {
    before: String,
    after: String,
}

impl SystemFrame {
    /// Finds it. `None` if the template refuses system messages, or does not mark them: some write
    /// them into the first question.
    pub(crate) fn find(renderer: &Renderer) -> Option<Self> {
        let question = Message::new("user", QUESTION);
        let with_system = vec![Message::new("system", SYSTEM), question.clone()];
        let render = |messages: Vec<Message>| renderer.render(&messages.into(), true).ok();
        let (with_system, bare) = (render(with_system)?, render(vec![question])?);
        let (before, rest) = with_system.split_once(SYSTEM)?;
        let (after, _) = rest.split_once(QUESTION)?;
        let frame = SystemFrame { before: before.to_owned(), after: after.to_owned() };
        // A template may write a system message of its own where a conversation has none.
        let is_marked = !after.is_empty()
            && (!bare.starts_with(before) || frame.without_system(&bare) == frame.without_system(&with_system));
        is_marked.then_some(frame)
    }

    /// A rendered prompt after its system message, or the whole of it if it has none.
    pub fn without_system<'t>(&self, text: &'t str) -> &'t str {
        let rest = text.strip_prefix(&self.before).and_then(|rest| rest.split_once(&self.after));
        rest.map_or(text, |(_, rest)| rest)
    }
}

impl Conversation {
    /// The conversation with no system message, and with one that stands for any.
    pub(crate) fn system_variants(&self) -> [Conversation; 2] {
        let mut without = self.clone();
        without.messages.retain(|message| message.role != "system");
        let mut with = without.clone();
        with.messages.insert(0, Message::new("system", SYSTEM));
        [without, with]
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::chat_template::{Rendering, today};

    fn frame(template: &str) -> Option<SystemFrame> {
        let rendering = Rendering { chat_template: Some(template.to_owned()), ..Rendering::on(today()) };
        let folder = tempfile::tempdir().unwrap();
        SystemFrame::find(&Renderer::load(folder.path(), &json!({}), &rendering).unwrap())
    }

    const CHATML: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}";

    #[test]
    fn a_prompt_is_compared_without_the_system_message_that_its_template_marks() {
        let own = "{% if messages[0].role != 'system' %}<system>Be kind.</>{% endif %}";
        for template in [CHATML.to_owned(), format!("{own}{CHATML}")] {
            let frame = frame(&template).unwrap();
            for (text, rest) in [
                ("<system>Be brief.</><user>2 + 2</>", "2 + 2</>"),
                ("<user>2 + 2</>", "<user>2 + 2</>"),
                ("<system>Be</><user>a</><assistant>b</><user>2</>", "a</><assistant>b</><user>2</>"),
            ] {
                assert_eq!(frame.without_system(text), rest);
            }
        }
    }

    #[test]
    fn a_template_that_writes_the_system_message_into_the_question_or_refuses_it_marks_none() {
        for template in [
            "[INST] {% for m in messages %}{{ m.content }}{% if not loop.last %}\n\n{% endif %}{% endfor %}[/INST]",
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        ] {
            assert!(frame(template).is_none(), "{template}");
        }
    }
}
