//! Runs the built programs as a user does: on good and bad input, without space on the disk, and
//! interrupted.

use std::ffi::OsStr;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// An argument of a command line.
pub trait Argument: AsRef<OsStr> + Debug {}
impl<W: AsRef<OsStr> + Debug> Argument for W {}

/// One of the built programs, by its name.
pub struct Program(pub &'static str);

/// A run that ended.
pub struct FinishedProcess {
    /// `None` if a signal killed the process.
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Program {
    pub fn run(&self, arguments: &[impl Argument]) -> FinishedProcess {
        finished(self.command(&[]).args(arguments).output().unwrap())
    }

    /// Runs it, and asserts that it succeeds.
    #[track_caller]
    pub fn succeed(&self, arguments: &[impl Argument]) -> FinishedProcess {
        let run = self.run(arguments);
        assert_eq!(run.code, Some(0), "{arguments:?}: {}", run.stderr);
        run
    }

    /// Runs it, and asserts that it ends with this exit code and with an error message that
    /// contains these parts.
    #[track_caller]
    pub fn fail(&self, arguments: &[impl Argument], code: i32, parts: &[&str]) {
        self.run(arguments).assert_error(arguments, code, parts);
    }

    /// Runs it, asserts that it succeeds, and returns the most memory that it was seen to have, in
    /// bytes.
    #[track_caller]
    pub fn peak_memory(&self, arguments: &[impl Argument]) -> u64 {
        let mut child = self.command(&[]).args(arguments).stderr(Stdio::null()).spawn().unwrap();
        let mut peak = 0;
        loop {
            let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
            let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next());
            peak = peak.max(kilobytes.map_or(0, |number| number.parse::<u64>().unwrap() * 1024));
            if let Some(code) = child.try_wait().unwrap() {
                assert!(code.success(), "{arguments:?}");
                return peak;
            }
            std::thread::yield_now();
        }
    }

    /// Runs it where no file may have more than `blocks` of 512 bytes, so that a write fails midway
    /// as on a full disk.
    #[track_caller]
    pub fn fail_on_full_disk(&self, blocks: usize, arguments: &[impl Argument], parts: &[&str]) {
        let limit = format!("ulimit -f {blocks}; exec \"$@\"");
        let run = finished(self.command(&["sh", "-c", &limit, "sh"]).args(arguments).output().unwrap());
        run.assert_error(arguments, 3, &[parts, &["cannot be written", "run the same command again"]].concat());
    }

    /// Runs it with a stdout that cannot be written.
    #[track_caller]
    pub fn fail_on_full_stdout(&self, arguments: &[impl Argument]) {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let run = finished(self.command(&[]).args(arguments).stdout(full).output().unwrap());
        run.assert_error(arguments, 3, &["stdout: cannot be written"]);
    }

    /// Runs it until it handles `signal` ("INT", "TERM", "HUP") and `is_ready`, sends the signal, and
    /// asserts that it ends by itself with this exit code. A program leaves a hangup alone that was
    /// ignored before it was started, as `nohup` does, which the tests may have been started with.
    #[track_caller]
    pub fn interrupt(&self, arguments: &[impl Argument], signal: &str, code: i32, is_ready: impl Fn() -> bool) {
        let mut command = self.command(&["env", "--default-signal=HUP"]);
        let mut child = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        while !handles_signal(child.id(), signal) || !is_ready() {
            assert!(child.try_wait().unwrap().is_none(), "{arguments:?} ended before it could be stopped");
            std::thread::yield_now();
        }
        let sent = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        finished(child.wait_with_output().unwrap()).assert_error(
            arguments,
            code,
            &["interrupted", "run the same command again"],
        );
    }

    /// A command that runs the program, through the command `prefix` if it is not empty. With one
    /// thread, sums have the same rounding in every run, and tests do not compete for processors.
    pub fn command(&self, prefix: &[&str]) -> Command {
        let program = assert_cmd::cargo::cargo_bin(self.0).display().to_string();
        let words = [prefix, &[&program]].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
        command
    }
}

impl FinishedProcess {
    #[track_caller]
    fn assert_error(&self, arguments: &[impl Argument], code: i32, parts: &[&str]) {
        let message = &self.stderr;
        assert_eq!(self.code, Some(code), "{arguments:?}: {message}");
        assert!(self.stdout.is_empty(), "{arguments:?}: stdout is for data");
        assert!(message.contains("error: ") && !message.contains("internal error"), "{arguments:?}: {message}");
        for part in parts {
            assert!(message.contains(part), "{arguments:?}: `{part}` is not in: {message}");
        }
    }
}

/// Whether a process has installed its handler for a signal; before that, the signal would kill it.
pub fn handles_signal(process: u32, signal: &str) -> bool {
    let number = match signal {
        "HUP" => 1,
        "INT" => 2,
        _ => 15,
    };
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or_default();
    u64::from_str_radix(caught.trim(), 16).unwrap_or(0) >> (number - 1) & 1 == 1
}

fn finished(output: Output) -> FinishedProcess {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    FinishedProcess { code: output.status.code(), stdout: output.stdout, stderr }
}

/// `folder/name` as an argument.
pub fn path(folder: &Path, name: &str) -> String {
    folder.join(name).display().to_string()
}

/// Copies of a valid model, each damaged in one way, with the parts that the error message must
/// contain.
pub fn damaged_models(good: &Path, into: &Path) -> Vec<(String, Vec<&'static str>)> {
    let cut = |file: PathBuf| {
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    };
    let edit = |file: PathBuf, change: &dyn Fn(&mut Value)| {
        let mut value: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        change(&mut value);
        std::fs::write(&file, value.to_string()).unwrap();
    };
    let remove = |file: PathBuf| std::fs::remove_file(file).unwrap();
    type Damage<'d> = (&'d str, Box<dyn Fn(&Path) + 'd>, Vec<&'static str>);
    let damages: Vec<Damage<'_>> = vec![
        (
            "no-weights",
            Box::new(|model| remove(model.join("model.safetensors"))),
            vec!["no-weights", "holds neither model.safetensors nor"],
        ),
        (
            "cut-weights",
            Box::new(|model| cut(model.join("model.safetensors"))),
            vec!["cut-weights/model.safetensors", "not a complete safetensors file", "download it again"],
        ),
        (
            "other-family",
            Box::new(|model| edit(model.join("config.json"), &|config| config["model_type"] = "gpt2".into())),
            vec!["other-family/config.json", "`gpt2` is not supported", "use llama"],
        ),
        (
            "no-tokenizer",
            Box::new(|model| remove(model.join("tokenizer.json"))),
            vec!["no-tokenizer", "holds no tokenizer.json"],
        ),
        (
            "cut-tokenizer",
            Box::new(|model| cut(model.join("tokenizer.json"))),
            vec!["cut-tokenizer/tokenizer.json", "is not a readable tokenizer"],
        ),
        (
            "foreign-tokenizer",
            Box::new(|model| {
                edit(model.join("tokenizer.json"), &|file| file["model"]["vocab"]["foreign"] = 9999.into())
            }),
            vec!["foreign-tokenizer/tokenizer.json", "ids up to 9999", "belongs to another model"],
        ),
    ];
    let damaged = damages.into_iter().map(|(name, damage, parts)| {
        let model = into.join(name);
        copy_folder(good, &model);
        damage(&model);
        (model.display().to_string(), parts)
    });
    damaged.collect()
}

/// Copies the files of a folder.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (file, copy) = (entry.as_ref().unwrap().path(), to.join(entry.as_ref().unwrap().file_name()));
        if file.is_dir() {
            copy_folder(&file, &copy);
        } else {
            std::fs::copy(&file, &copy).unwrap();
        }
    }
}

/// A path below a regular file, where not even root can write.
pub fn unwritable_path(folder: &Path) -> String {
    std::fs::write(folder.join("file"), "").unwrap();
    path(folder, "file/output")
}
