//! Spider: text to SQL, scored by executing the query.
//!
//! ```text
//! row     {"db_id": "zoo", "question": "How many pens?", "query": "SELECT count(*) FROM pen"}
//! prompt  pen(id, size)
//!         cat(name, pen)
//!         foreign keys: cat.pen = pen.id
//!
//!         How many pens?
//!         Answer with one SQLite query only.
//! target  SELECT count(*) FROM pen
//! score   the same rows from every database/zoo/*.sqlite, in order if the reference has ORDER BY
//! ```
//!
//! The official judge is <https://github.com/taoyds/test-suite-sql-eval>. Its test suites are further
//! databases beside the published one, in the same folder.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;

use super::sql::{self, Databases};
use super::verdict::{Metric, Score};
use crate::prompt_set::{Prompt, Sample, dataset_file};
use crate::{Error, Result, fingerprint};

/// The split `heldout` has at least this many questions.
const MIN_HELDOUT: usize = 700;

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
    /// Index of the table (-1 for `*`) and name of the column.
    column_names_original: Vec<(i64, String)>,
    /// Pairs of column indices.
    foreign_keys: Vec<(usize, usize)>,
}

impl Schema {
    /// `table(column, ...)`, one a line, and the foreign keys.
    fn to_prompt(&self) -> String {
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
            .filter_map(|&(from, to)| Some(format!("{} = {}", self.column_name(from)?, self.column_name(to)?)))
            .collect();
        if !keys.is_empty() {
            text.push_str(&format!("foreign keys: {}\n", keys.join(", ")));
        }
        text
    }

    /// `table.column`.
    fn column_name(&self, index: usize) -> Option<String> {
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
            let splits = "train, dev and test, and heldout and rest, into which train is divided";
            return Err(Error::usage(format!("spider has the splits {splits}, not `{other}`")));
        }
    };
    let questions: Vec<Row> = dataset_file::read(data, stems)?;
    let tables = data.join("tables.json");
    let schemas = load_schemas(&tables)?;
    let heldout = if ["heldout", "rest"].contains(&split) { draw_heldout(data, &questions) } else { BTreeSet::new() };
    // A question of `heldout` or `rest` keeps its number in train.
    let stem = if stems.contains(&"train") { "train" } else { split };
    let is_in_split = |(_, row): &(usize, Row)| match split {
        "heldout" => heldout.contains(&query_key(row)),
        "rest" => !heldout.contains(&query_key(row)),
        _ => true,
    };
    let sample = |(index, row): (usize, Row)| {
        let schema = schemas.get(&row.db_id).ok_or_else(|| {
            Error::file(&tables, format!("has no database `{}`, which row {} of {split} needs", row.db_id, index + 1))
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
    questions.into_iter().enumerate().filter(is_in_split).map(sample).collect()
}

/// The schema of each database as prompts show it.
fn load_schemas(tables: &Path) -> Result<HashMap<String, String>> {
    if !tables.is_file() {
        return Err(Error::file(
            tables,
            "is missing: the prompts are made from the schemas in it. It comes with Spider's own archive, spider_data.zip \
             (https://yale-lily.github.io/spider), as do the databases; the Hugging Face form has neither: put them beside it",
        ));
    }
    let schemas: Vec<Schema> = dataset_file::read(tables, &[])?;
    Ok(schemas.into_iter().map(|schema| (schema.db_id.clone(), schema.to_prompt())).collect())
}

/// A database and a query with normalised white space.
type QueryKey = (String, String);

fn query_key(row: &Row) -> QueryKey {
    (row.db_id.clone(), row.query.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// The queries of train that belong to `heldout`, drawn with a fixed seed among those whose
/// database exists. Whole queries are drawn, not questions: `rest` must not teach the answer to a
/// held-out question that is worded differently.
fn draw_heldout(data: &Path, questions: &[Row]) -> BTreeSet<QueryKey> {
    let has_database = |row: &&Row| data.join("database").join(&row.db_id).is_dir();
    let mut num_questions: BTreeMap<QueryKey, usize> = BTreeMap::new();
    questions.iter().filter(has_database).for_each(|row| *num_questions.entry(query_key(row)).or_default() += 1);
    let mut shuffled: Vec<_> = num_questions.into_iter().collect();
    shuffled.sort_by_key(|((database, query), _)| fingerprint::derive_seed(0, &format!("{database}\n{query}")));
    let mut drawn = 0;
    let mut heldout = BTreeSet::new();
    for (key, count) in shuffled {
        if drawn >= MIN_HELDOUT {
            break;
        }
        drawn += count;
        heldout.insert(key);
    }
    heldout
}

/// The files of a sample's database: all `DATA/database/ID/*.sqlite`. Several are a test suite.
///
/// # Errors
/// When `meta` names no database, or the folder has no such file.
pub(super) fn database_paths(data: &Path, sample: &Sample) -> Result<Vec<PathBuf>> {
    let name = sample.meta.as_ref().and_then(|meta| meta["db_id"].as_str());
    // The name becomes part of a path, which must not lead outside the folder.
    let Some(name) = name.filter(|name| !name.is_empty() && !name.contains(['/', '\\']) && !name.starts_with('.'))
    else {
        return Err(Error::usage(format!("prompt `{}`: meta has no valid `db_id`: prepare Spider again", sample.id)));
    };
    let folder = data.join("database").join(name);
    let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
    let is_database = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "sqlite");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_database).collect();
    paths.sort();
    if paths.is_empty() {
        let path = folder.join(format!("{name}.sqlite"));
        let advice = "use a data folder with all of the databases of Spider, or remove these questions";
        return Err(Error::file(path, format!("prompt `{}`: its database is missing: {advice}", sample.id)));
    }
    Ok(paths)
}

/// Runs both queries on every database of the sample.
pub(super) fn score(data: &Path, sample: &Sample, reference: &str, answer: &str, keep_distinct: bool) -> Result<Score> {
    let paths = database_paths(data, sample)?;
    let databases = Databases::open(&paths)?;
    let results = sql::compare(&databases, 0..paths.len(), reference, answer)?;
    Ok(if keep_distinct {
        Score::with_alternative(results.keep_distinct, Metric::IgnoreDistinct, results.ignore_distinct)
    } else {
        Score::with_alternative(results.ignore_distinct, Metric::KeepDistinct, results.keep_distinct)
    })
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;
    use crate::chat_template::Conversation;
    use crate::task::{ScoreContext, Task, Verdict};

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
        let Prompt::Conversation(Conversation { messages, .. }) = &samples[0].prompt else {
            panic!("a conversation expected")
        };
        assert!(
            messages[0]
                .content
                .starts_with("pen(id, size)\ncat(name, pen)\nforeign keys: cat.pen = pen.id\n\nHow many pens?")
        );
        let context = ScoreContext { data: Some(dir.path()), ..ScoreContext::default() };
        let score = |answer: &str| Task::Spider.score_complete(context, &samples[0], answer).map(|score| score.verdict);
        assert_eq!(score("SELECT 2").unwrap(), Verdict::Correct);
        assert_eq!(score("SELECT 3").unwrap(), Verdict::Incorrect);
        assert_eq!(
            Task::Spider.score_complete(ScoreContext::default(), &samples[0], "SELECT 2").unwrap().verdict,
            Verdict::Unscored
        );
        let mut broken = samples[0].clone();
        broken.meta = Some(json!({ "db_id": "../zoo" }));
        assert!(Task::Spider.score_complete(context, &broken, "SELECT 2").is_err());
        broken.meta = Some(json!({ "db_id": "aquarium" }));
        let error = Task::Spider.check_scorable(context, &broken).unwrap_err().to_string();
        assert!(error.contains("aquarium.sqlite") && error.contains("spider-dev-0"), "{error}");
        Task::Spider.check_scorable(context, &samples[0]).unwrap();
        assert!(load(dir.path(), "nosuch").is_err());
        // Questions with the same query stay together, whatever its white space.
        let row = |index: usize, space: &str| {
            format!(r#"{{"db_id": "zoo", "question": "q{index}", "query": "SELECT{space}{}"}}"#, index / 2)
        };
        let rows = (0..3000).map(|index| row(index, [" ", "  "][index % 2])).collect::<Vec<_>>().join("\n");
        std::fs::write(dir.path().join("train.jsonl"), rows).unwrap();
        let ids = |split: &str| -> BTreeSet<String> {
            load(dir.path(), split).unwrap().into_iter().map(|sample| sample.id).collect()
        };
        let (heldout, rest, all) = (ids("heldout"), ids("rest"), ids("train"));
        assert_eq!((heldout.len(), rest.len()), (MIN_HELDOUT, 3000 - MIN_HELDOUT));
        assert!(heldout.is_disjoint(&rest) && heldout.union(&rest).eq(&all));
        let twin = |id: &String| format!("spider-train-{}", id[13..].parse::<usize>().unwrap() ^ 1);
        assert!(heldout.iter().all(|id| heldout.contains(&twin(id))));
        assert_eq!(load(dir.path(), "heldout").unwrap()[0].source, "spider/heldout");
    }

    mod needs_data {
        use super::*;

        #[test]
        #[ignore = "needs the benchmarks' data: scripts/test --data DIR"]
        fn every_published_reference_matches_itself() {
            let data = cllm_testing::benchmark_data("spider");
            let context = ScoreContext { data: Some(&data), ..ScoreContext::default() };
            // In train, 96 rows use databases that the folder lacks, and three queries do not run.
            let faulty = ["spider-train-3153", "spider-train-4513", "spider-train-4514"];
            for (split, num_samples, num_scored, faulty) in
                [("dev", 1034, 1034, &[][..]), ("train", 7000, 6904, &faulty)]
            {
                let samples = load(&data, split).unwrap();
                assert_eq!(samples.len(), num_samples);
                let is_scorable = |sample: &&Sample| Task::Spider.check_scorable(context, sample).is_ok();
                let verdict = |sample: &Sample| {
                    let reference = sample.reference.as_deref().unwrap();
                    (sample.id.clone(), Task::Spider.score_complete(context, sample, reference).unwrap().verdict)
                };
                let verdicts: Vec<_> = samples.par_iter().filter(is_scorable).map(verdict).collect();
                assert_eq!(verdicts.len(), num_scored);
                let not_correct: Vec<_> =
                    verdicts.into_iter().filter(|(_, verdict)| *verdict != Verdict::Correct).collect();
                assert_eq!(
                    not_correct,
                    faulty.iter().map(|id| ((*id).to_owned(), Verdict::Unscored)).collect::<Vec<_>>()
                );
            }
        }
    }
}
