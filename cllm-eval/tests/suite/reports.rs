//! Reports of synthetic results.

use std::path::Path;

use cllm_core::atomic_file;
use cllm_core::decode::Strategy;
use cllm_core::task::Task;
use cllm_eval::records::{AnswerRecord, Records, SAMPLES, SpeedRecord};
use cllm_eval::report::report;
use cllm_eval::results::{RESULTS, Results};
use cllm_eval::role::Role;
use serde_json::Value;

use crate::made_up::{JACOBI, program, records};

/// The report of the synthetic records: Markdown, page, LaTeX, model card.
pub fn rendered_report() -> (tempfile::TempDir, [String; 4]) {
    let dir = tempfile::tempdir().unwrap();
    let records = with_forward_texts(records());
    records.write(&dir.path().join(SAMPLES)).unwrap();
    atomic_file::write_json(&dir.path().join(RESULTS), &Results::from_records(&records)).unwrap();
    let written = report(&[dir.path().to_owned()], None, &[]).unwrap();
    let names = ["report.md", "report.html", "report.tex", "model-card.md"];
    let pictures = ["tradeoff.svg", "example.svg"];
    let expected: Vec<_> = names.iter().chain(&pictures).map(|name| dir.path().join(name)).collect();
    assert_eq!(written, expected);
    for picture in pictures {
        let svg = std::fs::read_to_string(dir.path().join(picture)).unwrap();
        let document = roxmltree::Document::parse(&svg).unwrap();
        assert!(document.root_element().tag_name().namespace().is_some() && svg.contains("<style>"), "{picture}");
    }
    let texts = names.map(|name| std::fs::read_to_string(dir.path().join(name)).unwrap());
    (dir, texts)
}

#[test]
fn a_report_holds_the_figures_loads_nothing_and_escapes_answers() {
    let (_dir, [markdown, page, tex, card]) = rendered_report();
    assert!(markdown.contains("(1,234,567 parameters, "), "{markdown}");
    for text in [&markdown, &page] {
        assert!(text.contains("75.0 %") && text.contains("4.00x"), "{text}");
        assert!(text.contains("speedup_vs_teacher_ar") && text.contains("max_new_tokens"), "{text}");
        assert!(text.contains("AUP, teacher: ") && text.contains("answers same as AR"), "{text}");
        assert!(!text.contains("same tokens as AR"), "{text}");
    }
    for address in ["http:", "https:", "//", "src=", "href=", "url(", "@import"] {
        assert!(!page.contains(address), "{address}");
    }
    // The first strategy pays there for what all need; the speed of several answers at once is measured by itself.
    assert!(!page.contains("Tokens per second in batches"), "{page}");
    assert!(page.contains("prefers-color-scheme: dark") && page.matches("<svg").count() >= 7 && !page.contains("NaN"));
    assert!(
        page.contains("2 &amp; 2 &lt;b&gt;?") && !page.contains("<b>") && !page.contains("<script>alert"),
        "{page}"
    );
    assert!(page.contains(r#"title="forward 1, 4 tokens""#), "{page}");
    assert!(page.contains("<title>s, a student of t</title>") && page.contains("<span>2026-11-28</span>"), "{page}");
    assert!(page.contains("commit 0123abc") && markdown.starts_with("# s, a student of t\n\n2026-11-28; "), "{page}");
    // Three examples differ, which says nothing about the accuracy.
    let verdict = "No significant difference, but 4 examples are too few to tell. −25.0 points against the teacher";
    assert!(
        page.contains(&format!(r#"<div class="verdict neutral">{verdict}"#)) && markdown.contains(verdict),
        "{page}"
    );
    assert!(page.contains("<td>75.0 %<small>30.1 to 95.4</small></td>"), "{page}");
    // The headline is the student's fastest strategy and its cost.
    assert!(
        page.contains(r#"<div class="number">4.00x</div>"#) && page.contains("1 of 4 answers unfinished (teacher: 1)"),
        "{page}"
    );
    assert!(
        page.contains(
            "<div>as fast at batch 1 as the teacher (student, jacobi\u{a0}n=4, against autoregressive)</div>"
        )
    );
    assert!(card.contains("speed-up at batch 1 over the teacher's autoregressive decoding (jacobi n=4)"), "{card}");
    assert!(tex.contains(r"75.0 \% (30.1 to 95.4)") && tex.contains(r"\toprule") && !tex.contains(" % "), "{tex}");
    assert!(card.contains("| student | jacobi n=4 |"), "{card}");
}

#[test]
fn a_chart_draws_the_speed_up_at_each_number_of_rows() {
    let (_dir, [markdown, page, tex, _]) = rendered_report();
    assert!(markdown.contains("| student | jacobi n=4 | 2 | 2.50x | 32.0 | 18.3 | "), "{markdown}");
    assert!(page.contains("<td>2.50x</td>") && tex.contains("2.50x"), "{page}");
    let chart = page
        .split("<figure>")
        .find(|figure| figure.contains("Speed-up over the teacher&#x27;s AR, by answers decoded at once"))
        .unwrap();
    let circles = chart.split("<circle").skip(1).map(|circle| {
        let number = |name: &str| {
            let (_, rest) = circle.split_once(&format!("{name}=\"")).unwrap();
            rest.split('"').next().unwrap().parse::<f64>().unwrap()
        };
        (number("cx"), number("cy"))
    });
    let circles: Vec<(f64, f64)> = circles.collect();
    // Four lines with two points each: AR of the teacher at 1, the student's Jacobi decoding at 4 and 2.5.
    assert_eq!(circles.len(), 8);
    let [ar, one, two] = [circles[0], circles[6], circles[7]];
    assert_eq!((circles[1].1, one.0, two.0), (ar.1, ar.0, circles[1].0));
    let height = |point: (f64, f64)| ar.1 - point.1;
    assert!((height(two) / height(one) - 1.5 / 3.0).abs() < 0.01 && height(one) > 100.0, "{circles:?}");
}

/// The answer to the example that the report shows.
pub const STORY: &str = "2 & 2 are <script>alert(1)</script> = 4.";

/// The records with that answer to the two timed examples, some characters from each forward.
pub fn with_forward_texts(mut records: Records) -> Records {
    for answer in records.answers.iter_mut().filter(|answer| answer.index < 2) {
        let characters: Vec<char> = STORY.chars().collect();
        let per_forward = characters.len() / answer.forwards;
        let text = |forward: usize| {
            let end = if forward + 1 == answer.forwards { characters.len() } else { (forward + 1) * per_forward };
            characters[forward * per_forward..end].iter().collect()
        };
        answer.forward_texts = Some((0..answer.forwards).map(text).collect());
        answer.text = STORY.into();
    }
    records
}

#[test]
fn the_card_names_the_base_model_the_data_set_the_strategy_and_the_command() {
    let dir = tempfile::tempdir().unwrap();
    let mut records = records();
    records.header.benchmark = Task::Gsm8k;
    let base = dir.path().join("models--some--base/snapshots/0123");
    std::fs::create_dir_all(&base).unwrap();
    std::fs::write(base.join("README.md"), "---\ntags: []\nlicense: apache-2.0\n---\n").unwrap();
    records.header.models[0].path = base.display().to_string();
    records.header.models[1].path = "runs/maths-cllm/rounds/round-02/student/final".into();
    let rolling = Strategy::rolling(4);
    records.header.settings.strategies[1] = rolling;
    records.header.settings.teacher = Some("some/base".into());
    records.answers.iter_mut().filter(|answer| answer.strategy == JACOBI).for_each(|answer| answer.strategy = rolling);
    records.speeds.iter_mut().filter(|speed| speed.strategy == JACOBI).for_each(|speed| speed.strategy = rolling);
    atomic_file::write_json(&dir.path().join(RESULTS), &Results::from_records(&records)).unwrap();
    report(&[dir.path().to_owned()], None, &[]).unwrap();
    let card = std::fs::read_to_string(dir.path().join("model-card.md")).unwrap();
    for line in [
        "base_model: some/base",
        "license: apache-2.0",
        "name: maths-cllm",
        "type: openai/gsm8k",
        "The headline numbers are for Jacobi decoding with a rolling window (`rolling`).",
        "    cllm-eval run",
        "      teacher=some/base",
        "    cllm-eval generate --model MODEL --strategy '{rolling: {n: 4}}' ",
    ] {
        assert!(card.contains(line), "{line}: {card}");
    }
}

/// Paths and names may come from anywhere, and a page that shows the Markdown runs what is in it.
#[test]
fn html_and_control_characters_in_names_are_text_in_markdown() {
    let dir = tempfile::tempdir().unwrap();
    let mut records = records();
    let hostile = "<img src=x onerror=alert(1)>\x1b[2J\u{202e}";
    records.header.models[0].path = hostile.into();
    records.header.split = hostile.into();
    records.answers.iter_mut().for_each(|answer| answer.id = format!("{hostile}{}", answer.index));
    records.write(&dir.path().join(SAMPLES)).unwrap();
    atomic_file::write_json(&dir.path().join(RESULTS), &Results::from_records(&records)).unwrap();
    report(&[dir.path().to_owned()], None, &[]).unwrap();
    for name in ["report.md", "model-card.md"] {
        let text = std::fs::read_to_string(dir.path().join(name)).unwrap();
        let body = text.rsplit_once("\n---\n").map_or(text.as_str(), |(_, body)| body);
        // In a block of code, everything is text.
        let prose = body.lines().filter(|line| !line.starts_with("    ")).collect::<Vec<_>>().join("\n");
        assert!(prose.contains("&lt;img src=x"), "{name}: {prose}");
        assert!(!prose.contains("<img") && !text.contains(['\x1b', '\u{202e}']), "{name}: {text}");
    }
}

#[test]
fn a_report_of_several_runs_begins_with_one_row_per_run() {
    let dir = tempfile::tempdir().unwrap();
    let folders = ["one", "two"].map(|name| dir.path().join(name));
    let output = dir.path().join("report");
    for (folder, split) in folders.iter().zip(["test", "dev_50%"]) {
        let mut records = records();
        records.header.split = split.into();
        std::fs::create_dir_all(folder).unwrap();
        atomic_file::write_json(&folder.join(RESULTS), &Results::from_records(&records)).unwrap();
    }
    report(&folders, Some(&output), &[]).unwrap();
    let read = |name: &str| std::fs::read_to_string(output.join(name)).unwrap();
    let (markdown, page, tex) = (read("report.md"), read("report.html"), read("report.tex"));
    let row = "| jsonl / test | student jacobi n=4 | 50.0 % (15.0 to 85.0) | 4.00x (4.00 to 4.00) | 75.0 % (30.1 to 95.4) | 4.00 | 1 of 4 |\n";
    let (overview, sections) = markdown.split_once("## ").unwrap();
    assert!(
        overview.contains(row) && overview.contains("| jsonl / dev_50% |") && !sections.contains(row),
        "{markdown}"
    );
    assert!(page.find("<td>jsonl &#x2f; dev_50%</td>").unwrap() < page.find("class=\"cards\"").unwrap(), "{page}");
    assert!(tex.contains(r"jsonl / dev\_50\% & student jacobi n=4 & 50.0 \% (15.0 to 85.0) &"), "{tex}");
    assert_eq!(
        (tex.matches(r"\resizebox{\linewidth}{!}").count(), tex.matches(r"\begin{tabular}{llr").count()),
        (5, 5)
    );
    assert!(
        overview.matches("speed-ups are at batch 1, over autoregressive decoding of the teacher t:").count() == 1,
        "{overview}"
    );
    let (_dir, [alone, ..]) = rendered_report();
    assert!(markdown.contains("The fastest strategy of each run") && !alone.contains("of each run"), "{alone}");
    // Ratios to another baseline stand in a table of their own.
    let mut other = records();
    other.header.models[0].fingerprint = "other".into();
    other.header.models[0].path = "big".into();
    atomic_file::write_json(&folders[1].join(RESULTS), &Results::from_records(&other)).unwrap();
    report(&folders, Some(&output), &[]).unwrap();
    let (overview, _) = read("report.md").split_once("\n## ").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    for name in ["t", "big"] {
        assert_eq!(
            overview
                .matches(&format!("speed-ups are at batch 1, over autoregressive decoding of the teacher {name}:"))
                .count(),
            1,
            "{overview}"
        );
    }
    // Runs of the same benchmark and split are distinguished by their folders.
    report(&[&folders[0], &folders[0]].map(Clone::clone), Some(&output), &["spider: skipped: no `<data>`".into()])
        .unwrap();
    assert!(read("report.html").contains("<li>spider: skipped: no <code>&lt;data&gt;</code></li>"));
    let title = "jsonl / test / one";
    assert!(read("report.md").contains(&format!("| {title} | student")), "{title}");
    assert!(read("report.html").contains(&format!("<h2>{}</h2>", title.replace('/', "&#x2f;"))), "{title}");
}

#[test]
fn several_runs_have_a_card_only_if_they_evaluated_the_same_student() {
    let dir = tempfile::tempdir().unwrap();
    let folders = ["one", "two"].map(|name| dir.path().join(name));
    let write = |folder: &Path, student: &str| {
        let mut records = records();
        records.header.models[1].fingerprint = student.into();
        std::fs::create_dir_all(folder).unwrap();
        atomic_file::write_json(&folder.join(RESULTS), &Results::from_records(&records)).unwrap();
    };
    for (student, output, has_card) in [("same", "of-one", true), ("other", "of-both", false)] {
        write(&folders[0], "same");
        write(&folders[1], student);
        let output = dir.path().join(output);
        let run = program().arg("report").args(&folders).arg("--output").arg(&output).output().unwrap();
        let (listed, log) = (String::from_utf8(run.stdout).unwrap(), String::from_utf8(run.stderr).unwrap());
        assert!(run.status.success() && output.join("report.html").exists(), "{log}");
        assert_eq!((output.join("model-card.md").exists(), listed.contains("model-card.md")), (has_card, has_card));
        assert_eq!(log.contains("model-card.md is not written: it would describe one model"), !has_card, "{log}");
    }
}

/// Its own answers are of no use.
#[test]
fn a_draft_model_is_represented_by_the_teacher_that_decodes_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (mut records, drafted) = (records(), Strategy::Drafted { n: 4 });
    records.header.settings.strategies[1] = drafted;
    let is_kept = |role: Role, strategy: Strategy| role == Role::Teacher || strategy == Strategy::Ar;
    let renamed = |strategy: Strategy| if strategy == JACOBI { drafted } else { strategy };
    records.answers.retain(|answer| is_kept(answer.role, answer.strategy));
    records.answers.iter_mut().for_each(|answer| answer.strategy = renamed(answer.strategy));
    records.speeds.retain(|speed| is_kept(speed.role, speed.strategy));
    records.speeds.iter_mut().for_each(|speed| speed.strategy = renamed(speed.strategy));
    records.throughputs.clear();
    atomic_file::write_json(&dir.path().join(RESULTS), &Results::from_records(&records)).unwrap();
    report(&[dir.path().to_owned()], None, &[]).unwrap();
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    for part in [
        "# s, a draft model for t\n",
        "**2.00x** as fast at batch 1 as the teacher alone (drafted n=4, against autoregressive).",
        "The teacher decides every token: 100.0 % of its answers are the same as without drafts",
    ] {
        assert!(read("report.md").contains(part), "{part}: {}", read("report.md"));
    }
    assert!(!read("report.html").contains("Accuracy lost"));
    assert!(read("model-card.md").contains("for speculative decoding with a draft model (`drafted`)"));
}

/// What differs from the teacher's answers differs by rounding.
#[test]
fn a_student_whose_teacher_decides_every_token_is_not_said_to_have_kept_its_accuracy() {
    let mut records = records();
    let gated = Strategy::gated(4);
    records.header.settings.strategies[1] = gated;
    let of_student = |role: Role, strategy: Strategy| role == Role::Student && strategy == JACOBI;
    for answer in records.answers.iter_mut().filter(|answer| of_student(answer.role, answer.strategy)) {
        answer.strategy = gated;
    }
    for speed in records.speeds.iter_mut().filter(|speed| of_student(speed.role, speed.strategy)) {
        speed.strategy = gated;
    }
    records.throughputs.clear();
    // Adapters of another model: the answers are not the teacher's.
    assert!(!page_of(&records).contains("The teacher decides"));
    records.header.models[1].adapts_teacher = true;
    let page = page_of(&records);
    let verdict = r#"<div class="verdict neutral">The teacher decides every token: "#;
    assert!(page.contains(verdict) && page.contains("as fast at batch 1 as the teacher (student, gated n=4"), "{page}");
    assert!(
        page.contains("75.0 % of its answers are the same as without drafts")
            && !page.contains("ignificant difference")
    );
}

/// Its texts are those of a batch, where it may draft otherwise than when it is timed.
#[test]
fn the_example_plays_without_strategies_whose_timed_answer_has_other_forwards() {
    let mut records = with_forward_texts(records());
    let is_it = |speed: &&mut SpeedRecord| speed.role == Role::Student && speed.strategy == JACOBI;
    records.speeds.iter_mut().filter(is_it).for_each(|speed| speed.forwards = 1);
    let page = page_of(&records);
    assert!(page.contains(">Play</button>") && page.matches("class=\"num-shown\"").count() == 3, "{page}");
    assert!(
        page.contains("Not shown, because no answer with the same forwards was timed: student jacobi n=4."),
        "{page}"
    );
    // One example that can be played with every strategy is better.
    records.speeds.iter_mut().filter(is_it).filter(|speed| speed.index == 1).for_each(|speed| speed.forwards = 2);
    let page = page_of(&records);
    assert!(page.matches("class=\"num-shown\"").count() == 4 && page.contains("Example e1"), "{page}");
    assert!(!page.contains("Not shown, because"), "{page}");
    // Without timings, every answer is shown and nothing moves.
    records.speeds.clear();
    let page = page_of(&records);
    assert!(!page.contains(">Play</button>") && page.matches("class=\"num-shown\"").count() == 4, "{page}");
}

/// In batches it drafts less, so their tokens per forward do not explain the speed-up beside them.
#[test]
fn tokens_per_forward_at_batch_1_are_named_where_the_strategy_chooses_its_drafts() {
    let mut records = records();
    let auto = Strategy::auto(0);
    let with_auto = |strategy: Strategy| if strategy == JACOBI { auto } else { strategy };
    records.header.settings.strategies[1] = auto;
    records.answers.iter_mut().for_each(|answer| answer.strategy = with_auto(answer.strategy));
    records.speeds.iter_mut().for_each(|speed| speed.strategy = with_auto(speed.strategy));
    records.throughputs.clear();
    for speed in records.speeds.iter_mut().filter(|speed| speed.forwards == 2) {
        speed.forwards = 1;
    }
    let note = "<li>n=auto drafts less in batches, where tokens per forward were counted; at batch 1, teacher rolling \
                n=auto had 2.00, student rolling n=auto had 8.00</li>";
    assert!(page_of(&records).contains(note), "{}", page_of(&records));
    records.speeds.clear();
    assert!(!page_of(&records).contains("n=auto drafts less"));
}

/// The synthetic records with nine more strategies, `slowness(n)` times as slow as the first.
fn with_more_strategies(slowness: fn(f64) -> f64) -> Records {
    let mut records = records();
    let of_jacobi = (records.answers.clone(), records.speeds.clone());
    for n in 5..=13 {
        let strategy = Strategy::Jacobi { n };
        let answers = of_jacobi.0.iter().filter(|answer| answer.strategy == JACOBI);
        let speeds = of_jacobi.1.iter().filter(|speed| speed.strategy == JACOBI);
        records.header.settings.strategies.push(strategy);
        records.answers.extend(answers.map(|answer| AnswerRecord { strategy, ..answer.clone() }));
        let slower = |speed: &SpeedRecord| SpeedRecord {
            strategy,
            seconds: speed.seconds * slowness(n as f64),
            ..speed.clone()
        };
        records.speeds.extend(speeds.map(slower));
    }
    records
}

/// The page of the report of some records, with spaces wherever it has some that keep lines from breaking.
fn page_of(records: &Records) -> String {
    let dir = tempfile::tempdir().unwrap();
    records.write(&dir.path().join(SAMPLES)).unwrap();
    atomic_file::write_json(&dir.path().join(RESULTS), &Results::from_records(records)).unwrap();
    report(&[dir.path().to_owned()], None, &[]).unwrap();
    let page = std::fs::read_to_string(dir.path().join("report.html")).unwrap();
    page.replace('\u{a0}', " ")
}

/// The figure of a page that has a title.
fn chart<'p>(page: &'p str, title: &str) -> Option<&'p str> {
    let mut figures = page.split("<figure>").filter_map(|rest| Some(rest.split_once("</figure>")?.0));
    figures.find(|figure| figure.contains(title))
}

#[test]
fn line_charts_keep_the_baseline_where_other_strategies_are_faster() {
    let page = page_of(&with_more_strategies(f64::recip));
    let title = "by answers decoded at once; the 7 fastest of 10 strategies besides the baseline";
    let lines = chart(&page, title).expect("the baseline has a line");
    assert!(lines.contains(">teacher ar<") && lines.contains(">student ar<"), "{lines}");
    let title = "Tokens per forward, by position in the answer";
    let lines = chart(&page, title).unwrap();
    assert!(lines.contains(">student jacobi n=7<") && !lines.contains(">student jacobi n=6<"), "{lines}");
}

#[test]
fn a_report_has_an_example_also_without_answers_of_the_baseline_and_the_fastest_strategy() {
    let mut records = with_more_strategies(|n| n);
    records.header.settings.strategies.retain(|strategy| *strategy != Strategy::Ar);
    records.answers.retain(|answer| answer.strategy != Strategy::Ar);
    records.speeds.retain(|speed| speed.strategy != Strategy::Ar);
    records.throughputs.clear();
    let of_fastest = records.answers.iter_mut().filter(|answer| answer.strategy == JACOBI);
    of_fastest.for_each(|answer| answer.forward_texts = None);
    // The fastest of each model among the others.
    let page = page_of(&records);
    let example = page.split_once("class=\"answers\"").unwrap().1;
    assert_eq!(example.matches("class=\"num-shown\"").count(), 2);
    assert!(example.contains("<p>teacher jacobi n=5:") && example.contains("<p>student jacobi n=5:"), "{example}");
}

#[test]
fn charts_have_lines_of_no_more_strategies_than_line_styles() {
    let page = page_of(&with_more_strategies(|n| n));
    let chart = |title: &str| chart(&page, title).unwrap();
    let lines =
        chart("Tokens per forward, by position in the answer; the 7 fastest of 10 strategies besides the baseline");
    assert!(lines.contains(">student jacobi n=10<") && !lines.contains("jacobi n=11"), "{lines}");
    // The example shows the baselines and the fastest strategies.
    assert_eq!(page.matches("class=\"num-shown\"").count(), 4);
    let styles: Vec<&str> = lines.matches("\"line student dash").collect();
    // A line and its legend for each strategy but autoregressive decoding, which accepts no drafts.
    assert_eq!((styles.len(), lines.contains("dash7")), (2 * 7, true), "{lines}");
    assert!(chart("Tokens per forward<").contains("student jacobi n=13"));
}

#[test]
fn the_card_begins_with_the_metadata_of_the_hub() {
    let (_dir, [.., card]) = rendered_report();
    let front = card.strip_prefix("---\n").and_then(|rest| rest.split_once("\n---\n")).unwrap().0;
    let value: Value = serde_saphyr::from_str(front).unwrap();
    assert_eq!((&value["library_name"], &value["base_model"]), (&"transformers".into(), &Value::Null), "{front}");
    let result = &value["model-index"][0]["results"][0];
    assert_eq!(value["model-index"][0]["name"], "s");
    assert_eq!(result["task"]["type"], "text-generation");
    assert_eq!((&result["dataset"]["type"], &result["dataset"]["split"]), (&"jsonl".into(), &"test".into()));
    let metrics: Vec<(&str, f64)> = result["metrics"]
        .as_array()
        .unwrap()
        .iter()
        .map(|metric| (metric["type"].as_str().unwrap(), metric["value"].as_f64().unwrap()))
        .collect();
    assert_eq!(metrics, [("accuracy", 50.0), ("tokens_per_forward", 4.0), ("speedup", 4.0)]);
}

#[test]
fn results_and_samples_of_another_version_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (results, samples) = (dir.path().join(RESULTS), dir.path().join(SAMPLES));
    let mut records = records();
    records.write(&samples).unwrap();
    let mut value = serde_json::to_value(Results::from_records(&records)).unwrap();
    value["schema_version"] = 7.into();
    atomic_file::write_json(&results, &value).unwrap();
    let error = report(std::slice::from_ref(&results), None, &[]).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("results.json: has schema version 7"), "{error}");
    value["schema_version"] = 2.into();
    atomic_file::write_json(&results, &value).unwrap();
    records.header.schema_version = 8;
    records.write(&samples).unwrap();
    let error = report(&[results], None, &[]).unwrap_err().to_string();
    assert!(error.contains("samples.jsonl: has schema version 8"), "{error}");
}

#[test]
fn a_file_of_another_kind_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other.json");
    std::fs::write(&path, "{}").unwrap();
    let error = report(&[path], None, &[]).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("other.json"), "{error}");
}
