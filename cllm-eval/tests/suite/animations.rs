//! The animated SVG of one example: its times, its text, and the committed picture.

use std::collections::BTreeMap;
use std::path::Path;

use cllm_core::decode::Strategy;
use cllm_eval::records::{AnswerRecord, Records, SAMPLES, SpeedRecord};
use cllm_eval::report::animate;
use cllm_eval::role::Role;

use crate::made_up::{JACOBI, records};
use crate::reports::{STORY, with_forward_texts};

fn draw(records: &Records, example: Option<&str>) -> cllm_core::Result<String> {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("answers.svg");
    records.write(&dir.path().join(SAMPLES)).unwrap();
    animate(dir.path(), example, &output)?;
    Ok(std::fs::read_to_string(output).unwrap())
}

/// When each animation is done, in percent of the loop, and the duration of a loop in seconds.
fn timeline(style: &str) -> (BTreeMap<String, f64>, f64) {
    let percent = |rule: &str| {
        let (name, steps) = rule.split_once('{').unwrap();
        let end = steps.split_once('}').unwrap().1.split_once('%').unwrap().0;
        (name.to_owned(), end.parse().unwrap())
    };
    let period = style.split_once(".forward{animation:").unwrap().1.split_once("s ").unwrap().0;
    (style.split("@keyframes ").skip(1).map(percent).collect(), period.parse().unwrap())
}

#[test]
fn every_forward_appears_when_it_ended_on_one_time_scale() {
    let svg = draw(&with_forward_texts(records()), None).unwrap();
    let document = roxmltree::Document::parse(&svg).unwrap();
    let style = document.descendants().find(|node| node.has_tag_name("style")).unwrap().text().unwrap();
    let (ends, period) = timeline(style);
    // The teacher needs 8 s for 8 forwards, the student 2 s for 2.
    let seconds = |prefix: char, forward: usize| ends[&format!("{prefix}{forward}")] / 100.0 * period;
    let scale = seconds('a', 7) / 8.0;
    for (prefix, num_forwards) in [('a', 8), ('b', 2)] {
        for forward in 0..num_forwards {
            let expected = scale * (forward + 1) as f64;
            assert!((seconds(prefix, forward) - expected).abs() < 1e-3, "{prefix}{forward}: {ends:?}");
        }
        let bar_end = ends[&format!("{prefix}bar")];
        assert_eq!(bar_end, ends[&format!("{prefix}{}", num_forwards - 1)], "the bar stops with the answer");
    }
    assert!(seconds('a', 7) < period, "the loop pauses at its end");
    let animated: Vec<&str> = document
        .descendants()
        .filter(|node| node.attribute("class") == Some("forward"))
        .map(|node| node.attribute("style").unwrap().strip_prefix("animation-name:").unwrap())
        .collect();
    assert!(animated.iter().all(|name| ends.contains_key(*name)) && animated.len() >= 10, "{animated:?}");
}

#[test]
fn forwards_of_different_duration_end_when_they_ended() {
    let mut records = with_forward_texts(records());
    let measured = [0.5, 2.0];
    for speed in records.speeds.iter_mut().filter(|speed| speed.role == Role::Student && speed.forwards == 2) {
        speed.forward_ends = Some(measured.to_vec());
    }
    let svg = draw(&records, None).unwrap();
    let document = roxmltree::Document::parse(&svg).unwrap();
    let style = document.descendants().find(|node| node.has_tag_name("style")).unwrap().text().unwrap();
    let (ends, _) = timeline(style);
    // The teacher's eight forwards of a second each give the scale.
    for (forward, seconds) in measured.into_iter().enumerate() {
        assert!((ends[&format!("b{forward}")] - ends["a7"] * seconds / 8.0).abs() < 1e-2, "{ends:?}");
    }
}

#[test]
fn the_fastest_strategy_is_drawn_whose_timed_answers_have_the_same_forwards() {
    let mut records = with_forward_texts(records());
    let slower = Strategy::Jacobi { n: 5 };
    records.header.settings.strategies.push(slower);
    let answers: Vec<AnswerRecord> = records.answers_of(Role::Student, JACOBI).cloned().collect();
    let speeds: Vec<SpeedRecord> = records.speeds_of(Role::Student, JACOBI).cloned().collect();
    records.answers.extend(answers.into_iter().map(|answer| AnswerRecord { strategy: slower, ..answer }));
    let slowed = |speed: SpeedRecord| SpeedRecord { strategy: slower, seconds: 2.0 * speed.seconds, ..speed };
    records.speeds.extend(speeds.into_iter().map(slowed));
    assert!(draw(&records, None).unwrap().contains("(jacobi n=4)"));
    records.speeds.iter_mut().filter(|speed| speed.strategy == JACOBI).for_each(|speed| speed.forwards = 1);
    assert!(draw(&records, None).unwrap().contains("(jacobi n=5)"));
}

#[test]
fn without_animation_the_picture_shows_both_whole_answers() {
    let svg = draw(&with_forward_texts(records()), None).unwrap();
    let document = roxmltree::Document::parse(&svg).unwrap();
    let answers: String = document
        .descendants()
        .filter(|node| node.attribute("class") == Some("answer"))
        .filter_map(|node| node.text())
        .collect();
    let without_spaces = |text: &str| text.replace(' ', "");
    assert_eq!(without_spaces(&answers), without_spaces(STORY).repeat(2));
    // The answer holds a tag, which must stay text. Images may neither load nor run anything.
    assert!(!svg.contains("<script") && !svg.contains("href") && !svg.contains("url("), "{svg}");
    assert!(svg.contains("prefers-color-scheme:dark") && svg.contains("prefers-reduced-motion:reduce"), "{svg}");
    assert!(
        svg.contains("Teacher, autoregressive decoding") && svg.contains("4.00 tokens per forward (jacobi n=4)"),
        "{svg}"
    );
    assert!(svg.contains(">8 tokens in 8.00 s: 1 tokens/s<") && svg.contains(">4.00x as fast<"), "{svg}");
    assert!(svg.contains("Jacobi decoding, 4.00x as fast at batch 1.</title>"), "{svg}");
}

#[test]
fn an_example_is_found_by_its_id_and_needs_timings() {
    let records = with_forward_texts(records());
    assert!(draw(&records, Some("e1")).unwrap().contains("example e1."));
    // The third example was not timed.
    for id in ["e2", "nothing"] {
        let error = draw(&records, Some(id)).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains(&format!("no example `{id}`")), "{error}");
    }
    let mut untimed = records;
    untimed.speeds.clear();
    assert!(draw(&untimed, None).unwrap_err().to_string().contains("num_speed_examples=5"));
}

#[test]
fn lines_break_at_spaces_and_control_characters_become_visible() {
    let mut records = with_forward_texts(records());
    let text = "a long\u{1b} line of words that is far too long for one half of the picture\n数数";
    for answer in records.answers.iter_mut().filter(|answer| answer.index == 0) {
        let mut texts = vec![String::new(); answer.forwards];
        texts[0] = text.to_owned();
        answer.forward_texts = Some(texts);
    }
    let svg = draw(&records, None).unwrap();
    let document = roxmltree::Document::parse(&svg).unwrap();
    let lines: Vec<&str> = document
        .descendants()
        .filter(|node| node.attribute("class") == Some("answer"))
        .filter_map(|node| node.text())
        .take(3)
        .collect();
    assert_eq!(lines, ["a long␛ line of words that is far too long for", "one half of the picture", "数数"]);
}

#[test]
fn the_committed_picture_is_drawn_from_the_committed_answers() {
    let docs = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs"));
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("decoding.svg");
    animate(&docs.join("results/decoding.jsonl"), None, &output).unwrap();
    let [committed, drawn] = [docs.join("decoding.svg"), output].map(|path| std::fs::read_to_string(path).unwrap());
    assert!(
        committed == drawn,
        "docs/decoding.svg is out of date: cllm-eval animate docs/results/decoding.jsonl -o docs/decoding.svg"
    );
}
