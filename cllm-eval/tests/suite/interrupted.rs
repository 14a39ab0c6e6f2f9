//! Signals and full disks: an interrupted run keeps its answers, and the same command completes it
//! with the same results.

use std::fs;
use std::path::Path;

use cllm_eval::records::Records;
use cllm_eval::results::Results;
use serde_json::json;

use crate::made_up::{model, records};
use cllm_testing::programs::{Program, path};

const EVAL: Program = Program("cllm-eval");
/// How many bits of a file are flipped, one at a time.
const NUM_FLIPPED_BITS: usize = 120;

fn lines(output: &str) -> usize {
    fs::read_to_string(Path::new(output).join("samples.jsonl")).unwrap_or_default().lines().count()
}

/// The answers and the timings, without the seconds.
fn answers(output: &str) -> Vec<String> {
    let records = Records::read(&Path::new(output).join("samples.jsonl")).unwrap();
    let answers = records.answers.iter().map(|answer| {
        format!(
            "{:?}",
            (answer.role, answer.strategy, &answer.id, &answer.response_ids, answer.verdict, &answer.accepted)
        )
    });
    let speeds = records.speeds.iter();
    answers.chain(speeds.map(|speed| format!("{:?}", (speed.role, speed.strategy, &speed.id, speed.tokens)))).collect()
}

#[test]
fn every_flipped_bit_of_a_run_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let (teacher, output) = (path(dir.path(), "teacher"), dir.path().join("eval"));
    model(Path::new(&teacher), 1);
    let fixed = ["run", "num_problems=2", "max_new_tokens=8", "num_speed_examples=1", "device=cpu"];
    let run = [&fixed.map(str::to_owned)[..], &[format!("teacher={teacher}"), format!("output={}", output.display())]]
        .concat();
    EVAL.succeed(&run);
    let (samples, results) = (output.join("samples.jsonl"), output.join("results.json"));
    let whole = (Records::read(&samples).unwrap(), Results::read(&results).unwrap());
    let read = |file: &Path| match file == samples {
        true => Records::read(file).map(|records| records == whole.0),
        false => Results::read(file).map(|results| results == whole.1),
    };
    for file in [&samples, &results] {
        let bytes = fs::read(file).unwrap();
        let mut num_refused = 0;
        for place in 0..NUM_FLIPPED_BITS {
            let mut flipped = bytes.clone();
            flipped[place * bytes.len() / NUM_FLIPPED_BITS] ^= 1 << (place % 8);
            fs::write(file, flipped).unwrap();
            match read(file) {
                // The name of the checksum itself, which no one reads.
                Ok(is_equal) => assert!(is_equal, "{file:?}: a bit flipped at place {place} changed what is read"),
                Err(error) => {
                    assert!(error.to_string().contains(&file.display().to_string()), "{error}");
                    // A flipped top bit leaves no UTF-8.
                    assert!(place % 8 != 7 || error.to_string().contains("is damaged, or was changed"), "{error}");
                    num_refused += 1;
                }
            }
        }
        assert!(num_refused > NUM_FLIPPED_BITS * 9 / 10, "{file:?}: {num_refused} of {NUM_FLIPPED_BITS} were refused");
        fs::write(file, bytes).unwrap();
    }
    // As good a text as any other: only the checksum tells.
    let text = fs::read_to_string(&samples).unwrap();
    let damaged = |before: &str, now: &str| {
        let damaged = text.replacen(before, now, 1);
        assert_ne!(damaged, text);
        fs::write(&samples, &damaged).unwrap();
        damaged
    };
    let folder = output.display().to_string();
    let (score, report) = (["score".to_owned(), folder.clone()], ["report".to_owned(), folder]);
    damaged("\"examples\":2", "\"examples\":3");
    for arguments in [&run[..], &score, &report] {
        EVAL.fail(arguments, 2, &["samples.jsonl: line 1 is damaged, or was changed", "restore the file from a copy"]);
    }
    let damaged = damaged("\"verdict\":\"incorrect\"", "\"verdict\":\"correct\"");
    for arguments in [&run[..], &score, &report] {
        EVAL.fail(arguments, 2, &["samples.jsonl: line ", "is damaged, or was changed", "delete the line"]);
    }
    // As it says: the line is deleted, and the command makes it again.
    let intact: Vec<_> = text.lines().zip(damaged.lines()).filter(|(before, now)| before == now).collect();
    fs::write(&samples, intact.iter().map(|(line, _)| format!("{line}\n")).collect::<String>()).unwrap();
    for arguments in [&score, &report] {
        let log = EVAL.succeed(arguments).stderr;
        assert!(log.contains("teacher ar has 1 of 2 answers: run the same `cllm-eval run` again"), "{log}");
    }
    // What makes the answer again also writes damaged results again.
    fs::write(&results, fs::read_to_string(&results).unwrap().replacen("\"examples\": 2", "\"examples\": 3", 1))
        .unwrap();
    EVAL.fail(&report, 2, &["results.json: is damaged", "the same `cllm-eval run` writes it again from samples.jsonl"]);
    EVAL.succeed(&run);
    EVAL.succeed(&report);
    assert_eq!(answers(&output.display().to_string()).len(), whole.0.answers.len() + whole.0.speeds.len());
    let mut of_no_example = whole.0;
    of_no_example.answers[0].index = 99;
    of_no_example.write(&samples).unwrap();
    EVAL.fail(&run, 2, &["samples.jsonl: line 2 ", "its index is 99, and there are 2 examples"]);
}

#[test]
fn a_run_interrupted_by_signals_and_a_full_disk_equals_one_that_was_not() {
    let dir = tempfile::tempdir().unwrap();
    let (teacher, student) = (path(dir.path(), "teacher"), path(dir.path(), "student"));
    model(Path::new(&teacher), 1);
    model(Path::new(&student), 2);
    let (whole, stopped) = (path(dir.path(), "whole"), path(dir.path(), "stopped"));
    // Not queries: the executable that runs them is larger than a file may be on that disk.
    let prompts = path(dir.path(), "prompts.jsonl");
    let row = |index: usize| {
        json!({ "id": index.to_string(), "source": "gsm8k/test", "prompt": format!("{index} + 2 ="), "reference": "#### 4" })
            .to_string()
    };
    fs::write(&prompts, (0..30).map(row).collect::<Vec<_>>().join("\n")).unwrap();
    let run = |output: &str| {
        let fixed = ["run", "max_new_tokens=24", "batch_size=2", "num_speed_examples=4", "device=cpu"];
        let given = [
            format!("prompts={prompts}"),
            format!("teacher={teacher}"),
            format!("student={student}"),
            format!("output={output}"),
        ];
        [&fixed.map(str::to_owned)[..], &given].concat()
    };
    EVAL.interrupt(&run(&stopped), "INT", 130, || lines(&stopped) >= 4);
    let first = fs::read_to_string(Path::new(&stopped).join("samples.jsonl")).unwrap();
    let kept = lines(&stopped);
    EVAL.interrupt(&run(&stopped), "TERM", 143, || lines(&stopped) >= kept + 4);
    let size = fs::metadata(Path::new(&stopped).join("samples.jsonl")).unwrap().len();
    assert!(lines(&stopped) < 1 + 4 * 30, "it was stopped midway");
    assert!(!Path::new(&stopped).join("results.json").exists());
    EVAL.fail_on_full_disk(size as usize / 512 + 8, &run(&stopped), &["samples.jsonl", "finished answers are kept"]);
    EVAL.succeed(&run(&stopped));
    EVAL.succeed(&run(&whole));
    assert_eq!(answers(&stopped), answers(&whole));
    let text = fs::read_to_string(Path::new(&stopped).join("samples.jsonl")).unwrap();
    assert!(first.lines().all(|line| text.contains(line)), "answers are made once");
    assert!(Path::new(&stopped).join("results.json").exists());
    let (before, again) = (fs::read(Path::new(&whole).join("results.json")).unwrap(), EVAL.succeed(&run(&whole)));
    assert!(again.stderr.contains("already complete: ") && !again.stdout.is_empty(), "{}", again.stderr);
    assert_eq!(fs::read(Path::new(&whole).join("results.json")).unwrap(), before);
    EVAL.fail(
        &[&run(&whole)[..], &["max_new_tokens=23".to_owned()]].concat(),
        2,
        &["max_new_tokens=24; this command says 23"],
    );
}

#[test]
fn a_folder_with_files_of_the_user_is_never_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let [teacher, project, output] = ["teacher", "project", "output"].map(|name| path(dir.path(), name));
    model(Path::new(&teacher), 1);
    fs::create_dir(&project).unwrap();
    for name in ["report.md", "config.yaml"] {
        fs::write(Path::new(&project).join(name), "mine").unwrap();
    }
    let run = |output: &str| {
        let fixed =
            ["run", "num_problems=2", "max_new_tokens=4", "num_speed_examples=0", "device=cpu", "strategies=[ar]"];
        [&fixed.map(str::to_owned)[..], &[format!("teacher={teacher}"), format!("output={output}")]].concat()
    };
    EVAL.succeed(&run(&output));
    let suite =
        ["suite".to_owned(), format!("teacher={teacher}"), format!("data={teacher}"), format!("output={project}")];
    let report = ["report", &output, "--output", &project].map(str::to_owned);
    for command in [run(&project), suite.to_vec(), report.to_vec()] {
        EVAL.fail(&command, 2, &[&project, "holds files that this command did not write (config.yaml, report.md)"]);
    }
    assert_eq!(fs::read_dir(&project).unwrap().count(), 2);
    // A report may be drawn again.
    let report = ["report", &output, "--output", &path(dir.path(), "report")].map(str::to_owned);
    EVAL.succeed(&report);
    EVAL.succeed(&report);
}

#[test]
fn timings_of_two_machines_are_not_mixed() {
    let dir = tempfile::tempdir().unwrap();
    let (teacher, output) = (path(dir.path(), "teacher"), path(dir.path(), "output"));
    model(Path::new(&teacher), 1);
    let given = [format!("teacher={teacher}"), format!("output={output}")];
    let run = [
        &["run", "num_problems=2", "max_new_tokens=4", "num_speed_examples=1", "device=cpu"].map(str::to_owned)[..],
        &given,
    ]
    .concat();
    EVAL.succeed(&run);
    let samples = Path::new(&output).join("samples.jsonl");
    let whole = Records::read(&samples).unwrap();
    let mut elsewhere = whole.clone();
    elsewhere.header.hardware.cpu = "Abacus 3000".to_owned();
    elsewhere.speeds.pop();
    elsewhere.write(&samples).unwrap();
    EVAL.fail(&run, 2, &["samples.jsonl", "Abacus 3000", &whole.header.hardware.cpu, "another `output`"]);
    assert_eq!(Records::read(&samples).unwrap(), elsewhere, "nothing is lost");
    elsewhere.header.hardware = whole.header.hardware.clone();
    elsewhere.header.toolkit.version = "0.0.1".to_owned();
    elsewhere.write(&samples).unwrap();
    EVAL.fail(&run, 2, &["cllm 0.0.1", "another `output`"]);
    elsewhere.header.toolkit = whole.header.toolkit.clone();
    elsewhere.write(&samples).unwrap();
    EVAL.succeed(&run);
}

#[test]
fn other_prompts_are_named_by_their_setting_if_it_has_changed() {
    let dir = tempfile::tempdir().unwrap();
    let [teacher, output, first, second] = ["teacher", "run", "a.jsonl", "b.jsonl"].map(|name| path(dir.path(), name));
    model(Path::new(&teacher), 1);
    let row = |prompt: &str| json!({ "id": "0", "prompt": prompt }).to_string();
    fs::write(&first, row("1 + 2 =")).unwrap();
    fs::write(&second, row("3 + 4 =")).unwrap();
    let run = |data: &str| {
        let fixed = ["run", "benchmark=jsonl", "max_new_tokens=4", "num_speed_examples=0", "device=cpu"];
        let given = [format!("teacher={teacher}"), format!("output={output}"), format!("data={data}")];
        [&fixed.map(str::to_owned)[..], &given].concat()
    };
    EVAL.succeed(&run(&first));
    EVAL.fail(&run(&second), 2, &[&format!("was started with data={first}; this command says {second}")]);
    fs::write(&first, row("3 + 4 =")).unwrap();
    EVAL.fail(&run(&first), 2, &["was started with other prompts"]);
}

#[test]
fn a_last_line_that_was_cut_off_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let (run, samples) = (path(dir.path(), "run"), dir.path().join("run/samples.jsonl"));
    fs::create_dir(&run).unwrap();
    records().write(&samples).unwrap();
    EVAL.succeed(&["score", &run]);
    let whole = fs::read(&samples).unwrap();
    let commands = [vec!["report", &run], vec!["score", &run]];
    for (num_missing, is_cut) in [(2, true), (40, true), (1, false), (0, false)] {
        for command in &commands {
            fs::write(&samples, &whole[..whole.len() - num_missing]).unwrap();
            let log = EVAL.succeed(command).stderr;
            let warning = "samples.jsonl: its last line was cut off: run the same `cllm-eval run` again";
            assert_eq!(log.contains(warning), is_cut, "{num_missing} bytes less, {command:?}: {log}");
        }
        assert_eq!(
            Records::read(&samples).unwrap().throughputs.len(),
            records().throughputs.len() - usize::from(is_cut)
        );
    }
    // Only the last line can be cut.
    let text = String::from_utf8(whole).unwrap().replacen("\"}\n", "\n", 1);
    fs::write(&samples, text).unwrap();
    for command in commands {
        EVAL.fail(&command, 2, &["samples.jsonl: line 1 "]);
    }
}

#[test]
fn a_run_that_ended_before_its_first_answer_does_not_block_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (teacher, output) = (path(dir.path(), "teacher"), path(dir.path(), "output"));
    model(Path::new(&teacher), 1);
    let run = |seed: &str| {
        let given = [format!("teacher={teacher}"), format!("output={output}"), seed.to_owned()];
        [
            &["run", "num_problems=2", "max_new_tokens=4", "num_speed_examples=0", "device=cpu"].map(str::to_owned)[..],
            &given,
        ]
        .concat()
    };
    EVAL.succeed(&run("seed=1"));
    let samples = Path::new(&output).join("samples.jsonl");
    EVAL.fail(&run("seed=2"), 2, &["samples.jsonl", "was started with seed=1", "this command says 2"]);
    let whole = fs::read_to_string(&samples).unwrap();
    let header = whole.lines().next().unwrap().to_owned() + "\n";
    // A machine that went down may leave only the header, half of it, or an empty file.
    for left in [&header[..], &header[..40], ""] {
        fs::write(&samples, left).unwrap();
        EVAL.succeed(&run("seed=2"));
    }
    for left in [&header[..40], ""] {
        fs::write(&samples, left).unwrap();
        EVAL.fail(&["score", &output], 2, &["samples.jsonl", "holds no answers yet", "the same `cllm-eval run`"]);
    }
    let answers: String = whole.lines().skip(1).map(|line| line.to_owned() + "\n").collect();
    fs::write(&samples, &answers).unwrap();
    EVAL.fail(&run("seed=2"), 2, &["samples.jsonl", "no header line", "another `output`"]);
    assert_eq!(fs::read_to_string(&samples).unwrap(), answers, "nothing is lost");
}
