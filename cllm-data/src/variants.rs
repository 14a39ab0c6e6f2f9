//! Variants of a benchmark's prompts, without answers: the teacher answers them itself. A student
//! that has learned from more distinct prompts stays closer to its teacher on new prompts.

use std::sync::LazyLock;

use cllm_core::chat_template::Conversation;
use cllm_core::prompt_set::{Prompt, Sample};
use cllm_core::task::Task;
use cllm_core::{Error, Result, fingerprint};
use rand::RngExt;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use regex::{Captures, Regex};

/// Changes the text of a question of this sample for the variant of this number.
type Vary<'s> = Box<dyn Fn(&str, &Sample, usize, &mut ChaCha8Rng) -> String + 's>;

/// The number of forms that [`in_another_form`] knows.
const NUM_FORMS: usize = 2;

static WHOLE_NUMBER: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\d+").expect("the pattern is valid"));

/// Makes `per_sample` variants of each sample, without reference and meta: GSM8K's questions get
/// other numbers, Spider's the schema of another database in `samples` with its tables and columns
/// shuffled, and CodeSearchNet's functions are asked for in other words. The same seed gives the same
/// variants.
///
/// # Errors
/// [`Error::Usage`] for a benchmark that has no variants, or not as many.
pub(crate) fn variants(task: Task, samples: &[Sample], per_sample: usize, seed: u64) -> Result<Vec<Sample>> {
    let vary: Vary<'_> = match task {
        Task::Gsm8k => Box::new(|question, _, _, rng| with_other_numbers(question, rng)),
        Task::Spider => {
            let schemas = schemas(samples);
            Box::new(move |question, _, _, rng| with_another_schema(question, &schemas, rng))
        }
        Task::Codesearchnet if per_sample > NUM_FORMS => {
            let message = format!("codesearchnet has {NUM_FORMS} variants of each prompt, not {per_sample}");
            return Err(Error::usage(message));
        }
        Task::Codesearchnet => Box::new(|question, sample, number, _| in_another_form(question, sample, number)),
        _ => {
            let message = format!("{} has no variants: gsm8k, spider and codesearchnet have them", task.name());
            return Err(Error::usage(message));
        }
    };
    let variant = |sample: &Sample, number: usize| {
        let mut rng = fingerprint::derive_rng(seed, &format!("variant/{}", sample.id), number as u64);
        let prompt = match &sample.prompt {
            Prompt::Text(text) => Prompt::Text(vary(text, sample, number, &mut rng)),
            Prompt::Conversation(conversation) => {
                let mut conversation = conversation.clone();
                for message in &mut conversation.messages {
                    message.content = vary(&message.content, sample, number, &mut rng);
                }
                Prompt::Conversation(conversation)
            }
        };
        let id = format!("{}-variant-{number}", sample.id);
        Sample { id, source: sample.source.clone(), prompt, reference: None, meta: None }
    };
    let numbered = samples.iter().flat_map(|sample| (0..per_sample).map(move |number| (sample, number)));
    Ok(numbered.map(|(sample, number)| variant(sample, number)).collect())
}

/// Replaces whole numbers by others with as many digits. The digits 0 and 1 stay; another single
/// digit becomes 2 to 9.
fn with_other_numbers(question: &str, rng: &mut ChaCha8Rng) -> String {
    let replace = |number: &Captures<'_>| match number[0].len() {
        1 if ["0", "1"].contains(&&number[0]) => number[0].to_owned(),
        1 => rng.random_range(2..10).to_string(),
        num_digits @ 2..=9 if !number[0].starts_with('0') => {
            let smallest = 10u64.pow(num_digits as u32 - 1);
            // Round numbers stay round, since prices and percentages usually are.
            let step = if number[0].ends_with('0') { 10 } else { 1 };
            (rng.random_range(smallest..smallest * 10) / step * step).to_string()
        }
        _ => number[0].to_owned(),
    };
    WHOLE_NUMBER.replace_all(question, replace).into_owned()
}

/// The distinct schemas in some prompts: a schema is the text before the first empty line.
fn schemas(samples: &[Sample]) -> Vec<String> {
    let text = |sample: &Sample| match &sample.prompt {
        Prompt::Text(text) => text.split_once("\n\n").map(|(schema, _)| schema.to_owned()),
        Prompt::Conversation(Conversation { messages, .. }) => {
            messages.last()?.content.split_once("\n\n").map(|(schema, _)| schema.to_owned())
        }
    };
    let mut schemas: Vec<String> = samples.iter().filter_map(text).collect();
    schemas.sort();
    schemas.dedup();
    schemas
}

fn with_another_schema(question: &str, schemas: &[String], rng: &mut ChaCha8Rng) -> String {
    let Some((own, rest)) = question.split_once("\n\n") else { return question.to_owned() };
    let other = schemas.choose(rng).filter(|other| *other != own).map_or(own, String::as_str);
    format!("{}\n\n{rest}", shuffled(other, rng))
}

/// Shuffles the tables of a schema and the columns of each table. Foreign keys stay last.
fn shuffled(schema: &str, rng: &mut ChaCha8Rng) -> String {
    let (mut tables, keys): (Vec<&str>, Vec<&str>) =
        schema.lines().partition(|line| !line.starts_with("foreign keys: "));
    tables.shuffle(rng);
    let shuffle_columns = |table: &str, rng: &mut ChaCha8Rng| {
        let Some((name, columns)) = table.strip_suffix(')').and_then(|table| table.split_once('(')) else {
            return table.to_owned();
        };
        let mut columns: Vec<&str> = columns.split(", ").collect();
        columns.shuffle(rng);
        format!("{name}({})", columns.join(", "))
    };
    let lines: Vec<String> = tables.into_iter().map(|table| shuffle_columns(table, rng)).collect();
    lines.into_iter().chain(keys.into_iter().map(str::to_owned)).collect::<Vec<_>>().join("\n")
}

/// Asks for a function of CodeSearchNet as HumanEval does, by its head and docstring, or as MBPP
/// does, in a sentence.
fn in_another_form(question: &str, sample: &Sample, number: usize) -> String {
    let (request, docstring) = question.split_once("\n\n").unwrap_or((question, ""));
    match sample.reference.as_deref().and_then(function_head) {
        Some(head) if number == 0 => {
            let docstring = docstring.replace('\n', "\n    ");
            let code = format!("{head}\n    \"\"\"{docstring}\n    \"\"\"\n");
            format!("Complete this Python function. Answer with code only.\n\n{code}")
        }
        _ => {
            let name = request.split('`').nth(1).unwrap_or_default();
            format!("Write a Python function `{name}`. {docstring} Answer with Python code only.")
        }
    }
}

/// The line or lines from `def` to the colon.
fn function_head(code: &str) -> Option<&str> {
    let head = &code[code.find("def ")?..];
    Some(&head[..=head.find(":\n")?])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(id: &str, content: &str) -> Sample {
        Sample {
            id: id.to_owned(),
            source: "x/train".to_owned(),
            prompt: Prompt::question(content),
            reference: Some("r".to_owned()),
            meta: Some(serde_json::json!({ "db_id": "a" })),
        }
    }

    fn content(sample: &Sample) -> &str {
        let Prompt::Conversation(Conversation { messages, .. }) = &sample.prompt else {
            panic!("a conversation expected")
        };
        &messages[0].content
    }

    #[test]
    fn numbers_change_and_words_stay() {
        let question = "Ann has 48 pens, 1 box and 300 cards, 5 of them red, in 007.";
        let samples = [sample("a", question)];
        let made = variants(Task::Gsm8k, &samples, 20, 0).unwrap();
        let form =
            Regex::new(r"^Ann has [1-9]\d pens, 1 box and [1-9]\d0 cards, [2-9] of them red, in 007\.$").unwrap();
        assert!(made.iter().all(|variant| form.is_match(content(variant))), "{made:?}");
        assert!(made.iter().any(|variant| content(variant) != content(&made[0])));
        assert!(made.iter().all(|variant| variant.reference.is_none() && variant.meta.is_none()));
        assert_eq!((made[3].id.as_str(), made.len()), ("a-variant-3", 20));
        assert_eq!(variants(Task::Gsm8k, &samples, 20, 0).unwrap(), made);
        assert_ne!(variants(Task::Gsm8k, &samples, 20, 1).unwrap(), made);
        assert!(variants(Task::Jsonl, &samples, 1, 0).is_err());
    }

    #[test]
    fn functions_are_asked_for_in_other_words() {
        let question =
            "Write the Python function `area` from its docstring. Answer with code only.\n\nThe area\nof it.";
        let mut with_code = sample("a", question);
        with_code.reference = Some("@cached\ndef area(r,\n  scale=1):\n    return r: r".to_owned());
        let made = variants(Task::Codesearchnet, &[with_code, sample("b", question)], NUM_FORMS, 0).unwrap();
        let texts: Vec<&str> = made.iter().map(content).collect();
        let head = "def area(r,\n  scale=1):\n    \"\"\"The area\n    of it.\n    \"\"\"\n";
        let by_name = "Write a Python function `area`. The area\nof it. Answer with Python code only.";
        // Without code, there is no head.
        let by_head = format!("Complete this Python function. Answer with code only.\n\n{head}");
        assert_eq!(texts, [by_head.as_str(), by_name, by_name, by_name]);
        let error = variants(Task::Codesearchnet, &[], NUM_FORMS + 1, 0).unwrap_err().to_string();
        assert!(error.contains("2 variants of each prompt, not 3"), "{error}");
    }

    #[test]
    fn questions_get_the_schemas_of_other_databases() {
        let first = "pen(id, size)\ncat(name, pen)\nforeign keys: cat.pen = pen.id\n\nHow many pens?\nSQL only.";
        let samples = [sample("a", first), sample("b", "car(id, speed, year)\n\nHow fast?\nSQL only.")];
        let made = variants(Task::Spider, &samples, 20, 0).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for variant in &made[..20] {
            let (schema, rest) = content(variant).split_once("\n\n").unwrap();
            assert_eq!(rest, "How many pens?\nSQL only.");
            let mut lines: Vec<Vec<&str>> = schema
                .lines()
                .map(|line| line.split(['(', ',', ' ', ')']).filter(|word| !word.is_empty()).collect())
                .collect();
            if schema.starts_with("car(") {
                lines[0].sort_unstable();
                assert_eq!(lines, [["car", "id", "speed", "year"]]);
            } else {
                assert_eq!(schema.lines().last(), Some("foreign keys: cat.pen = pen.id"));
                assert_eq!(lines.len(), 3);
            }
            seen.insert(schema);
        }
        assert!(seen.len() > 4 && seen.iter().any(|schema| schema.starts_with("car(")), "{seen:?}");
    }
}
