//! MT-bench (Zheng et al., arXiv 2306.05685): questions of two turns in FastChat's form. A judge scores them, not this toolkit.

use std::path::Path;

use serde::Deserialize;
use serde_json::json;

use crate::prompt_set::dataset_file;
use crate::prompt_set::{Prompt, Sample};
use crate::{Error, Result};

#[derive(Deserialize)]
struct Row {
    question_id: u64,
    category: String,
    turns: [String; 2],
}

/// The first turns; the second stands in `meta`.
pub(super) fn load(data: &Path, split: &str) -> Result<Vec<Sample>> {
    if split != "test" {
        return Err(Error::usage(format!("mt-bench has the split test only, not `{split}`")));
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

    #[test]
    fn the_real_file_loads() {
        let Some(data) = std::env::var_os("CLLM_DATA") else {
            println!("skipped: CLLM_DATA is not set");
            return;
        };
        assert_eq!(load(&Path::new(&data).join("mt_bench"), "test").unwrap().len(), 80);
    }
}
