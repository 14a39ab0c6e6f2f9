//! The launcher: a process of this program that gives up everything that Python does not need, and then becomes Python.
//! What it gives up cannot be had again, and holds for all that Python does.

use std::ffi::{CString, OsString};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use landlock::{
    ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
    path_beneath_rules,
};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, chown, execve, setgroups, setresgid, setresuid, setsid};
use serde::{Deserialize, Serialize};

use super::{Limits, private_root, system_calls};

/// Why no code can run here, in words.
pub(super) type Problem = String;

/// Threads and open files of a program.
const MAX_THREADS: u64 = 64;
const MAX_OPEN_FILES: u64 = 64;
/// The user that a program is in a user namespace.
const INSIDE: u32 = 1000;
/// Files outside of `Order::readable` that Python opens.
const DEVICES: [&str; 2] = ["/dev/null", "/dev/urandom"];

/// What the launcher is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Order {
    pub(super) python: PathBuf,
    /// What it may read and execute.
    pub(super) readable: Vec<PathBuf>,
    /// An empty folder of its own.
    pub(super) folder: PathBuf,
    pub(super) limits: Limits,
}

/// What the launcher says on stdout before it becomes Python.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Greeting {
    /// The layers that hold.
    Layers(Vec<String>),
    /// Nothing runs.
    Problem(Problem),
}

/// Does what `order` says; returns only where that is impossible.
pub(super) fn launch(order: Option<OsString>) -> ExitCode {
    let text = order.and_then(|text| text.into_string().ok()).unwrap_or_default();
    let problem = match serde_json::from_str(&text) {
        Ok(order) => become_python(&order),
        Err(error) => format!("the launcher was started by hand: {error}"),
    };
    // Whoever reads is gone, if this fails.
    let _ = greet(&Greeting::Problem(problem));
    ExitCode::from(3)
}

fn greet(greeting: &Greeting) -> Result<(), Problem> {
    let text = serde_json::to_string(greeting).map_err(|error| error.to_string())?;
    let mut out = std::io::stdout();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|error| format!("stdout cannot be written: {error}"))
}

fn become_python(order: &Order) -> Problem {
    let run = || -> Result<std::convert::Infallible, Problem> {
        let arguments = ["-s", "-B", "-X", "utf8", "-c", include_str!("harness.py")].map(c_string);
        let arguments: Vec<CString> =
            std::iter::once(c_string(&order.python)).chain(arguments).collect::<Result<_, _>>()?;
        // A set of texts then has the same order each time.
        let environment = [c_string("PYTHONHASHSEED=0")?];
        let layers = restrict(order)?;
        greet(&Greeting::Layers(layers))?;
        // Last: this process itself is larger than what Python may take.
        limit(Resource::RLIMIT_AS, order.limits.memory_bytes)?;
        execve(&arguments[0], &arguments, &environment)
            .map_err(|error| cannot(&format!("become {}", order.python.display()), error))
    };
    match run() {
        Err(problem) => problem,
        Ok(never) => match never {},
    }
}

fn c_string(text: impl AsRef<std::ffi::OsStr>) -> Result<CString, Problem> {
    CString::new(text.as_ref().as_bytes()).map_err(|error| error.to_string())
}

fn cannot(what: &str, error: impl std::fmt::Display) -> Problem {
    format!("the launcher cannot {what}: {error}")
}

/// Applies every layer that the kernel has; the names of those that hold.
fn restrict(order: &Order) -> Result<Vec<String>, Problem> {
    setsid().map_err(|error| cannot("begin a session", error))?;
    umask(Mode::from_bits_truncate(0o022));
    let root = Uid::effective().is_root();
    let other = if root { other_user() } else { None };
    let namespace = other.is_none() && user_namespace();
    if root && other.is_none() && !namespace {
        return Err(cannot("give up being root", "run as an ordinary user"));
    }
    let inside = namespace.then(|| (Uid::from_raw(INSIDE), Gid::from_raw(INSIDE)));
    let owner = other.or(inside).unwrap_or((Uid::effective(), Gid::effective()));
    let mut layers = Vec::new();
    let mut note = |name: &str, holds: bool| {
        layers.extend(holds.then(|| name.to_owned()));
        holds
    };
    note("user namespace", namespace);
    let others = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    note("network namespace", unshare(others).is_ok());
    let mut readable = order.readable.clone();
    readable.extend(DEVICES.map(PathBuf::from));
    let entered = private_root::enter(&order.folder, &readable, order.limits.disk_bytes, owner);
    let private = note("private root", entered.is_ok());
    let writable = if private { Path::new(private_root::WRITABLE) } else { &order.folder };
    std::env::set_current_dir(writable).map_err(|error| cannot("enter its folder", error))?;
    if let Some(other) = other {
        become_user(other, writable)
            .map_err(|error| cannot("give up being root, so run as an ordinary user", error))?;
    }
    note("own user", other.is_some());
    // It is lost with a change of user, so it comes after.
    set_pdeathsig(Signal::SIGKILL).map_err(|error| cannot("end with the program that started it", error))?;
    let ruled = note("landlock", landlock(&readable, writable).map_err(|error| cannot("set rules of files", error))?);
    if !ruled && !private {
        return Err("neither Landlock (Linux 5.13 or later) nor a mount namespace is to be had here, so code of a model could read \
                    and change files: it is not run. Use a kernel or a container that permits one of them"
            .to_owned());
    }
    limits(&order.limits, other.is_some() || namespace)?;
    note("limits", true);
    system_calls::restrict()?;
    note("seccomp", true);
    Ok(layers)
}

/// A user that nothing else runs as, so that limits on its processes count those of one program: near the end of the ids that
/// there are here. None where there are too few.
fn other_user() -> Option<(Uid, Gid)> {
    let map = std::fs::read_to_string("/proc/self/uid_map").ok()?;
    let ranges = map.lines().filter_map(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        let (first, _, count) = (numbers.next()?.ok()?, numbers.next()?, numbers.next()?.ok()?);
        Some((count, first))
    });
    let (count, first) = ranges.max().filter(|&(count, _)| count > 1000)?;
    let id = first + count - 3 - std::process::id() % (count / 2);
    Some((Uid::from_raw(id), Gid::from_raw(id)))
}

fn become_user((user, group): (Uid, Gid), folder: &Path) -> nix::Result<()> {
    chown(folder, Some(user), Some(group))?;
    setgroups(&[])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)
}

/// A user namespace of its own, in which an ordinary user may have the other namespaces. Its user is none with privileges.
fn user_namespace() -> bool {
    let (user, group) = (Uid::effective(), Gid::effective());
    let map = |file: &str, id: u32| std::fs::write(Path::new("/proc/self").join(file), format!("{INSIDE} {id} 1"));
    unshare(CloneFlags::CLONE_NEWUSER).is_ok()
        && std::fs::write("/proc/self/setgroups", "deny").is_ok()
        && map("uid_map", user.as_raw()).is_ok()
        && map("gid_map", group.as_raw()).is_ok()
}

/// Files by Landlock: whether the kernel holds to it.
fn landlock(readable: &[PathBuf], writable: &Path) -> Result<bool, RulesetError> {
    // Taken as far as the kernel has them: files since 1, ports since 4, abstract sockets and signals since 6.
    let abi = ABI::V6;
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .add_rules(path_beneath_rules(readable, AccessFs::from_read(abi)))?
        .add_rules(path_beneath_rules(["/dev/null"], AccessFs::WriteFile))?
        .add_rules(path_beneath_rules([writable], AccessFs::from_all(abi)))?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// `alone`: nothing else counts as this user's.
fn limits(given: &Limits, alone: bool) -> Result<(), Problem> {
    limit(Resource::RLIMIT_CORE, 0)?;
    limit(Resource::RLIMIT_NOFILE, MAX_OPEN_FILES)?;
    limit(Resource::RLIMIT_FSIZE, given.disk_bytes)?;
    if alone {
        limit(Resource::RLIMIT_NPROC, MAX_THREADS)?;
    }
    let seconds = given.cpu_seconds;
    // At the first a signal that tells why; at the second the end.
    setrlimit(Resource::RLIMIT_CPU, seconds, seconds + 1).map_err(|error| cannot("limit its time", error))
}

fn limit(resource: Resource, most: u64) -> Result<(), Problem> {
    setrlimit(resource, most, most).map_err(|error| cannot(&format!("set {resource:?} to {most}"), error))
}
