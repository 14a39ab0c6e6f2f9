//! Feeds a program to its process, reads what comes back, and ends it when it exceeds a limit.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use cllm_launcher::{Greeting, Limits};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::{Error, Result, interrupt};

/// How often the folder, the clock and signals are checked.
const POLL_MILLISECONDS: u16 = 50;
/// A pipe that is ready accepts this much without blocking (PIPE_BUF of Linux).
const PIPE_BUF_BYTES: usize = 4096;
/// Maximum number of bytes of a pipe's output that are kept.
const MAX_KEPT_BYTES: usize = 64 << 10;
/// Bytes counted for each file in addition to its content, so that empty files count too.
const FILE_OVERHEAD_BYTES: u64 = 4096;

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProgramOutcome {
    /// It ran to its end.
    Passed,
    AssertionFailed,
    /// The name of another exception, or a message that it exited before its end.
    Exception(String),
    TimedOut,
    OutOfMemory,
    /// A signal ended it.
    Killed(i32),
    TooMuchOutput,
    TooMuchDisk,
}

/// The output of a process.
#[derive(Default)]
struct Output {
    /// Its stdout: the greeting of the launcher and the verdict of the judge.
    channel: Vec<u8>,
    /// Its stderr, which the program's own output goes to as well. An error of the launcher would
    /// be here.
    printed: Vec<u8>,
    /// Length of both, including the bytes that were not kept.
    num_bytes: u64,
    /// The limit that the process exceeded, if it was ended for that.
    exceeded: Option<ProgramOutcome>,
}

impl Output {
    /// Whether something follows the greeting.
    fn has_verdict(&self) -> bool {
        self.channel.iter().position(|&byte| byte == b'\n').is_some_and(|end| end + 1 < self.channel.len())
    }
}

/// Gives a process the texts that its harness reads, and runs it to its end. Returns how it ended,
/// and the names of the layers that were in force. Afterwards no process of it runs and `folder` is
/// empty.
pub(super) fn watch(
    mut child: Child,
    texts: [&str; 2],
    folder: &Path,
    limits: &Limits,
) -> Result<(ProgramOutcome, Vec<String>)> {
    let input = texts.map(|text| format!("{:<20}{text}", text.len())).concat();
    let output = exchange(&mut child, input.as_bytes(), folder, limits);
    // The launcher began a session, whose process group has the launcher's id. Until then it is a
    // single process.
    let group = Pid::from_raw(i32::try_from(child.id()).expect("Linux numbers processes with 32 bits"));
    let _ = killpg(group, Signal::SIGKILL);
    let _ = child.kill();
    let status = child.wait().map_err(Error::io("the sandbox"))?;
    remove_contents(folder);
    let output = output?;
    let text = String::from_utf8_lossy(&output.channel);
    let (greeting, verdict) = text.split_once('\n').unwrap_or((&text, ""));
    let layers = match serde_json::from_str(greeting) {
        Ok(Greeting::Layers(layers)) => layers,
        Ok(Greeting::Problem(problem)) => return Err(Error::environment(format!("code cannot be run: {problem}"))),
        Err(_) => {
            let printed = String::from_utf8_lossy(&output.printed);
            return Err(Error::environment(format!("the sandbox did not start ({status}): {}", printed.trim())));
        }
    };
    let outcome = output.exceeded.unwrap_or_else(|| outcome(verdict, status));
    Ok((outcome, layers))
}

fn outcome(verdict: &str, status: ExitStatus) -> ProgramOutcome {
    let verdict = verdict.trim_end();
    match (verdict.split_once(' ').unwrap_or((verdict, "")), status.signal()) {
        (("passed", ""), _) => ProgramOutcome::Passed,
        (("assertion", ""), _) => ProgramOutcome::AssertionFailed,
        (("memory", ""), _) => ProgramOutcome::OutOfMemory,
        (("error", name), _) => ProgramOutcome::Exception(name.to_owned()),
        (_, Some(signal)) if signal == Signal::SIGXCPU as i32 => ProgramOutcome::TimedOut,
        (_, Some(signal)) => ProgramOutcome::Killed(signal),
        _ => ProgramOutcome::Exception("it left before its end".to_owned()),
    }
}

/// Writes `input` to the process and reads its output until it exceeds a limit, or the judge, which
/// alone holds stdout, ends after its verdict. Without a verdict, the program ends too, and says how.
fn exchange(child: &mut Child, mut input: &[u8], folder: &Path, limits: &Limits) -> Result<Output> {
    let started = Instant::now();
    let failed = |error: std::io::Error| Error::environment(format!("the sandbox cannot be watched: {error}"));
    let (mut stdin, mut stdout, mut stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let mut output = Output::default();
    while stdout.is_some() || (stderr.is_some() && !output.has_verdict()) {
        interrupt::check()?;
        output.exceeded = exceeded_limit(&output, started.elapsed(), folder, limits);
        if output.exceeded.is_some() {
            break;
        }
        let ready = wait_for_pipes(&stdin, &stdout, &stderr).map_err(|error| failed(error.into()))?;
        if let Some(pipe) = stdin.as_mut().filter(|_| ready.stdin) {
            // The process may end before it has read everything.
            let written = pipe.write(&input[..input.len().min(PIPE_BUF_BYTES)]).unwrap_or(input.len());
            input = &input[written..];
        }
        stdin = stdin.filter(|_| !input.is_empty());
        if ready.stdout {
            output.num_bytes += read_once(&mut stdout, &mut output.channel).map_err(failed)?;
        }
        if ready.stderr {
            output.num_bytes += read_once(&mut stderr, &mut output.printed).map_err(failed)?;
        }
    }
    Ok(output)
}

/// Reads once from a pipe, and closes it at its end. Returns the number of bytes read. `kept` gets
/// as many of them as it has room for.
fn read_once(pipe: &mut Option<impl Read>, kept: &mut Vec<u8>) -> std::io::Result<u64> {
    let Some(open) = pipe else { return Ok(0) };
    let mut buffer = [0; 16 << 10];
    let count = open.read(&mut buffer)?;
    kept.extend_from_slice(&buffer[..count.min(MAX_KEPT_BYTES - kept.len())]);
    if count == 0 {
        *pipe = None;
    }
    Ok(count as u64)
}

/// Which pipes can be used without blocking.
#[derive(Default)]
struct Ready {
    stdin: bool,
    stdout: bool,
    stderr: bool,
}

/// Waits until one of the pipes can be used, but not longer than one interval.
fn wait_for_pipes(
    stdin: &Option<impl AsFd>,
    stdout: &Option<impl AsFd>,
    stderr: &Option<impl AsFd>,
) -> nix::Result<Ready> {
    let mut ready = Ready::default();
    let (mut polled, mut flags) = (Vec::new(), Vec::new());
    if let Some(pipe) = stdin {
        polled.push(PollFd::new(pipe.as_fd(), PollFlags::POLLOUT));
        flags.push(&mut ready.stdin);
    }
    if let Some(pipe) = stdout {
        polled.push(PollFd::new(pipe.as_fd(), PollFlags::POLLIN));
        flags.push(&mut ready.stdout);
    }
    if let Some(pipe) = stderr {
        polled.push(PollFd::new(pipe.as_fd(), PollFlags::POLLIN));
        flags.push(&mut ready.stderr);
    }
    match poll(&mut polled, PollTimeout::from(POLL_MILLISECONDS)) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error),
    }
    for (flag, pipe) in flags.into_iter().zip(&polled) {
        *flag = pipe.any().unwrap_or(false);
    }
    Ok(ready)
}

fn exceeded_limit(output: &Output, elapsed: Duration, folder: &Path, limits: &Limits) -> Option<ProgramOutcome> {
    if output.num_bytes > limits.output_bytes {
        return Some(ProgramOutcome::TooMuchOutput);
    }
    if elapsed > limits.wall_time {
        return Some(ProgramOutcome::TimedOut);
    }
    let is_too_large = folder_bytes(folder).is_none_or(|bytes| bytes > limits.disk_bytes);
    is_too_large.then_some(ProgramOutcome::TooMuchDisk)
}

/// Size of a folder's files; `None` if some of it cannot be read.
fn folder_bytes(folder: &Path) -> Option<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder).ok()? {
        let entry = entry.ok()?;
        // A file that was removed in the meantime has no size.
        let Ok(metadata) = entry.metadata() else { continue };
        bytes += FILE_OVERHEAD_BYTES;
        bytes += if metadata.is_dir() { folder_bytes(&entry.path())? } else { metadata.len() };
    }
    Some(bytes)
}

/// Removes everything in a folder. The program may have taken away the permissions of its folders.
fn remove_contents(folder: &Path) {
    let _ = std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700));
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_contents(&entry.path());
            let _ = std::fs::remove_dir(entry.path());
        } else {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
