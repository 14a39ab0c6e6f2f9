//! MT-bench: questions of two turns in FastChat's form. A judge model scores the answers, not this
//! toolkit.
//!
//! ```text
//! row     {"question_id": 81, "category": "writing",
//!          "turns": ["Write a travel blog post.", "Rewrite it as a limerick."]}
//! prompt  Write a travel blog post.
//! target  none
//! score   none; the second turn, kept in `meta`, is asked after the first answer
//! ```
//!
//! The judge: <https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge>.

use std::path::Path;

use serde::Deserialize;
use serde_json::json;

use crate::prompt_set::{Prompt, Sample, dataset_file};
use crate::{Error, Result};

#[derive(Deserialize)]
struct Row {
    question_id: u64,
    category: String,
    turns: [String; 2],
}

pub(super) fn load(data: &Path, split: &str) -> Result<Vec<Sample>> {
    if split != "test" {
        return Err(Error::usage(format!("mt-bench has only the split test, not `{split}`")));
    }
    let rows: Vec<Row> = dataset_file::read(data, &["question"])?;
    let sample = |Row { question_id, category, turns }: Row| Sample {
        id: format!("{question_id}/1"),
        source: "mt-bench/test".to_owned(),
        prompt: Prompt::question(&turns[0]),
        reference: None,
        meta: Some(json!({ "question_id": question_id, "category": category, "turns": turns })),
    };
    Ok(rows.into_iter().map(sample).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    mod needs_data {
        use super::*;

        #[test]
        #[ignore = "needs the benchmarks' data: scripts/test --data DIR"]
        fn the_published_file_loads() {
            assert_eq!(load(&cllm_testing::benchmark_data("mt_bench"), "test").unwrap().len(), 80);
        }
    }
}
