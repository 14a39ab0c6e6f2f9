//! Problems generated from a seed: word problems in GSM8K's form, and text to SQL. They are easy
//! enough for a model of a few million parameters, and need no download.
//!
//! ```text
//! prompt  Tom has 7 pens. Tom buys 2 boxes with 3 pens each. How many pens does Tom have now?
//! target  Tom buys 2 boxes with 3 pens each, so Tom buys 2 * 3 = 6 pens.
//!         Tom had 7 pens, so now Tom has 7 + 6 = 13 pens.
//!         #### 13
//! score   as GSM8K: the final number is 13
//!
//! prompt  pets(name, kind, age). How many pets have the kind cat?
//! target  SELECT COUNT(*) FROM pets WHERE kind = 'cat'
//! score   as Spider: the same rows from a generated table
//! ```

use std::cell::RefCell;
use std::collections::HashSet;
use std::time::Duration;

use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::number::same_final_number;
use super::sql::{self, Databases};
use super::verdict::Verdict;
use crate::prompt_set::{Prompt, Sample};
use crate::{Error, Result, fingerprint, interrupt};

/// Number of samples of a split unless the user asks for another.
pub const DEFAULT_NUM_PROBLEMS: usize = 2000;
/// No sensible query on such a small table needs longer.
const TIME_LIMIT: Duration = Duration::from_secs(1);

const NAMES: [&str; 12] = ["Tom", "Ann", "Ben", "Eva", "Sam", "Mia", "Leo", "Zoe", "Max", "Ida", "Jim", "Amy"];
const THINGS: [&str; 10] =
    ["apples", "pens", "books", "cards", "coins", "eggs", "shells", "stamps", "marbles", "cookies"];
const BOXES: [&str; 4] = ["bags", "boxes", "baskets", "packs"];
const NUM_TABLE_ROWS: usize = 60;

/// A table with a name, a text and a number in each row.
struct Table {
    name: &'static str,
    text_column: &'static str,
    values: [&'static str; 4],
    number_column: &'static str,
}

#[rustfmt::skip]
const TABLES: [Table; 6] = [
    Table { name: "pets", text_column: "kind", values: ["cat", "dog", "bird", "fish"], number_column: "age" },
    Table { name: "cars", text_column: "color", values: ["red", "blue", "green", "black"], number_column: "price" },
    Table { name: "books", text_column: "genre", values: ["drama", "poetry", "history", "crime"], number_column: "pages" },
    Table { name: "songs", text_column: "style", values: ["rock", "jazz", "folk", "blues"], number_column: "seconds" },
    Table { name: "trees", text_column: "species", values: ["oak", "pine", "birch", "maple"], number_column: "height" },
    Table { name: "rooms", text_column: "floor", values: ["ground", "first", "second", "third"], number_column: "seats" },
];

const SPLITS: [&str; 2] = ["train", "test"];

/// A generated problem, before it becomes a sample.
struct Problem {
    question: String,
    answer: String,
    /// Name of the table that the query reads; `None` for a word problem.
    table: Option<&'static str>,
}

/// The samples of a split, as [`generate`] makes them.
///
/// # Errors
/// [`Error::Usage`] for a split that there is not.
pub fn load(seed: u64, split: &str, count: usize) -> Result<Vec<Sample>> {
    if !SPLITS.contains(&split) {
        let message = format!("synthetic has no split `{split}`: choose one of {}", SPLITS.join(", "));
        return Err(Error::usage(message));
    }
    Ok(generate(seed, split, count))
}

/// Generates `count` samples of a split. Splits are disjoint: the hash of a question decides
/// whether it belongs to `test`. Returns fewer samples when a signal asks to stop, which the caller
/// has to check.
pub fn generate(seed: u64, split: &str, count: usize) -> Vec<Sample> {
    let mut samples = Vec::new();
    // There are far more problems than anyone asks for; the bound guarantees that the loop ends.
    let max_draws = (count as u64).saturating_mul(100).saturating_add(1000);
    let mut seen = HashSet::new();
    for draw in 0..=max_draws {
        if samples.len() == count || interrupt::requested().is_some() {
            break;
        }
        let mut rng = fingerprint::derive_rng(seed, &format!("synthetic/{split}"), draw);
        let problem = if rng.random_range(0..4) == 0 { sql_problem(&mut rng) } else { word_problem(&mut rng) };
        let is_for_test = blake3::hash(problem.question.as_bytes()).as_bytes()[0] < 26;
        if is_for_test == (split == "test") && seen.insert(problem.question.clone()) {
            samples.push(Sample {
                id: format!("synthetic-{split}-{seed}-{}", samples.len()),
                source: format!("synthetic/{split}"),
                prompt: Prompt::question(problem.question),
                reference: Some(problem.answer),
                meta: problem.table.map(|table| json!({ "table": table })),
            });
        }
    }
    samples
}

fn word_problem(rng: &mut ChaCha8Rng) -> Problem {
    let name = pick(rng, &NAMES);
    let thing = pick(rng, &THINGS);
    let Story { question, steps, result } = match rng.random_range(0..5) {
        0 => buying(rng, name, thing),
        1 => getting_and_losing(rng, name, thing),
        2 => filling_and_selling(rng, name, thing),
        3 => finding(rng, name, thing),
        _ => comparing(rng, name, thing),
    };
    Problem { question, answer: format!("{steps}\n#### {result}"), table: None }
}

/// A word problem with its solution.
struct Story {
    question: String,
    steps: String,
    result: i32,
}

fn buying(rng: &mut ChaCha8Rng, name: &str, thing: &str) -> Story {
    let (a, b, c) = (rng.random_range(2..50), rng.random_range(2..10), rng.random_range(2..10));
    let boxes = pick(rng, &BOXES);
    let (bought, result) = (b * c, a + b * c);
    Story {
        question: format!(
            "{name} has {a} {thing}. {name} buys {b} {boxes} with {c} {thing} each. \
             How many {thing} does {name} have now?"
        ),
        steps: format!(
            "{name} buys {b} {boxes} with {c} {thing} each, so {name} buys {b} * {c} = {bought} {thing}. \
             {name} had {a} {thing}, so now {name} has {a} + {bought} = {result} {thing}."
        ),
        result,
    }
}

fn getting_and_losing(rng: &mut ChaCha8Rng, name: &str, thing: &str) -> Story {
    let (a, b) = (rng.random_range(20..60), rng.random_range(2..40));
    let c = rng.random_range(1..20);
    let friend = pick(rng, &NAMES);
    let (sum, result) = (a + b, a + b - c);
    Story {
        question: format!(
            "{name} has {a} {thing}. {friend} gives {name} {b} more {thing}. Then {name} loses {c} {thing}. \
             How many {thing} are left?"
        ),
        steps: format!(
            "{name} has {a} {thing} and gets {b} more {thing}, so {name} has {a} + {b} = {sum} {thing}. \
             {name} loses {c} {thing}, so {name} has {sum} - {c} = {result} {thing} left."
        ),
        result,
    }
}

fn filling_and_selling(rng: &mut ChaCha8Rng, name: &str, thing: &str) -> Story {
    let (a, b) = (rng.random_range(2..10), rng.random_range(2..10));
    let c = rng.random_range(1..a * b);
    let boxes = pick(rng, &BOXES);
    let (all, result) = (a * b, a * b - c);
    Story {
        question: format!(
            "{name} fills {a} {boxes} with {b} {thing} each and sells {c} {thing}. \
             How many {thing} does {name} keep?"
        ),
        steps: format!(
            "{name} fills {a} {boxes} with {b} {thing} each, so {name} has {a} * {b} = {all} {thing}. \
             {name} sells {c} {thing}, so {name} keeps {all} - {c} = {result} {thing}."
        ),
        result,
    }
}

fn finding(rng: &mut ChaCha8Rng, name: &str, thing: &str) -> Story {
    let (a, b, c) = (rng.random_range(2..30), rng.random_range(2..30), rng.random_range(2..30));
    let (sum, result) = (a + b, a + b + c);
    Story {
        question: format!(
            "{name} finds {a} {thing} on Monday, {b} {thing} on Tuesday and {c} {thing} on Friday. \
             How many {thing} does {name} find in all?"
        ),
        steps: format!(
            "On Monday and Tuesday {name} finds {a} + {b} = {sum} {thing}. \
             With the {thing} of Friday {name} finds {sum} + {c} = {result} {thing} in all."
        ),
        result,
    }
}

fn comparing(rng: &mut ChaCha8Rng, name: &str, thing: &str) -> Story {
    let (a, b) = (rng.random_range(2..40), rng.random_range(2..30));
    let friend = pick(rng, &NAMES);
    let (more, result) = (a + b, a + a + b);
    Story {
        question: format!(
            "{name} has {a} {thing}. {friend} has {b} more {thing} than {name}. \
             How many {thing} do they have together?"
        ),
        steps: format!(
            "{friend} has {b} more {thing} than {name}, so {friend} has {a} + {b} = {more} {thing}. \
             Together they have {a} + {more} = {result} {thing}."
        ),
        result,
    }
}

fn sql_problem(rng: &mut ChaCha8Rng) -> Problem {
    let Table { name: table, text_column: text, values, number_column: number } =
        &TABLES[rng.random_range(0..TABLES.len())];
    let value = pick(rng, values);
    let limit = rng.random_range(2..90);
    let (request, query) = match rng.random_range(0..5) {
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
    let question = format!("{table}(name, {text}, {number}). {request}");
    Problem { question, answer: query, table: Some(table) }
}

fn pick<'a>(rng: &mut ChaCha8Rng, choices: &[&'a str]) -> &'a str {
    choices.choose(rng).copied().expect("there is something to choose from")
}

/// Scores a word problem by its number, and a query by its result on the table.
pub(super) fn score(sample: &Sample, reference: &str, answer: &str) -> Result<Verdict> {
    let Some(name) = sample.meta.as_ref().and_then(|meta| meta["table"].as_str()) else {
        return Ok(Verdict::from_correct(same_final_number(reference, answer)));
    };
    let Some(table) = TABLES.iter().position(|table| table.name == name) else {
        let known = TABLES.map(|table| table.name).join(", ");
        let id = &sample.id;
        return Err(Error::usage(format!(
            "prompt `{id}`: meta has the unknown table `{name}`; the tables are {known}"
        )));
    };
    DATABASES.with_borrow_mut(|open| {
        let databases = match open {
            Some(databases) => databases,
            None => open.insert(Databases::from_scripts(TABLES.iter().map(script).collect(), TIME_LIMIT)?),
        };
        Ok(sql::compare(databases, table..table + 1, reference, answer)?.ignore_distinct)
    })
}

thread_local! {
    /// A database for each table, as starting a process for every query would take longer than the
    /// queries do. The process ends with the thread that started it.
    static DATABASES: RefCell<Option<Databases>> = const { RefCell::new(None) };
}

/// The statements that make and fill a table, the same on every machine.
fn script(table: &Table) -> String {
    let Table { name, text_column, values, number_column } = table;
    let mut rng = fingerprint::derive_rng(0, name, 0);
    let row = |row: usize| {
        let (value, number) = (pick(&mut rng, values), rng.random_range(1..100));
        format!("('{name}{row}', '{value}', {number})")
    };
    let rows: Vec<String> = (0..NUM_TABLE_ROWS).map(row).collect();
    format!(
        "CREATE TABLE {name} (name TEXT, {text_column} TEXT, {number_column} INTEGER); INSERT INTO {name} VALUES {}",
        rows.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{ScoreContext, Task};

    #[test]
    fn a_split_that_there_is_not_is_refused_with_those_there_are() {
        let message = load(0, "tset", 1).unwrap_err().to_string();
        assert!(message.contains("no split `tset`: choose one of train, test"), "{message}");
        assert_eq!(load(0, "test", 2).unwrap().len(), 2);
    }

    #[test]
    fn every_reference_is_correct_and_splits_are_disjoint() {
        let (train, test) = (generate(1, "train", 500), generate(1, "test", 300));
        assert_eq!((train.len(), test.len()), (500, 300));
        for sample in train.iter().chain(&test) {
            let reference = sample.reference.as_deref().unwrap();
            assert_eq!(
                Task::Synthetic.score_complete(ScoreContext::default(), sample, reference).unwrap().verdict,
                Verdict::Correct,
                "{sample:?}"
            );
            assert_eq!(
                Task::Synthetic.score_complete(ScoreContext::default(), sample, "no idea").unwrap().verdict,
                Verdict::Incorrect
            );
        }
        let others = generate(2, "train", 3000);
        assert!(test.iter().all(|a| others.iter().all(|b| a.prompt != b.prompt)));
        assert_eq!(generate(1, "train", 500), train);
    }

    #[test]
    fn queries_are_scored_by_their_result_and_cannot_do_harm() {
        let sample = |reference: &str| Sample {
            id: "a".into(),
            source: "synthetic/test".into(),
            prompt: Prompt::Text(String::new()),
            reference: Some(reference.into()),
            meta: Some(json!({ "table": "pets" })),
        };
        let count = sample("SELECT COUNT(*) FROM pets WHERE kind = 'cat'");
        let score = |sample: &Sample, answer: &str| {
            Task::Synthetic.score_complete(ScoreContext::default(), sample, answer).unwrap().verdict
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
            "the authorizer allows only plain reading"
        );
        let ordered = sample("SELECT name FROM pets ORDER BY age DESC LIMIT 3");
        assert_eq!(score(&ordered, "SELECT name FROM pets ORDER BY age ASC LIMIT 3"), Verdict::Incorrect);
        let broken = Sample { meta: Some(json!({ "table": "cats" })), ..count };
        let error =
            Task::Synthetic.score_complete(ScoreContext::default(), &broken, "SELECT 1").unwrap_err().to_string();
        assert!(error.contains("`a`") && error.contains("`cats`"), "{error}");
    }
}
