//! Answers of each kind that was handed with its verdict when the benchmarks' judges were
//! reproduced, in the words in which it was handed: a reference, what a model says, and whether it
//! is correct.

use std::path::Path;

use cllm_core::prompt_set::{Prompt, Sample};
use cllm_core::sandbox::Sandbox;
use cllm_core::task::{Metric, Score, ScoreContext, Task, Verdict};
use cllm_core::trajectory::FinishReason;
use serde_json::{Value, json};

fn sample(task: Task, reference: &str, meta: Value) -> Sample {
    Sample {
        id: "a".to_owned(),
        source: format!("{}/test", task.name()),
        prompt: Prompt::question("?"),
        reference: Some(reference.to_owned()),
        meta: Some(meta),
    }
}

fn score(task: Task, context: ScoreContext<'_>, sample: &Sample, answer: &str) -> Score {
    task.check_scorable(context, sample).unwrap();
    task.score(context, sample, answer, FinishReason::Eos, false).unwrap()
}

const COUNT: &str = "SELECT count(*) FROM pet";

/// Gold query and answer. All answers are correct.
const QUERIES: [(&str, &str); 12] = [
    // The official judge lets columns permute.
    ("SELECT name, age FROM pet", "SELECT age, name FROM pet"),
    // The official judge joins spaced operators.
    ("SELECT name FROM pet WHERE age >= 5", "SELECT name FROM pet WHERE age > = 5"),
    // A semicolon in a comment ends nothing.
    (COUNT, "```sql\n-- count all; no filter\nSELECT count(*) FROM pet;\n```"),
    // A quotation mark in a comment opens nothing.
    (COUNT, "-- the shop's pets\nSELECT count(*) FROM pet;\nThat counts them."),
    // The first line of a fence is its info string, whatever it says.
    (COUNT, "```mysql\nSELECT count(*) FROM pet\n```"),
    // Tildes fence too.
    (COUNT, "~~~\nSELECT count(*) FROM pet\n~~~"),
    // What stands before the last </think> is no answer; Qwen3 writes an empty thought.
    (COUNT, "<think>\n\n</think>\n\nSELECT count(*) FROM pet"),
    // A draft in the thought is no answer.
    (COUNT, "maybe\n```sql\nSELECT 1\n```\nno.</think>\n```sql\nSELECT count(*) FROM pet\n```"),
    // A label before the query.
    (COUNT, "SQL: SELECT count(*) FROM pet"),
    // Prose around an unfenced query.
    (COUNT, "The query is:\nSELECT count(*) FROM pet\n\nIt counts all rows."),
    // The last fence corrects the first.
    (COUNT, "```sql\nSELECT 1\n```\nCorrection:\n```sql\nSELECT count(*) FROM pet\n```"),
    // SQLite's functions of mathematics are in the official judge's SQLite.
    ("SELECT floor(avg(age)) FROM pet", "SELECT floor(avg(age)) FROM pet"),
];

/// Writes a data folder with the database of the pets, two of which have one name.
fn write_pets(folder: &Path) {
    let folder = folder.join("database/pets");
    std::fs::create_dir_all(&folder).unwrap();
    let database = rusqlite::Connection::open(folder.join("pets.sqlite")).unwrap();
    let rows = "CREATE TABLE pet (name, age); INSERT INTO pet VALUES ('Ada', 3), ('Bo', 5), ('Bo', 8), ('Cy', 5);";
    database.execute_batch(rows).unwrap();
}

#[test]
fn queries_have_the_verdicts_that_were_handed() {
    let data = tempfile::tempdir().unwrap();
    write_pets(data.path());
    let context = ScoreContext { data: Some(data.path()), ..ScoreContext::default() };
    let meta = json!({ "db_id": "pets" });
    for (gold, answer) in QUERIES {
        let sample = sample(Task::Spider, gold, meta.clone());
        let score = score(Task::Spider, context, &sample, answer);
        let verdicts = (score.verdict, score.alternative.unwrap().verdict);
        assert_eq!(verdicts, (Verdict::Correct, Verdict::Correct), "{gold} | {answer}");
    }
    // Correct by the official default, and incorrect with keep_distinct, where rows repeat.
    let sample = sample(Task::Spider, "SELECT name FROM pet", meta);
    for (keep_distinct, verdict, metric) in
        [(false, Verdict::Correct, Metric::KeepDistinct), (true, Verdict::Incorrect, Metric::IgnoreDistinct)]
    {
        let context = ScoreContext { keep_distinct, ..context };
        let score = score(Task::Spider, context, &sample, "SELECT DISTINCT name FROM pet");
        let other = score.alternative.unwrap();
        assert_eq!((score.verdict, other.metric), (verdict, metric));
        assert_ne!(other.verdict, verdict);
    }
}

/// Answers to the test `assert f(1) == 2`. All are correct.
const PROGRAMS: [&str; 7] = [
    // What stands before the last </think> is no answer.
    "first try\n```python\ndef f(x):\n    return x - 1\n```\nno.</think>\n```python\ndef f(x):\n    return x + 1\n```",
    // The last definition of the function that the tests name counts.
    "```python\ndef f(x):\n    return x\n```\nBetter:\n```python\ndef f(x):\n    return x + 1\n```",
    // Helpers in other fences belong to the answer.
    "```python\ndef g(x):\n    return x + 1\n```\nand\n```python\ndef f(x):\n    return g(x)\n```",
    // Imports in a fence of their own.
    "```python\nimport math\n```\n```python\ndef f(x):\n    return int(math.floor(x)) + 1\n```",
    // Prose around unfenced code.
    "Here it is:\ndef f(x):\n    return x + 1\nIt adds one.",
    // The future import goes first.
    "from __future__ import annotations\ndef f(x):\n    return x + 1",
    // The official judge executes text, where the cookie says nothing.
    "# -*- coding: ascii -*-\n# é\ndef f(x):\n    return x + 1",
];

#[test]
fn programs_have_the_verdicts_that_were_handed() {
    let sandbox = Sandbox::open().unwrap();
    let context = ScoreContext { sandbox: Some(&sandbox), ..ScoreContext::default() };
    let sample = sample(Task::Mbpp, "?", json!({ "task_id": 1, "test_list": ["assert f(1) == 2"] }));
    for answer in PROGRAMS {
        assert_eq!(score(Task::Mbpp, context, &sample, answer).verdict, Verdict::Correct, "{answer}");
    }
    let wrong = "```python\ndef f(x):\n    return x + 1\n```\nBetter:\n```python\ndef f(x):\n    return x\n```";
    assert_eq!(score(Task::Mbpp, context, &sample, wrong).verdict, Verdict::Incorrect);
}

/// Reference, answer, and whether it is correct.
const NUMBERS: [(&str, &str, bool); 16] = [
    // {,} is how TeX writes a thousands comma.
    ("9500", "The total is \\boxed{9{,}500}.", true),
    // A thin space of TeX groups digits.
    ("9500", "So 9\\,500 in all", true),
    // A narrow no-break space groups digits.
    ("9500", "9\u{202f}500", true),
    // U+2212 is a minus sign.
    ("-5", "It is \u{2212}5.", true),
    // A hyphen between digits is no sign.
    ("6", "It takes 5-6 days", true),
    // Digits of other scripts are the same digits.
    ("12", "12 (१२)", true),
    // A fraction is one number.
    ("3/4", "It is 1/4.", false),
    // A comma groups exactly three digits.
    ("1,2,3", "123", false),
    // A space groups exactly three digits.
    ("1234", "12 34", false),
    // Scientific notation is one number.
    ("23", "about 6.02e23", false),
    ("1000", "1e3", true),
    // A pair is no number.
    ("35", "(3,5)", false),
    // A time is no number.
    ("30", "at 7:30", false),
    // A heading is no answer line: #### counts where a number follows at once.
    ("20", "#### Step 2: total\n18 + 2 = 20\nThe answer is 20.", true),
    // A fraction is one number.
    ("6", "#### 6/10", false),
    // A boxed answer wins over what follows.
    ("18", "Thus \\boxed{18}, after 2 steps", true),
];

#[test]
fn numbers_have_the_verdicts_that_were_handed() {
    let numeric = json!({ "scorer": "numeric" });
    for (reference, answer, is_correct) in NUMBERS {
        for (task, meta) in [(Task::Gsm8k, Value::Null), (Task::Jsonl, numeric.clone())] {
            let sample = sample(task, reference, meta);
            let verdict = score(task, ScoreContext::default(), &sample, answer).verdict;
            assert_eq!(verdict == Verdict::Correct, is_correct, "{}: {reference} | {answer}", task.name());
        }
    }
}
