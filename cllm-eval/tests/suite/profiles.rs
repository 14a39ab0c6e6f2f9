//! `profile` of hand-written trajectories.

use std::path::Path;

use cllm_core::chat_template::RenderingRecord;
use cllm_core::trajectory::{Block, FinishReason, Provenance, Trajectory, Writer};
use cllm_eval::profile::profile;
use serde_json::{Value, json};

use cllm_testing::programs::{Program, path};

const EVAL: Program = Program("cllm-eval");

fn row(id: &str, response_ids: &[i32], states: [Vec<[i32; 4]>; 2]) -> Trajectory {
    let block = |(index, states): (usize, Vec<[i32; 4]>)| Block {
        start: 4 * index as u32,
        states: states.into_iter().map(Vec::from).collect(),
    };
    let ends = response_ids.last() == Some(&0);
    Trajectory {
        sample_id: id.into(),
        source: "synthetic/train".into(),
        prompt: "2+2?".into(),
        prompt_ids: vec![2],
        response_ids: response_ids.to_vec(),
        reference: None,
        reference_ids: None,
        blocks: states.into_iter().enumerate().map(block).collect(),
        augmented: None,
        finish_reason: if ends { FinishReason::Eos } else { FinishReason::Length },
        meta: None,
    }
}

fn write(folder: &Path, n: usize, rows: &[Trajectory]) {
    let provenance = Provenance {
        teacher: "t".into(),
        teacher_name: None,
        teacher_base: None,
        tokenizer: "k".into(),
        vocab_size: 10,
        n,
        max_new_tokens: 6,
        thought_closing: None,
        eos_ids: vec![0],
        seed: 1,
        prompts: "p".into(),
        rendering: RenderingRecord::default(),
        toolkit: "0".into(),
        steps: vec![],
    };
    let mut writer = Writer::open(folder, provenance).unwrap();
    writer.write_shard(rows).unwrap();
    writer.finish().unwrap();
}

/// Every iteration fixes one token, and draft tokens after EOS (position 5) still change.
fn teacher() -> Trajectory {
    let first = vec![[1, 9, 9, 9], [1, 2, 9, 9], [1, 2, 3, 9], [1, 2, 3, 4]];
    row("a", &[1, 2, 3, 4, 5, 0], [first, vec![[5, 0, 7, 7], [5, 0, 8, 8]]])
}

/// One iteration fixes three tokens; token 3 was correct before token 2 was.
fn student() -> [Trajectory; 3] {
    let first = || vec![[1, 9, 3, 9], [1, 2, 3, 4]];
    let ended = row("a", &[1, 2, 3, 4, 5, 0], [first(), vec![[5, 0, 7, 7]]]);
    let cut = row("b", &[1, 2, 3, 4, 5, 6], [first(), vec![[5, 9, 8, 9], [5, 6, 8, 9]]]);
    let mut augmented = row("c", &[1, 2, 3, 4, 5, 0], [first(), vec![[5, 0, 7, 7]]]);
    augmented.augmented = Some(vec![vec![true, false], vec![false]]);
    [ended, cut, augmented]
}

#[test]
fn the_figures_agree_with_a_computation_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("of-teacher"), 4, &[teacher()]);
    write(&dir.path().join("of-student"), 4, &student());
    let (one, two) = (path(dir.path(), "of-teacher"), format!("student={}", path(dir.path(), "of-student")));
    let file = path(dir.path(), "profile.json");
    let ended = EVAL.succeed(&["profile", &one, &two, "-o", &file, "--json"]);
    let profiles: Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert_eq!(profiles, serde_json::from_str::<Value>(&std::fs::read_to_string(&file).unwrap()).unwrap());
    assert!(ended.stderr.contains("left out 1 augmented row"), "{}", ended.stderr);
    let [first, second] = &profiles["sets"].as_array().unwrap()[..] else { panic!("{profiles}") };
    assert_eq!(
        (&first["name"], &second["name"], &second["augmented_rows"]),
        (&json!(one), &json!("student"), &json!(1))
    );
    // Three iterations of one token each. Six forwards: one for the first token, three that make
    // states and one that opens the second block, one in it.
    let all = json!({ "blocks": 2, "tokens": 6, "fast_forwarded": 1.0, "beyond_one_per_block": 0.0, "stationary": 0.0,
        "iterations_per_block": 1.5, "tokens_per_forward": 1.0 });
    assert_eq!(first["all"], all);
    assert_eq!((&first["length"]["blocks"], &first["length"]["stationary"]), (&json!(0), &Value::Null));
    assert_eq!(first["ratio_to_first"], Value::Null);
    // Iterations 1, 0, 1, 1 fast-forward 3, 0, 3, 1 tokens; forwards 4 and 4.
    let all = json!({ "blocks": 4, "tokens": 12, "fast_forwarded": 7.0 / 3.0, "beyond_one_per_block": 1.0, "stationary": 0.5,
        "iterations_per_block": 0.75, "tokens_per_forward": 1.5 });
    assert_eq!(second["all"], all);
    let eos = json!({ "blocks": 2, "tokens": 6, "fast_forwarded": 3.0, "beyond_one_per_block": 1.0, "stationary": 0.5,
        "iterations_per_block": 0.5, "tokens_per_forward": 1.5 });
    assert_eq!(second["eos"], eos);
    let length = json!({ "blocks": 2, "tokens": 6, "fast_forwarded": 2.0, "beyond_one_per_block": 1.0, "stationary": 0.5,
        "iterations_per_block": 1.0, "tokens_per_forward": 1.5 });
    assert_eq!(second["length"], length);
    let whole = json!({ "blocks": 2, "tokens": 8, "fast_forwarded": 3.0, "beyond_one_per_block": 2.0, "stationary": 1.0,
        "iterations_per_block": 1.0, "tokens_per_forward": null });
    assert_eq!(second["whole_blocks"], whole);
    let ratios = json!({ "fast_forwarded": 7.0 / 3.0, "beyond_one_per_block": null, "stationary": null,
        "iterations_per_block": 0.5, "tokens_per_forward": 1.5 });
    assert_eq!(second["ratio_to_first"], ratios);
    let text = String::from_utf8(EVAL.succeed(&["profile", &one, &two]).stdout).unwrap();
    assert!(text.contains("student, n = 4") && text.contains("ratio to") && text.contains("2.33x"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/data-format.md")).unwrap();
    for key in second.as_object().unwrap().keys().chain(all.as_object().unwrap().keys()) {
        assert!(page.contains(&format!("`{key}`")), "{key} is missing in docs/data-format.md");
    }
}

#[test]
fn data_sets_that_cannot_be_profiled_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let [_, _, augmented] = student();
    write(&dir.path().join("augmented"), 4, &[augmented]);
    EVAL.fail(&["profile", &path(dir.path(), "augmented")], 2, &["every row is augmented"]);
    EVAL.fail(&["profile", "teacher=nowhere"], 2, &["nowhere"]);
    // Ratios need the same n.
    write(&dir.path().join("four"), 4, &[teacher()]);
    let mut wide = teacher();
    wide.blocks = vec![Block { start: 0, states: vec![vec![1, 2, 3, 4, 5, 0]] }];
    write(&dir.path().join("six"), 6, &[wide]);
    let profiles = profile(&[path(dir.path(), "four"), path(dir.path(), "six")]).unwrap();
    assert_eq!((profiles.sets[1].n, profiles.sets[1].ratio_to_first), (6, None));
    assert_eq!(profiles.sets[1].all.means.fast_forwarded, None);
}
