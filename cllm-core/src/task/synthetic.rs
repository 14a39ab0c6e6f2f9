//! Problems made from a seed, in GSM8K's form and as text to SQL: small enough for a model of a few million parameters,
//! checkable, and shipped with the toolkit so that nothing has to be downloaded.

use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use rusqlite::Connection;
use serde_json::json;

use super::gsm8k;
use crate::fingerprint;
use crate::prompt_set::{Prompt, Sample};

/// Samples of a split where no count is given.
pub const DEFAULT_COUNT: usize = 2000;

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

/// `count` samples of a split. Splits are disjoint: a problem belongs to `test` or to the others by its own hash.
pub fn generate(seed: u64, split: &str, count: usize) -> Vec<Sample> {
    let mut samples = Vec::with_capacity(count);
    let mut seen = std::collections::HashSet::new();
    for draw in 0.. {
        // Far more problems exist than anyone asks for; the bound only makes the loop's end plain.
        if samples.len() == count || draw > 1000 + 100 * count as u64 {
            break;
        }
        let mut rng = fingerprint::rng(seed, &format!("synthetic/{split}"), draw);
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
pub(super) fn is_right(sample: &Sample, reference: &str, answer: &str) -> bool {
    match sample.meta.as_ref().and_then(|meta| meta["table"].as_str()) {
        None => gsm8k::is_right(reference, answer),
        Some(table) => same_result(table, reference, answer).unwrap_or(false),
    }
}

fn same_result(table: &str, gold: &str, answer: &str) -> rusqlite::Result<bool> {
    let database = database(table)?;
    let (mut wanted, mut found) = (rows(&database, gold)?, rows(&database, answer)?);
    if !gold.contains("ORDER BY") {
        wanted.sort();
        found.sort();
    }
    Ok(wanted == found)
}

/// The rows of a query as text; only one reading statement is run, and only so many steps of it.
fn rows(database: &Connection, query: &str) -> rusqlite::Result<Vec<Vec<String>>> {
    let mut statement = database.prepare(query.trim().trim_end_matches(';'))?;
    if !statement.readonly() {
        return Err(rusqlite::Error::InvalidQuery);
    }
    let columns = statement.column_count();
    let mut found = statement.query([])?;
    let mut rows = Vec::new();
    while let Some(row) = found.next()? {
        let value = |index| row.get::<_, rusqlite::types::Value>(index).map(|value| format!("{value:?}"));
        rows.push((0..columns).map(value).collect::<rusqlite::Result<_>>()?);
    }
    Ok(rows)
}

/// A table of 60 rows, the same on every machine.
fn database(table: &str) -> rusqlite::Result<Connection> {
    let (table, text, values, number) =
        TABLES.into_iter().find(|entry| entry.0 == table).ok_or(rusqlite::Error::InvalidQuery)?;
    let mut database = Connection::open_in_memory()?;
    database.execute_batch(&format!("CREATE TABLE {table} (name TEXT, {text} TEXT, {number} INTEGER)"))?;
    let mut rng = fingerprint::rng(0, table, 0);
    for row in 0..60 {
        let (value, amount) = (pick(&mut rng, &values), rng.random_range(1..100));
        database
            .execute(&format!("INSERT INTO {table} VALUES (?1, ?2, ?3)"), (format!("{table}{row}"), value, amount))?;
    }
    // An endless query ends after a million steps of SQLite's machine.
    let mut steps = 0;
    database.progress_handler(
        1000,
        Some(move || {
            steps += 1;
            steps > 1000
        }),
    )?;
    Ok(database)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{Task, Verdict};

    #[test]
    fn every_reference_is_right_and_splits_are_disjoint() {
        let (train, test) = (generate(1, "train", 500), generate(1, "test", 300));
        assert_eq!((train.len(), test.len()), (500, 300));
        for sample in train.iter().chain(&test) {
            let reference = sample.reference.as_deref().unwrap();
            assert_eq!(Task::Synthetic.score(sample, reference), Verdict::Right, "{sample:?}");
            assert_eq!(Task::Synthetic.score(sample, "no idea"), Verdict::Wrong);
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
        let score = |sample: &Sample, answer: &str| Task::Synthetic.score(sample, answer);
        assert_eq!(score(&count, "select count(name) from pets where kind='cat';"), Verdict::Right);
        assert_eq!(score(&count, "SELECT COUNT(*) FROM pets WHERE kind = 'dog'"), Verdict::Wrong);
        assert_eq!(score(&count, "DROP TABLE pets"), Verdict::Wrong);
        let endless = "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t) SELECT COUNT(*) FROM t";
        assert_eq!(score(&count, endless), Verdict::Wrong);
        let ordered = sample("SELECT name FROM pets ORDER BY age DESC LIMIT 3");
        assert_eq!(score(&ordered, "SELECT name FROM pets ORDER BY age ASC LIMIT 3"), Verdict::Wrong);
    }
}
