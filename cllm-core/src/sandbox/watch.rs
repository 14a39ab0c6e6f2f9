//! Feeds a running program, reads what it says, and ends it when it takes too much.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rand::TryRng;
use rand::rngs::SysRng;

use super::launcher::Greeting;
use super::{Limits, ProgramOutcome};
use crate::{Error, Result, interrupt};

/// How often the folder, the clock and signals are looked at.
const TICK: u16 = 50;
/// A pipe takes this much without waiting when it takes anything.
const PIPE_WRITE: usize = 4096;
/// Kept of what the launcher and the harness say, and of what is printed.
const MAX_SAID: usize = 64 << 10;

/// What came of watching.
#[derive(Default)]
struct Heard {
    /// On the channel.
    said: Vec<u8>,
    /// What it printed, no more than an error of the launcher would take.
    printed: Vec<u8>,
    /// Of both.
    bytes: u64,
    /// Why it was ended, where it was.
    stopped: Option<ProgramOutcome>,
}

/// How the program ended, and the layers that held it. Nothing of it runs when this returns, and its folder is empty.
pub(super) fn to_the_end(
    mut child: Child,
    program: &str,
    folder: &Path,
    limits: &Limits,
) -> Result<(ProgramOutcome, Vec<String>)> {
    let token = token()?;
    let heard = feed_and_hear(&mut child, format!("{:<20}{program}{token}", program.len()).as_bytes(), folder, limits);
    // The launcher began a session, whose group has its number; before that it is killed alone.
    let group = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    let _ = killpg(group, Signal::SIGKILL);
    let _ = child.kill();
    let status = child.wait().map_err(Error::io("the sandbox"))?;
    empty(folder);
    let heard = heard?;
    let said = String::from_utf8_lossy(&heard.said);
    let (greeting, verdict) = said.split_once('\n').unwrap_or((&said, ""));
    let layers = match serde_json::from_str(greeting) {
        Ok(Greeting::Layers(layers)) => layers,
        Ok(Greeting::Problem(problem)) => return Err(Error::environment(format!("code cannot be run: {problem}"))),
        Err(_) => {
            let printed = String::from_utf8_lossy(&heard.printed);
            return Err(Error::environment(format!("the sandbox did not start ({status}): {}", printed.trim())));
        }
    };
    let ending = heard.stopped.unwrap_or_else(|| ending(verdict, &token, status));
    Ok((ending, layers))
}

/// What only a program that ran through is given.
fn token() -> Result<String> {
    let mut bytes = [0; 16];
    SysRng.try_fill_bytes(&mut bytes).map_err(|error| Error::environment(format!("no random numbers: {error}")))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn ending(verdict: &str, token: &str, status: ExitStatus) -> ProgramOutcome {
    match (verdict.trim_end().split_once(' ').unwrap_or((verdict.trim_end(), "")), status.signal()) {
        (("passed", given), _) if given == token => ProgramOutcome::Passed,
        (("wrong", ""), _) => ProgramOutcome::AssertionFailed,
        (("memory", ""), _) => ProgramOutcome::OutOfMemory,
        (("error", name), _) => ProgramOutcome::Exception(name.to_owned()),
        (_, Some(signal)) if signal == Signal::SIGXCPU as i32 => ProgramOutcome::TimedOut,
        (_, Some(signal)) => ProgramOutcome::Killed(signal),
        _ => ProgramOutcome::Exception("it left before its end".to_owned()),
    }
}

fn feed_and_hear(child: &mut Child, mut input: &[u8], folder: &Path, limits: &Limits) -> Result<Heard> {
    let started = Instant::now();
    let failed = |error: std::io::Error| Error::environment(format!("the sandbox cannot be watched: {error}"));
    let (mut stdin, mut stdout, mut stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let mut heard = Heard::default();
    while stdout.is_some() || stderr.is_some() {
        interrupt::check()?;
        heard.stopped = too_much(&heard, started.elapsed(), folder, limits);
        if heard.stopped.is_some() {
            break;
        }
        let [feed, listen, print] = ready(&stdin, &stdout, &stderr).map_err(|error| failed(error.into()))?;
        if let Some(pipe) = stdin.as_mut().filter(|_| feed) {
            // It may end without having read all.
            let written = pipe.write(&input[..input.len().min(PIPE_WRITE)]).unwrap_or(input.len());
            input = &input[written..];
        }
        stdin = stdin.filter(|_| !input.is_empty());
        heard.bytes += hear(&mut stdout, listen, &mut heard.said).map_err(failed)?;
        heard.bytes += hear(&mut stderr, print, &mut heard.printed).map_err(failed)?;
    }
    Ok(heard)
}

/// Reads once from a pipe that is `ready`, which closes at its end; how many bytes there were, of which `kept` takes what it has room for.
fn hear(pipe: &mut Option<impl Read>, ready: bool, kept: &mut Vec<u8>) -> std::io::Result<u64> {
    let Some(open) = pipe.as_mut().filter(|_| ready) else { return Ok(0) };
    let mut buffer = [0; 16 << 10];
    let count = open.read(&mut buffer)?;
    kept.extend_from_slice(&buffer[..count.min(MAX_SAID - kept.len())]);
    if count == 0 {
        *pipe = None;
    }
    Ok(count as u64)
}

/// Which of the pipes to write and read can be, after a tick at the latest.
fn ready(stdin: &Option<impl AsFd>, stdout: &Option<impl AsFd>, stderr: &Option<impl AsFd>) -> nix::Result<[bool; 3]> {
    let mut pipes = Vec::new();
    pipes.extend(stdin.as_ref().map(|pipe| (0, PollFd::new(pipe.as_fd(), PollFlags::POLLOUT))));
    pipes.extend(stdout.as_ref().map(|pipe| (1, PollFd::new(pipe.as_fd(), PollFlags::POLLIN))));
    pipes.extend(stderr.as_ref().map(|pipe| (2, PollFd::new(pipe.as_fd(), PollFlags::POLLIN))));
    let (places, mut watched): (Vec<usize>, Vec<PollFd<'_>>) = pipes.into_iter().unzip();
    match poll(&mut watched, PollTimeout::from(TICK)) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error),
    }
    let mut found = [false; 3];
    for (place, pipe) in places.into_iter().zip(&watched) {
        found[place] = pipe.any().unwrap_or(false);
    }
    Ok(found)
}

fn too_much(heard: &Heard, time: Duration, folder: &Path, limits: &Limits) -> Option<ProgramOutcome> {
    if heard.bytes > limits.output_bytes {
        return Some(ProgramOutcome::TooMuchOutput);
    }
    if time > limits.time {
        return Some(ProgramOutcome::TimedOut);
    }
    (size(folder).is_none_or(|bytes| bytes > limits.disk_bytes)).then_some(ProgramOutcome::TooMuchDisk)
}

/// Bytes of a folder's files, each with a page for itself; none where some of it cannot be read.
fn size(folder: &Path) -> Option<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder).ok()? {
        let entry = entry.ok()?;
        // What went away in the meantime takes no room.
        let Ok(found) = entry.metadata() else { continue };
        bytes += 4096 + if found.is_dir() { size(&entry.path())? } else { found.len() };
    }
    Some(bytes)
}

/// Removes what the program left; folders that it closed are opened first.
fn empty(folder: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let _ = std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700));
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            empty(&entry.path());
            let _ = std::fs::remove_dir(entry.path());
        } else {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
