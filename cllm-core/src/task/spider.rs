//! Spider: a question and a database's schema, answered by a query, scored by executing it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;

use super::Verdict;
use super::sql::Database;
use crate::prompt_set::dataset_file;
use crate::prompt_set::{Prompt, Sample};
use crate::{Error, Result, fingerprint};

/// Questions of the split `heldout`, at least.
const HELD_OUT: usize = 700;

#[derive(Deserialize)]
struct Row {
    db_id: String,
    question: String,
    query: String,
}

/// A database as `tables.json` describes it.
#[derive(Deserialize)]
struct Schema {
    db_id: String,
    table_names_original: Vec<String>,
    /// Index of the table (-1 for `*`) and name.
    column_names_original: Vec<(i64, String)>,
    /// Pairs of column indices.
    foreign_keys: Vec<(usize, usize)>,
}

impl Schema {
    fn text(&self) -> String {
        let mut text = String::new();
        for (index, table) in self.table_names_original.iter().enumerate() {
            let columns: Vec<&str> = self
                .column_names_original
                .iter()
                .filter(|(owner, _)| usize::try_from(*owner) == Ok(index))
                .map(|(_, name)| name.as_str())
                .collect();
            text.push_str(&format!("{table}({})\n", columns.join(", ")));
        }
        let keys: Vec<String> = self
            .foreign_keys
            .iter()
            .filter_map(|&(from, to)| Some(format!("{} = {}", self.column(from)?, self.column(to)?)))
            .collect();
        if !keys.is_empty() {
            text.push_str(&format!("foreign keys: {}\n", keys.join(", ")));
        }
        text
    }

    fn column(&self, index: usize) -> Option<String> {
        let (table, name) = self.column_names_original.get(index)?;
        Some(format!("{}.{name}", self.table_names_original.get(usize::try_from(*table).ok()?)?))
    }
}

pub(super) fn load(data: &Path, split: &str) -> Result<Vec<Sample>> {
    let stems: &[&str] = match split {
        "train" | "heldout" | "rest" => &["train_spider", "train", "spider/train", "data/train"],
        "dev" | "validation" => &["dev", "validation", "spider/validation", "data/validation"],
        "test" => &["test"],
        other => {
            let splits = "train, dev and test, and heldout and rest, which are two parts of train";
            return Err(Error::usage(format!("spider has the splits {splits}, not `{other}`")));
        }
    };
    let questions: Vec<Row> = dataset_file::read(data, stems)?;
    let tables = data.join("tables.json");
    if !tables.is_file() {
        return Err(Error::file(
            &tables,
            "is missing: the prompts are made from the schemas in it. It comes with Spider's own archive, spider_data.zip \
             (https://yale-lily.github.io/spider), as do the databases; the Hugging Face form has neither: put them beside it",
        ));
    }
    let schemas: Vec<Schema> = dataset_file::read(&tables, &[])?;
    let schemas: HashMap<&str, String> = schemas.iter().map(|schema| (schema.db_id.as_str(), schema.text())).collect();
    let held_out = if ["heldout", "rest"].contains(&split) { held_out(data, &questions) } else { BTreeSet::new() };
    // A question keeps its number in train.
    let stem = if stems.contains(&"train") { "train" } else { split };
    let chosen = |(_, row): &(usize, Row)| match split {
        "heldout" => held_out.contains(&pair(row)),
        "rest" => !held_out.contains(&pair(row)),
        _ => true,
    };
    let sample = |(index, row): (usize, Row)| {
        let schema = schemas.get(row.db_id.as_str()).ok_or_else(|| {
            Error::file(&tables, format!("has no database `{}`, which row {} of {split} asks", row.db_id, index + 1))
        })?;
        let question = row.question.trim();
        Ok(Sample {
            id: format!("spider-{stem}-{index}"),
            source: format!("spider/{split}"),
            prompt: Prompt::question(format!("{schema}\n{question}\nAnswer with one SQLite query only.")),
            reference: Some(row.query.trim().to_owned()),
            meta: Some(json!({ "db_id": row.db_id })),
        })
    };
    questions.into_iter().enumerate().filter(chosen).map(sample).collect()
}

/// A database and a query, spaces aside.
fn pair(row: &Row) -> (String, String) {
    (row.db_id.clone(), row.query.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// The pairs of train that `heldout` asks and `rest` does not, so that what is learnt from the rest was seen neither in the words of another
/// question: drawn from a fixed seed, among those whose database is there to score them.
fn held_out(data: &Path, questions: &[Row]) -> BTreeSet<(String, String)> {
    let there = |row: &&Row| data.join("database").join(&row.db_id).is_dir();
    let mut pairs: BTreeMap<(String, String), usize> = BTreeMap::new();
    questions.iter().filter(there).for_each(|row| *pairs.entry(pair(row)).or_default() += 1);
    let mut drawn: Vec<_> = pairs.into_iter().collect();
    drawn.sort_by_key(|((database, query), _)| fingerprint::derive_seed(0, &format!("{database}\n{query}")));
    let mut rows = 0;
    let before = |(_, count): &((String, String), usize)| {
        let more = rows < HELD_OUT;
        rows += count;
        more
    };
    drawn.into_iter().take_while(before).map(|(pair, _)| pair).collect()
}

/// The file of a sample's database: `DATA/database/ID/ID.sqlite`.
///
/// # Errors
/// When `meta` names none, or it is missing.
pub(super) fn database(data: &Path, sample: &Sample) -> Result<PathBuf> {
    let name = sample.meta.as_ref().and_then(|meta| meta["db_id"].as_str());
    // The name becomes a path: nothing that leads out of the folder.
    let Some(name) = name.filter(|name| !name.is_empty() && !name.contains(['/', '\\']) && !name.starts_with('.'))
    else {
        return Err(Error::usage(format!("prompt `{}`: meta has no usable `db_id`; prepare Spider again", sample.id)));
    };
    let path = data.join("database").join(name).join(format!("{name}.sqlite"));
    if !path.is_file() {
        let advice = "point the data folder at all databases of Spider, or leave its questions out";
        return Err(Error::file(path, format!("prompt `{}`: its database is missing: {advice}", sample.id)));
    }
    Ok(path)
}

/// Runs both queries; a gold query that does not run leaves the answer unscored.
pub(super) fn score(data: &Path, sample: &Sample, gold: &str, answer: &str) -> Result<Verdict> {
    let mut database = Database::open(&database(data, sample)?)?;
    Ok(database.same_result(gold, answer).map_or(Verdict::Unscored, Verdict::of))
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;
    use crate::task::{ScoreContext, Task};

    #[test]
    fn prompts_show_the_schema_and_answers_are_executed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("database/zoo");
        std::fs::create_dir_all(&folder).unwrap();
        let database = rusqlite::Connection::open(folder.join("zoo.sqlite")).unwrap();
        database.execute_batch("CREATE TABLE pen (id, size); INSERT INTO pen VALUES (1, 5), (2, 9);").unwrap();
        let row = r#"{"db_id": "zoo", "question": "How many pens?", "query": "SELECT count(*) FROM pen"}"#;
        std::fs::write(dir.path().join("dev.json"), format!("[{row}]")).unwrap();
        let error = load(dir.path(), "dev").unwrap_err().to_string();
        assert!(error.contains("tables.json") && error.contains("spider_data.zip"), "{error}");
        let schema = r#"[{"db_id": "zoo", "table_names_original": ["pen", "cat"], "foreign_keys": [[4, 1]],
            "column_names_original": [[-1, "*"], [0, "id"], [0, "size"], [1, "name"], [1, "pen"]]}]"#;
        std::fs::write(dir.path().join("tables.json"), schema).unwrap();
        let samples = load(dir.path(), "dev").unwrap();
        let Prompt::Messages(messages) = &samples[0].prompt else { panic!("messages expected") };
        assert!(
            messages[0]
                .content
                .starts_with("pen(id, size)\ncat(name, pen)\nforeign keys: cat.pen = pen.id\n\nHow many pens?")
        );
        let judge = ScoreContext { data: Some(dir.path()), sandbox: None };
        let score = |answer: &str| Task::Spider.score_complete(judge, &samples[0], answer);
        assert_eq!(score("SELECT 2").unwrap(), Verdict::Correct);
        assert_eq!(score("SELECT 3").unwrap(), Verdict::Incorrect);
        assert_eq!(
            Task::Spider.score_complete(ScoreContext::default(), &samples[0], "SELECT 2").unwrap(),
            Verdict::Unscored
        );
        let mut astray = samples[0].clone();
        astray.meta = Some(json!({ "db_id": "../zoo" }));
        assert!(Task::Spider.score_complete(judge, &astray, "SELECT 2").is_err());
        astray.meta = Some(json!({ "db_id": "aquarium" }));
        let error = Task::Spider.check_scorable(judge, &astray).unwrap_err().to_string();
        assert!(error.contains("aquarium.sqlite") && error.contains("spider-dev-0"), "{error}");
        Task::Spider.check_scorable(judge, &samples[0]).unwrap();
        assert!(load(dir.path(), "nosuch").is_err());
        // Questions of the same pair stay together, whatever the spaces.
        let row = |index: usize, space: &str| {
            format!(r#"{{"db_id": "zoo", "question": "q{index}", "query": "SELECT{space}{}"}}"#, index / 2)
        };
        let rows = (0..3000).map(|index| row(index, [" ", "  "][index % 2])).collect::<Vec<_>>().join("\n");
        std::fs::write(dir.path().join("train.jsonl"), rows).unwrap();
        let numbers = |split: &str| -> BTreeSet<String> {
            load(dir.path(), split).unwrap().into_iter().map(|sample| sample.id).collect()
        };
        let (held_out, rest, all) = (numbers("heldout"), numbers("rest"), numbers("train"));
        assert_eq!((held_out.len(), rest.len()), (HELD_OUT, 3000 - HELD_OUT));
        assert!(held_out.is_disjoint(&rest) && held_out.union(&rest).eq(&all));
        let twin = |id: &String| format!("spider-train-{}", id[13..].parse::<usize>().unwrap() ^ 1);
        assert!(held_out.iter().all(|id| held_out.contains(&twin(id))));
        assert_eq!(load(dir.path(), "heldout").unwrap()[0].source, "spider/heldout");
    }

    #[test]
    fn every_real_gold_query_matches_itself() {
        let Some(data) = std::env::var_os("CLLM_DATA") else {
            println!("skipped: CLLM_DATA is not set");
            return;
        };
        let data = Path::new(&data).join("spider");
        let judge = ScoreContext { data: Some(&data), sandbox: None };
        // In train, 96 rows ask databases that the folder lacks, and three queries do not run.
        let faulty = ["spider-train-3153", "spider-train-4513", "spider-train-4514"];
        for (split, count, scored, faulty) in [("dev", 1034, 1034, &[][..]), ("train", 7000, 6904, &faulty)] {
            let samples = load(&data, split).unwrap();
            assert_eq!(samples.len(), count);
            let there = |sample: &&Sample| Task::Spider.check_scorable(judge, sample).is_ok();
            let verdict = |sample: &Sample| {
                let gold = sample.reference.as_deref().unwrap();
                (sample.id.clone(), Task::Spider.score_complete(judge, sample, gold).unwrap())
            };
            let found: Vec<_> = samples.par_iter().filter(there).map(verdict).collect();
            assert_eq!(found.len(), scored);
            let other: Vec<_> = found.into_iter().filter(|(_, verdict)| *verdict != Verdict::Correct).collect();
            assert_eq!(other, faulty.iter().map(|id| ((*id).to_owned(), Verdict::Unscored)).collect::<Vec<_>>());
        }
    }
}
