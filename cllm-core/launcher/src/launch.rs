//! The steps from a fresh process to a restricted Python.

use std::ffi::CString;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::Resource;
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, chown, execve, setgroups, setresgid, setresuid, setsid};

use crate::protocol::{Greeting, LaunchOrder, Limits, Problem, PythonOrder, QueryReply};
use crate::{file_rules, limits, private_root, queries, system_calls};

const MAX_THREADS: u64 = 64;
const MAX_OPEN_FILES: u64 = 64;
/// The user id that a program has inside a user namespace.
const NAMESPACE_USER: u32 = 1000;
/// Files that Python opens besides those of [`PythonOrder::readable`].
const DEVICES: [&str; 2] = ["/dev/null", "/dev/urandom"];

/// Does what this process's argument orders, if it has one. Python replaces the process, so that a
/// return says that it could not start.
pub fn launch_if_requested() -> Option<ExitCode> {
    let order = std::env::args_os().nth(1)?;
    // If a problem cannot be written, the reader is gone.
    match serde_json::from_slice(order.as_bytes()) {
        Ok(LaunchOrder::Queries(limits)) => match queries::serve(&limits) {
            Ok(()) => return Some(ExitCode::SUCCESS),
            Err(problem) => drop(queries::reply(&QueryReply::Problem(problem))),
        },
        Ok(LaunchOrder::Python(order)) => drop(greet(&Greeting::Problem(become_python(&order)))),
        Err(error) => drop(greet(&Greeting::Problem(format!("the launcher has no valid order: {error}")))),
    }
    Some(ExitCode::from(3))
}

fn greet(greeting: &Greeting) -> Result<(), Problem> {
    let text = serde_json::to_string(greeting).map_err(|error| error.to_string())?;
    let mut out = std::io::stdout();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|error| format!("stdout cannot be written: {error}"))
}

/// Replaces this process by Python, and returns only if that fails.
fn become_python(order: &PythonOrder) -> Problem {
    let run = || -> Result<std::convert::Infallible, Problem> {
        let filter = system_calls::filter_of_harness()?;
        let arguments = ["-s", "-B", "-X", "utf8", "-c", &order.code, &filter].map(c_string);
        let arguments: Vec<CString> =
            std::iter::once(c_string(&order.python)).chain(arguments).collect::<Result<_, _>>()?;
        // So that a set of strings has the same order in every run.
        let environment = [c_string("PYTHONHASHSEED=0")?];
        let layers = restrict(order)?;
        greet(&Greeting::Layers(layers))?;
        // Last, since this process itself needs more memory than Python may have.
        limits::set_limit(Resource::RLIMIT_AS, order.limits.memory_bytes)?;
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

fn cannot(action: &str, error: impl std::fmt::Display) -> Problem {
    format!("the launcher cannot {action}: {error}")
}

/// Applies every layer that the kernel supports, and returns the names of those in force.
fn restrict(order: &PythonOrder) -> Result<Vec<String>, Problem> {
    setsid().map_err(|error| cannot("begin a session", error))?;
    umask(Mode::from_bits_truncate(0o022));
    let is_root = Uid::effective().is_root();
    let own_user = if is_root { unused_user() } else { None };
    let in_namespace = own_user.is_none() && enter_user_namespace();
    if is_root && own_user.is_none() && !in_namespace {
        return Err(cannot("give up being root", "run as an ordinary user"));
    }
    let namespace_user = in_namespace.then(|| (Uid::from_raw(NAMESPACE_USER), Gid::from_raw(NAMESPACE_USER)));
    let owner = own_user.or(namespace_user).unwrap_or((Uid::effective(), Gid::effective()));
    let mut layers = Vec::new();
    let mut add_layer = |name: &str, is_in_force: bool| {
        layers.extend(is_in_force.then(|| name.to_owned()));
        is_in_force
    };
    add_layer("user namespace", in_namespace);
    let others = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    add_layer("network namespace", unshare(others).is_ok());
    let mut readable = order.readable.clone();
    readable.extend(DEVICES.map(PathBuf::from));
    let entered = private_root::enter(&order.folder, &readable, order.limits.disk_bytes, owner);
    let has_private_root = add_layer("private root", entered.is_ok());
    let writable = if has_private_root { Path::new(private_root::WRITABLE) } else { &order.folder };
    std::env::set_current_dir(writable).map_err(|error| cannot("enter its folder", error))?;
    if let Some(own_user) = own_user {
        become_user(own_user, writable)
            .map_err(|error| cannot("give up being root, so run as an ordinary user", error))?;
    }
    add_layer("own user", own_user.is_some());
    // A change of user clears this, so it comes after.
    set_pdeathsig(Signal::SIGKILL).map_err(|error| cannot("end with the program that started it", error))?;
    let file_rules =
        file_rules::apply(&readable, Some(writable)).map_err(|error| cannot("set rules of files", error))?;
    if !add_layer("landlock", file_rules) && !has_private_root {
        return Err(
            "neither Landlock (Linux 5.13 or later) nor mount namespaces are available here, so the code of a model \
                    could read and change files, and does not run. Use a kernel or a container that permits one of them"
                .to_owned(),
        );
    }
    restrict_resources(&order.limits, own_user.is_some() || in_namespace)?;
    add_layer("limits", true);
    system_calls::restrict()?;
    add_layer("seccomp", true);
    Ok(layers)
}

/// A user id that nothing else runs as, so that the limit on its processes counts only those of one
/// program. It is near the end of the ids that exist here; `None` if there are too few.
fn unused_user() -> Option<(Uid, Gid)> {
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

/// Enters a user namespace, in which an ordinary user may create the other namespaces. The user
/// inside has no privileges.
fn enter_user_namespace() -> bool {
    let (user, group) = (Uid::effective(), Gid::effective());
    let map =
        |file: &str, id: u32| std::fs::write(Path::new("/proc/self").join(file), format!("{NAMESPACE_USER} {id} 1"));
    unshare(CloneFlags::CLONE_NEWUSER).is_ok()
        && std::fs::write("/proc/self/setgroups", "deny").is_ok()
        && map("uid_map", user.as_raw()).is_ok()
        && map("gid_map", group.as_raw()).is_ok()
}

/// `has_own_user`: no other process counts towards the limit of the user's threads.
fn restrict_resources(limits: &Limits, has_own_user: bool) -> Result<(), Problem> {
    limits::set_limit(Resource::RLIMIT_CORE, 0)?;
    limits::set_limit(Resource::RLIMIT_NOFILE, MAX_OPEN_FILES)?;
    limits::set_limit(Resource::RLIMIT_FSIZE, limits.disk_bytes)?;
    if has_own_user {
        limits::set_limit(Resource::RLIMIT_NPROC, MAX_THREADS)?;
    }
    let seconds = limits.cpu_seconds;
    // The soft limit sends a signal that says why; the hard limit kills.
    limits::set_limits(Resource::RLIMIT_CPU, seconds, seconds + 1)
}
