//! Problems made from a seed, in GSM8K's form and as text to SQL: small enough for a model of a few million parameters,
//! checkable, and shipped with the toolkit so that nothing has to be downloaded.

use std::time::Duration;

use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use rusqlite::Connection;
use serde_json::json;

use super::sql::Database;
use super::{Verdict, gsm8k};
use crate::prompt_set::{Prompt, Sample};
use crate::{Error, Result, fingerprint, interrupt};

/// Samples of a split where no count is given.
pub const DEFAULT_NUM_PROBLEMS: usize = 2000;
/// A query on so small a table that takes longer has no end.
const TIME_LIMIT: Duration = Duration::from_secs(1);

const NAMES: [&str; 12] = ["Tom", "Ann", "Ben", "Eva", "Sam", "Mia", "Leo", "Zoe", "Max", "Ida", "Jim", "Amy"];
const THINGS: [&str; 10] =
    ["apples", "pens", "books", "cards", "coins", "eggs", "shells", "stamps", "marbles", "cookies"];
const BOXES: [&str; 4] = ["bags", "boxes", "baskets", "packs"];
/// Table, its text column with values, its number column.
const TABLES: [(&str, &str, [&str; 4], &str); 6] = [
    ("pets", "kind", ["cat", "dog", "bird", "fish"], "age"),
    ("cars", "color", ["red", "blue", "green", "black"], "price"),
    ("books", "genre", ["drama", "poetry", "history", "crime"], "pages"),
    ("songs", "style", ["rock", "jazz", "folk", "blues"], "seconds"),
    ("trees", "species", ["oak", "pine", "birch", "maple"], "height"),
    ("rooms", "floor", ["ground", "first", "second", "third"], "seats"),
];

/// `count` samples of a split. Splits are disjoint: a problem belongs to `test` or to the others by its own hash. Ends early
/// when a signal asks to stop, for which the caller looks.
pub fn generate(seed: u64, split: &str, count: usize) -> Vec<Sample> {
    let mut samples = Vec::new();
    // Far more problems exist than anyone asks for; the bound only makes the loop's end plain.
    let most_draws = (count as u64).saturating_mul(100).saturating_add(1000);
    let mut seen = std::collections::HashSet::new();
    for draw in 0.. {
        if samples.len() == count || draw > most_draws || interrupt::requested().is_some() {
            break;
        }
        let mut rng = fingerprint::derive_rng(seed, &format!("synthetic/{split}"), draw);
        let (question, answer, meta) =
            if rng.random_range(0..4) == 0 { sql_problem(&mut rng) } else { word_problem(&mut rng) };
        let for_test = blake3::hash(question.as_bytes()).as_bytes()[0] < 26;
        if for_test == (split == "test") && seen.insert(question.clone()) {
            samples.push(Sample {
                id: format!("synthetic-{split}-{seed}-{}", samples.len()),
                source: format!("synthetic/{split}"),
                prompt: Prompt::question(question),
                reference: Some(answer),
                meta,
            });
        }
    }
    samples
}

type Problem = (String, String, Option<serde_json::Value>);

fn word_problem(rng: &mut ChaCha8Rng) -> Problem {
    let name = pick(rng, &NAMES);
    let thing = pick(rng, &THINGS);
    let (question, steps, result) = match rng.random_range(0..5) {
        0 => {
            let (a, b, c) = (rng.random_range(2..50), rng.random_range(2..10), rng.random_range(2..10));
            let boxes = pick(rng, &BOXES);
            (
                format!(
                    "{name} has {a} {thing}. {name} buys {b} {boxes} with {c} {thing} each. How many {thing} does {name} have now?"
                ),
                format!(
                    "{name} buys {b} {boxes} with {c} {thing} each, so {name} buys {b} * {c} = {} {thing}. \
                     {name} had {a} {thing}, so now {name} has {a} + {} = {} {thing}.",
                    b * c,
                    b * c,
                    a + b * c
                ),
                a + b * c,
            )
        }
        1 => {
            let (a, b) = (rng.random_range(20..60), rng.random_range(2..40));
            let c = rng.random_range(1..20);
            let friend = pick(rng, &NAMES);
            (
                format!(
                    "{name} has {a} {thing}. {friend} gives {name} {b} more {thing}. Then {name} loses {c} {thing}. How many {thing} are left?"
                ),
                format!(
                    "{name} has {a} {thing} and gets {b} more {thing}, so {name} has {a} + {b} = {} {thing}. \
                     {name} loses {c} {thing}, so {name} has {} - {c} = {} {thing} left.",
                    a + b,
                    a + b,
                    a + b - c
                ),
                a + b - c,
            )
        }
        2 => {
            let (a, b) = (rng.random_range(2..10), rng.random_range(2..10));
            let c = rng.random_range(1..a * b);
            let boxes = pick(rng, &BOXES);
            (
                format!(
                    "{name} fills {a} {boxes} with {b} {thing} each and sells {c} {thing}. How many {thing} does {name} keep?"
                ),
                format!(
                    "{name} fills {a} {boxes} with {b} {thing} each, so {name} has {a} * {b} = {} {thing}. \
                     {name} sells {c} {thing}, so {name} keeps {} - {c} = {} {thing}.",
                    a * b,
                    a * b,
                    a * b - c
                ),
                a * b - c,
            )
        }
        3 => {
            let (a, b, c) = (rng.random_range(2..30), rng.random_range(2..30), rng.random_range(2..30));
            (
                format!(
                    "{name} finds {a} {thing} on Monday, {b} {thing} on Tuesday and {c} {thing} on Friday. How many {thing} does {name} find in all?"
                ),
                format!(
                    "On Monday and Tuesday {name} finds {a} + {b} = {} {thing}. \
                     With the {thing} of Friday {name} finds {} + {c} = {} {thing} in all.",
                    a + b,
                    a + b,
                    a + b + c
                ),
                a + b + c,
            )
        }
        _ => {
            let (a, b) = (rng.random_range(2..40), rng.random_range(2..30));
            let friend = pick(rng, &NAMES);
            (
                format!(
                    "{name} has {a} {thing}. {friend} has {b} more {thing} than {name}. How many {thing} do they have together?"
                ),
                format!(
                    "{friend} has {b} more {thing} than {name}, so {friend} has {a} + {b} = {} {thing}. \
                     Together they have {a} + {} = {} {thing}.",
                    a + b,
                    a + b,
                    a + a + b
                ),
                a + a + b,
            )
        }
    };
    (question, format!("{steps}\n#### {result}"), None)
}

fn sql_problem(rng: &mut ChaCha8Rng) -> Problem {
    let (table, text, values, number) = TABLES[rng.random_range(0..TABLES.len())];
    let value = pick(rng, &values);
    let limit = rng.random_range(2..90);
    let (wish, query) = match rng.random_range(0..5) {
        0 => (
            format!("How many {table} have the {text} {value}?"),
            format!("SELECT COUNT(*) FROM {table} WHERE {text} = '{value}'"),
        ),
        1 => (
            format!("Show the name of all {table} with {number} above {limit}."),
            format!("SELECT name FROM {table} WHERE {number} > {limit}"),
        ),
        2 => (
            format!("What is the average {number} of {table} with the {text} {value}?"),
            format!("SELECT AVG({number}) FROM {table} WHERE {text} = '{value}'"),
        ),
        3 => (
            format!("Show the name of {table} with the {text} {value} and {number} below {limit}."),
            format!("SELECT name FROM {table} WHERE {text} = '{value}' AND {number} < {limit}"),
        ),
        _ => {
            let count = rng.random_range(2..9);
            (
                format!("Show the name of the {count} {table} with the highest {number}."),
                format!("SELECT name FROM {table} ORDER BY {number} DESC LIMIT {count}"),
            )
        }
    };
    (format!("{table}(name, {text}, {number}). {wish}"), query, Some(json!({ "table": table })))
}

fn pick<'a>(rng: &mut ChaCha8Rng, choices: &[&'a str]) -> &'a str {
    choices.choose(rng).copied().unwrap_or_default()
}

/// A word problem by its number, SQL by what it gives on the table.
pub(super) fn score(sample: &Sample, reference: &str, answer: &str) -> Result<Verdict> {
    let Some(table) = sample.meta.as_ref().and_then(|meta| meta["table"].as_str()) else {
        return Ok(Verdict::of(gsm8k::is_right(reference, answer)));
    };
    let Some(columns) = TABLES.into_iter().find(|entry| entry.0 == table) else {
        let known = TABLES.map(|entry| entry.0).join(", ");
        return Err(Error::usage(format!("prompt `{}`: meta names the table `{table}`; there are {known}", sample.id)));
    };
    let mut database = database(columns).map_err(|error| Error::environment(format!("SQLite: {error}")))?;
    Ok(database.same_result(reference, answer).map_or(Verdict::Unscored, Verdict::of))
}

/// A table of 60 rows, the same on every machine.
fn database((table, text, values, number): (&str, &str, [&str; 4], &str)) -> rusqlite::Result<Database> {
    let connection = Connection::open_in_memory()?;
    connection.execute_batch(&format!("CREATE TABLE {table} (name TEXT, {text} TEXT, {number} INTEGER)"))?;
    let mut rng = fingerprint::derive_rng(0, table, 0);
    for row in 0..60 {
        let (value, amount) = (pick(&mut rng, &values), rng.random_range(1..100));
        connection
            .execute(&format!("INSERT INTO {table} VALUES (?1, ?2, ?3)"), (format!("{table}{row}"), value, amount))?;
    }
    Database::guard(connection, TIME_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{ScoreContext, Task};

    #[test]
    fn every_reference_is_right_and_splits_are_disjoint() {
        let (train, test) = (generate(1, "train", 500), generate(1, "test", 300));
        assert_eq!((train.len(), test.len()), (500, 300));
        for sample in train.iter().chain(&test) {
            let reference = sample.reference.as_deref().unwrap();
            assert_eq!(
                Task::Synthetic.score_complete(ScoreContext::default(), sample, reference).unwrap(),
                Verdict::Correct,
                "{sample:?}"
            );
            assert_eq!(
                Task::Synthetic.score_complete(ScoreContext::default(), sample, "no idea").unwrap(),
                Verdict::Incorrect
            );
        }
        let many = generate(2, "train", 3000);
        assert!(test.iter().all(|a| many.iter().all(|b| a.prompt != b.prompt)));
        assert_eq!(generate(1, "train", 500), train);
    }

    #[test]
    fn sql_is_judged_by_its_result_and_cannot_do_harm() {
        let sample = |reference: &str| Sample {
            id: "a".into(),
            source: "synthetic/test".into(),
            prompt: Prompt::Text(String::new()),
            reference: Some(reference.into()),
            meta: Some(json!({ "table": "pets" })),
        };
        let count = sample("SELECT COUNT(*) FROM pets WHERE kind = 'cat'");
        let score = |sample: &Sample, answer: &str| {
            Task::Synthetic.score_complete(ScoreContext::default(), sample, answer).unwrap()
        };
        assert_eq!(score(&count, "select count(name) from pets where kind='cat';"), Verdict::Correct);
        assert_eq!(score(&count, "SELECT COUNT(*) FROM pets WHERE kind = 'dog'"), Verdict::Incorrect);
        assert_eq!(score(&count, "DROP TABLE pets"), Verdict::Incorrect);
        let endless = "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t) SELECT COUNT(*) FROM t";
        assert_eq!(score(&count, endless), Verdict::Incorrect);
        assert_eq!(score(&count, "ATTACH 'x' AS y"), Verdict::Incorrect);
        let table = sample("PRAGMA table_info(pets)");
        assert_eq!(
            score(&table, "PRAGMA table_info(pets)"),
            Verdict::Unscored,
            "the authorizer allows plain reading only"
        );
        let ordered = sample("SELECT name FROM pets ORDER BY age DESC LIMIT 3");
        assert_eq!(score(&ordered, "SELECT name FROM pets ORDER BY age ASC LIMIT 3"), Verdict::Incorrect);
        let astray = Sample { meta: Some(json!({ "table": "cats" })), ..count };
        let error =
            Task::Synthetic.score_complete(ScoreContext::default(), &astray, "SELECT 1").unwrap_err().to_string();
        assert!(error.contains("`a`") && error.contains("`cats`"), "{error}");
    }
}
