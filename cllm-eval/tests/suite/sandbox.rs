//! The sandbox against malicious programs: none achieves anything or leaves anything behind, and
//! the next program runs.

use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cllm_core::sandbox::{Limits, ProgramOutcome, Sandbox};
use rayon::prelude::*;

use cllm_testing::programs::path;

/// Only one test at a time runs programs, so that each can check that none is left.
static ALONE: Mutex<()> = Mutex::new(());

pub fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A sandbox with low limits. Its launcher has limits of its own, in case those of the sandbox
/// fail.
fn sandbox(folder: &Path) -> Sandbox {
    let script = "#!/bin/sh\nulimit -t 60 -f 2000000 -u 4096\nexec \"$@\"\n";
    started_by(folder, script, Path::new("python3")).unwrap()
}

/// The same sandbox, whose launcher a script starts.
fn started_by(folder: &Path, script: &str, python: &Path) -> cllm_core::Result<Sandbox> {
    let wrapper = PathBuf::from(path(folder, "wrapper"));
    std::fs::write(&wrapper, script).unwrap();
    std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755)).unwrap();
    let limits =
        Limits { wall_time: Duration::from_secs(6), cpu_seconds: 2, memory_bytes: 256 << 20, ..Limits::default() };
    Sandbox::open_with(python, limits, Some(&wrapper))
}

/// Number of processes that run the harness. A child that escaped would keep its command line.
pub fn left_running() -> usize {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines.filter(|line| String::from_utf8_lossy(line).contains("Runs a program that a model wrote")).count()
}

fn error(name: &str) -> ProgramOutcome {
    ProgramOutcome::Exception(name.to_owned())
}

/// Runs programs that pass only if they achieve what they try.
#[track_caller]
fn none_passes<'p>(sandbox: &Sandbox, programs: &[(&'p str, &[ProgramOutcome])]) {
    let other = |&(program, allowed): &(&'p str, &[ProgramOutcome])| {
        let ending = sandbox.run(program).unwrap();
        (!allowed.contains(&ending)).then_some((program, ending))
    };
    let escaped: Vec<_> = programs.par_iter().filter_map(other).collect();
    assert!(escaped.is_empty(), "{escaped:#?}");
    assert_eq!(left_running(), 0);
    assert_eq!(sandbox.run("assert 1 + 1 == 2").unwrap(), ProgramOutcome::Passed);
}

#[test]
fn a_harmless_program_has_what_it_needs() {
    let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
    let sandbox = sandbox(dir.path());
    assert!(sandbox.layers().contains(&"seccomp".to_owned()), "{:?}", sandbox.layers());
    let long = format!("x = '{}'\nassert len(x) == 300000", "é".repeat(300_000));
    for program in [
        "import math, re, json, collections, itertools, functools, heapq, hashlib, random, decimal, datetime, typing, statistics",
        "import asyncio\nassert asyncio.run(asyncio.sleep(0, 5)) == 5",
        "import threading\nfound = []\nt = threading.Thread(target=found.append, args=(1,))\nt.start()\nt.join()\nassert found == [1]",
        "import tempfile\nwith tempfile.TemporaryDirectory() as d:\n    open(d + '/a', 'w').write('x')\n    assert open(d + '/a').read() == 'x'",
        "print('printed', flush=True)\nimport sys\nassert sys.stdin.read() == ''",
        "import os\nos.mkdir('deep')\nopen('deep/file', 'w').write('x')",
        "assert list({'a', 'b', 'c', 'd'}) == list({'a', 'b', 'c', 'd'})",
        &long,
    ] {
        assert_eq!(sandbox.run(program).unwrap(), ProgramOutcome::Passed, "{program:.200}");
    }
    // The order of a set of strings is always the same, and so is a verdict that depends on it.
    let first = sandbox.run("raise type(''.join({'a', 'b', 'c', 'd', 'e', 'f', 'g'}), (Exception,), {})()").unwrap();
    assert_eq!(
        sandbox.run("raise type(''.join({'a', 'b', 'c', 'd', 'e', 'f', 'g'}), (Exception,), {})()").unwrap(),
        first
    );
}

/// A virtual environment with the module `inside`, and a link to a folder with the module `outside`.
fn virtual_environment(folder: &Path) -> PathBuf {
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    let environment = folder.join("environment");
    let made = Command::new("python3").args(["-m", "venv", "--without-pip"]).arg(&environment).status().unwrap();
    assert!(made.success());
    let python = environment.join("bin/python3");
    let ask = "import sysconfig\nprint(sysconfig.get_path('purelib'), end='')";
    let packages = Command::new(&python).args(["-c", ask]).output().unwrap().stdout;
    let packages = PathBuf::from(String::from_utf8(packages).unwrap());
    std::fs::write(packages.join("inside.py"), "value = 5\n").unwrap();
    let elsewhere = folder.join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::write(elsewhere.join("outside.py"), "value = 6\n").unwrap();
    std::fs::write(packages.join("linked.pth"), elsewhere.to_str().unwrap()).unwrap();
    python
}

#[test]
fn packages_of_a_virtual_environment_are_found_or_named_as_lost() {
    let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
    let python = virtual_environment(dir.path());
    let sandbox = Sandbox::open_with(&python, Limits::default(), None).unwrap();
    assert_eq!(sandbox.python(), python);
    assert_eq!(sandbox.run("import inside\nassert inside.value == 5").unwrap(), ProgramOutcome::Passed);
    assert_eq!(sandbox.run("import outside").unwrap(), error("ModuleNotFoundError"));
    let lost = sandbox.lost_packages();
    assert!(lost.len() == 1 && lost[0].contains("elsewhere"), "{lost:?}");
    let write = format!("open('{}', 'w')", python.with_file_name("new").display());
    assert_ne!(sandbox.run(&write).unwrap(), ProgramOutcome::Passed);
    // If that Python cannot run, the system's does, and whoever asked for its packages is told.
    let missing = dir.path().join("python3");
    let lost = Sandbox::open_with(&missing, Limits::default(), None).unwrap().lost_packages().to_vec();
    assert!(lost[0].contains(missing.to_str().unwrap()), "{lost:?}");
}

#[test]
fn processes_and_threads_are_bounded() {
    let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
    let refused = &[error("OSError")][..];
    none_passes(
        &sandbox(dir.path()),
        &[
            (
                "import os, time\nfor _ in range(40):\n    if os.fork() == 0:\n        time.sleep(3)\n        os._exit(0)",
                refused,
            ),
            ("import subprocess\nsubprocess.Popen(['sleep', '3'])", refused),
            ("import multiprocessing\np = multiprocessing.Process(target=print)\np.start()\np.join()", refused),
            (
                "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(3)\n    os._exit(0)",
                refused,
            ),
            (
                "import threading, time\nfor _ in range(3000):\n    threading.Thread(target=time.sleep, args=(3,), daemon=True).start()",
                &[error("RuntimeError")],
            ),
            ("import os\nos.kill(os.getppid(), 9)", refused),
            ("import os\nos.kill(-1, 9)", refused),
            ("import os\nos.killpg(os.getpgid(0), 9)", refused),
            ("import os\nos.kill(os.getpid(), 9)", &[ProgramOutcome::Killed(9)]),
            ("import os\nos.execv('/usr/bin/true', ['true'])", &[error("it left before its end")]),
        ],
    );
}

#[test]
fn memory_disk_time_and_output_are_bounded() {
    let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
    let full = &[error("OSError"), ProgramOutcome::TooMuchDisk][..];
    let late = &[ProgramOutcome::TimedOut][..];
    none_passes(
        &sandbox(dir.path()),
        &[
            ("bytearray(3 << 30)", &[ProgramOutcome::OutOfMemory]),
            ("kept = []\nfor _ in range(3000):\n    kept.append(bytearray(1 << 20))", &[ProgramOutcome::OutOfMemory]),
            ("f = open('a', 'wb')\nfor _ in range(300):\n    f.write(bytes(1 << 20))", full),
            ("import time\nfor i in range(10000):\n    open(str(i), 'w').write('x' * 4000)\ntime.sleep(100000)", full),
            ("import time\nfor i in range(20000):\n    open(str(i), 'w')\ntime.sleep(100000)", full),
            ("import time\ntime.sleep(100000)", late),
            ("while True: pass", late),
            (
                "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n\
                 time.sleep(100000)",
                late,
            ),
            (
                "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
                &[ProgramOutcome::TimedOut, ProgramOutcome::Killed(9)],
            ),
            ("while True: print('x' * 1000)", &[ProgramOutcome::TooMuchOutput]),
            ("import os\nwhile True: os.write(1, b'x' * 1000)", &[ProgramOutcome::TooMuchOutput]),
            (
                "import os\nfor fd in range(3, 64):\n    try:\n        while True: os.write(fd, b'x' * 1000)\n    except OSError: pass",
                &[error("it left before its end"), ProgramOutcome::Killed(9)],
            ),
            ("def f(): f()\nf()", &[error("RecursionError")]),
        ],
    );
}

#[test]
fn files_network_and_environment_cannot_be_reached() {
    let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let canary = PathBuf::from(path(dir.path(), "canary"));
    std::fs::write(&canary, "alive").unwrap();
    std::fs::set_permissions(&canary, std::fs::Permissions::from_mode(0o666)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let home = std::env::home_dir().unwrap();
    let here = env!("CARGO_MANIFEST_DIR");
    let hidden = [error("PermissionError"), error("FileNotFoundError"), error("OSError")];
    let denied = [&hidden[..], &[ProgramOutcome::AssertionFailed]].concat();
    let canary_name = canary.display();
    let programs = [
        format!("open('{canary_name}').read()"),
        format!("open('{canary_name}', 'w').write('dead')"),
        format!("open('{canary_name}', 'a').write('dead')"),
        format!("import os\nos.remove('{canary_name}')"),
        format!("import os\nos.truncate('{canary_name}', 0)"),
        format!("import os\nos.rename('{canary_name}', 'mine')"),
        format!("import os\nos.link('{canary_name}', 'mine')\nopen('mine', 'w').write('dead')"),
        format!("import os\nos.symlink('{canary_name}', 'mine')\nopen('mine', 'w').write('dead')"),
        format!("import os\nos.chmod('{canary_name}', 0)"),
        format!("open('{}/new', 'w')", dir.path().display()),
        format!("import os\nos.listdir('{}')", home.display()),
        format!("import os\nos.listdir('{here}')"),
        format!("open('{here}/Cargo.toml').read()"),
        "open('/etc/passwd').read()".to_owned(),
        "open('/etc/new', 'w')".to_owned(),
        "open('/usr/new', 'w')".to_owned(),
        "open('/new', 'w')".to_owned(),
        "import os\nopen(f'/proc/{os.getppid()}/environ', 'rb').read()".to_owned(),
        "open('/proc/self/mem', 'rb+')".to_owned(),
        "import os\nassert set(os.environ) - {'PYTHONHASHSEED', 'LC_CTYPE'}".to_owned(),
        format!("import socket\nsocket.create_connection(('127.0.0.1', {port}))"),
        "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()".to_owned(),
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)".to_owned(),
        "import socket\nsocket.socket(socket.AF_UNIX)".to_owned(),
        "import ctypes\nassert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0".to_owned(),
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0".to_owned(),
        "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0".to_owned(),
        "import ctypes\nassert ctypes.CDLL(None).syscall(250, 0, 0, 0, 0) >= 0".to_owned(),
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))".to_owned(),
    ];
    let denied = [&denied[..], &[error("ValueError")]].concat();
    let programs: Vec<(&str, &[ProgramOutcome])> =
        programs.iter().map(|program| (program.as_str(), &denied[..])).collect();
    none_passes(&sandbox(dir.path()), &programs);
    assert_eq!(std::fs::read_to_string(&canary).unwrap(), "alive");
    assert!(!dir.path().join("new").exists() && !Path::new("/etc/new").exists());
    assert!(listener.accept().is_err(), "something connected");
}

#[test]
fn only_a_program_that_runs_to_its_end_passes() {
    let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
    let left = &[error("it left before its end")][..];
    let wrong = &[ProgramOutcome::AssertionFailed][..];
    none_passes(
        &sandbox(dir.path()),
        &[
            ("import os\nos._exit(0)\nassert False", left),
            ("raise SystemExit(0)", &[error("SystemExit")]),
            ("import sys\nsys.exit()", &[error("SystemExit")]),
            ("exit()", &[error("SystemExit")]),
            ("raise KeyboardInterrupt", &[error("KeyboardInterrupt")]),
            ("raise GeneratorExit", &[error("GeneratorExit")]),
            (
                "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed ' + b'0' * 32 + b'\\n')\n    except OSError: pass\nos._exit(0)",
                left,
            ),
            ("import os\nos.closerange(0, 64)", &[error("it left before its end"), ProgramOutcome::Killed(9)]),
            (
                "import builtins\nbuiltins.AssertionError = BaseException = type('E', (Exception,), {})\nassert False",
                wrong,
            ),
            (
                "import os, builtins\nos._exit = os.write = os.read = print\nbuiltins.type = builtins.compile = print\nassert False",
                wrong,
            ),
            ("import builtins\nbuiltins.BaseException = KeyError\nraise ValueError", &[error("ValueError")]),
            ("import atexit, os\natexit.register(os._exit, 0)\nassert False", wrong),
            ("import sys\nsys.settrace(lambda *a: None)\nsys.excepthook = print\nassert False", wrong),
            ("def f(:", &[error("SyntaxError")]),
            ("x = '\\ud800'\nprint(undefined)", &[error("NameError")]),
            ("import ctypes\nctypes.string_at(0)", &[ProgramOutcome::Killed(11)]),
        ],
    );
}

/// A machine that has less than this one.
#[derive(Default, Clone, Copy)]
struct Machine {
    /// System calls that its kernel refuses, by their x86-64 numbers.
    refused: &'static [u32],
    /// The version of Landlock that its kernel has; `None` for that of this machine.
    landlock_abi: Option<u32>,
    /// Who starts the launcher; `None` for who runs the test.
    user: Option<u32>,
    /// The hard limit of open files.
    max_open_files: Option<u32>,
}

impl Machine {
    /// The sandbox on this machine. A process that the launcher inherits nothing of answers for the
    /// kernel when it is asked for its version of Landlock.
    #[cfg(target_arch = "x86_64")]
    fn sandbox(self, folder: &Path, python: &Path) -> cllm_core::Result<Sandbox> {
        let Machine { refused, landlock_abi, user, max_open_files } = self;
        let script = format!(
            "#!/usr/bin/python3\n\
             refused, abi, user, files = {refused:?}, {}, {}, {}\n{}",
            landlock_abi.unwrap_or(0),
            user.unwrap_or(0),
            max_open_files.unwrap_or(0),
            include_str!("../fixtures/start-on-machine.py")
        );
        started_by(folder, &script, python)
    }
}

#[cfg(target_arch = "x86_64")]
mod system_calls {
    pub(super) const SECCOMP: u32 = 317;
    pub(super) const UNSHARE: u32 = 272;
    pub(super) const LANDLOCK: u32 = 444;
}

/// A sandbox on a kernel that refuses these system calls.
#[cfg(target_arch = "x86_64")]
fn without(folder: &Path, refused: &'static [u32]) -> cllm_core::Result<Sandbox> {
    Machine { refused, ..Machine::default() }.sandbox(folder, Path::new("python3"))
}

/// A user that is not root, if this process may become one.
#[cfg(target_arch = "x86_64")]
fn ordinary_user() -> Option<u32> {
    (std::fs::metadata("/proc/self").unwrap().uid() == 0).then_some(54_321)
}

/// What a user has outside of the sandbox: a file that programs may read, as it lies in the folder of
/// their Python, and a process.
#[cfg(target_arch = "x86_64")]
struct Belongings {
    python: PathBuf,
    file: PathBuf,
    process: std::process::Child,
}

#[cfg(target_arch = "x86_64")]
impl Belongings {
    fn of(user: Option<u32>, folder: &Path) -> Self {
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
        let environment = folder.join("environment");
        let (python, file) = (environment.join("bin/python3"), environment.join("notes.txt"));
        std::fs::create_dir_all(environment.join("bin")).unwrap();
        std::fs::write(environment.join("pyvenv.cfg"), "home = /usr/bin\n").unwrap();
        std::os::unix::fs::symlink("/usr/bin/python3", &python).unwrap();
        std::fs::write(&file, "alive").unwrap();
        let mut sleep = Command::new("sleep");
        sleep.arg("1000");
        if let Some(user) = user {
            std::os::unix::fs::chown(&file, Some(user), Some(user)).unwrap();
            sleep.uid(user).gid(user);
        }
        Belongings { python, file, process: sleep.spawn().unwrap() }
    }

    /// Programs that would change the file or signal the process.
    fn attacks(&self) -> Vec<String> {
        let (file, process) = (self.file.display(), self.process.id());
        let own = format!("import fcntl, os, socket, struct\na, b = socket.socketpair()\npid = {process}\n");
        let send = "fcntl.fcntl(a, 10, 9)\nfcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC)\nb.send(b'x')";
        vec![
            format!("{own}fcntl.fcntl(a, fcntl.F_SETOWN, pid)\n{send}"),
            format!("{own}fcntl.fcntl(a, 15, struct.pack('ii', 1, pid))\n{send}"),
            format!("{own}fcntl.ioctl(a, 0x8901, struct.pack('i', pid))\n{send}"),
            format!("{own}fcntl.ioctl(a, 0x8902, struct.pack('i', pid))\n{send}"),
            format!("import os\nos.kill({process}, 9)"),
            format!("import os\nos.truncate('{file}', 0)"),
            format!("import os\nos.open('{file}', os.O_RDONLY | os.O_TRUNC)"),
            format!("import os\nos.open('{file}', 3 | os.O_TRUNC)"),
            format!("open('{file}', 'w')"),
            format!("import os\nos.utime('{file}', (0, 0))"),
            format!("import os\nos.utime(os.open('{file}', os.O_RDONLY), (0, 0))"),
            format!("import os\nos.chmod('{file}', 0)"),
            format!("import os\nos.remove('{file}')"),
            format!("import os\nos.setxattr('{file}', 'user.a', b'b')"),
        ]
    }

    #[track_caller]
    fn are_out_of_reach_of(&mut self, sandbox: &Sandbox) {
        let before = self.file.metadata().unwrap();
        let refused = ["OSError", "PermissionError", "FileNotFoundError"].map(error);
        let attacks = self.attacks();
        let attacks: Vec<(&str, &[ProgramOutcome])> = attacks.iter().map(|attack| (&**attack, &refused[..])).collect();
        none_passes(sandbox, &attacks);
        let after = self.file.metadata().unwrap();
        let state = |of: &std::fs::Metadata| (of.modified().unwrap(), of.mode(), of.len());
        assert_eq!(state(&before), state(&after), "{:?}", sandbox.layers());
        assert!(self.process.try_wait().unwrap().is_none(), "{:?}", sandbox.layers());
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Belongings {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_hard_limit_of_open_files_below_that_of_the_sandbox_stays() {
    let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
    let user = ordinary_user();
    let belongings = Belongings::of(user, dir.path());
    let machine = Machine { user, max_open_files: Some(40), ..Machine::default() };
    let sandbox = machine.sandbox(dir.path(), &belongings.python).unwrap();
    let limit = "import resource\nassert resource.getrlimit(resource.RLIMIT_NOFILE) == (40, 40)";
    assert_eq!(sandbox.run(limit).unwrap(), ProgramOutcome::Passed);
}

fn has_layer(sandbox: &Sandbox, name: &str) -> bool {
    sandbox.layers().iter().any(|layer| layer == name)
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_kernel_without_layers_is_refused() {
    use system_calls::{LANDLOCK, SECCOMP, UNSHARE};
    let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
    for (calls, reason) in [(&[UNSHARE, LANDLOCK][..], "neither Landlock"), (&[SECCOMP], "filter of system calls")] {
        let refusal = without(dir.path(), calls).unwrap_err();
        assert!(refusal.exit_code() == 3 && refusal.to_string().contains(reason), "{refusal}");
    }
}

#[cfg(target_arch = "x86_64")]
mod needs_namespaces {
    use super::*;

    /// Fails where the kernel or a container does not permit namespaces.
    #[track_caller]
    fn expect_layers(sandbox: cllm_core::Result<Sandbox>, expected: &[&str]) -> Sandbox {
        let sandbox = sandbox.unwrap();
        let layers = sandbox.layers();
        assert!(
            expected.iter().all(|name| has_layer(&sandbox, name)) && !has_layer(&sandbox, "landlock"),
            "{layers:?}"
        );
        sandbox
    }

    #[test]
    #[ignore = "needs a kernel that permits namespaces: scripts/test"]
    fn an_ordinary_user_loses_nothing_without_landlock() {
        let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
        let user = ordinary_user();
        let mut belongings = Belongings::of(user, dir.path());
        let machine = Machine { refused: &[system_calls::LANDLOCK], user, ..Machine::default() };
        let sandbox = machine.sandbox(dir.path(), &belongings.python);
        belongings.are_out_of_reach_of(&expect_layers(sandbox, &["user namespace", "private root"]));
    }

    #[test]
    #[ignore = "needs a kernel that permits namespaces: scripts/test"]
    fn without_landlock_there_is_a_private_root() {
        let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
        let sandbox = expect_layers(without(dir.path(), &[system_calls::LANDLOCK]), &["private root"]);
        none_passes(&sandbox, &[("open('/etc/passwd')", &[error("FileNotFoundError")])]);
    }
}

#[cfg(target_arch = "x86_64")]
mod needs_landlock {
    use super::*;

    /// The version of Landlock that this kernel has.
    fn landlock_abi() -> u32 {
        let ask = format!("import ctypes\nprint(ctypes.CDLL(None).syscall({}, None, 0, 1))", system_calls::LANDLOCK);
        let output = Command::new("python3").args(["-c", &ask]).output().unwrap();
        let answer = String::from_utf8(output.stdout).unwrap();
        answer.trim().parse().unwrap_or_else(|_| panic!("this kernel has no Landlock: {answer}"))
    }

    #[test]
    #[ignore = "needs a kernel with Landlock: scripts/test"]
    fn an_ordinary_user_loses_nothing_with_any_version_of_landlock() {
        let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
        let user = ordinary_user();
        let mut belongings = Belongings::of(user, dir.path());
        // Version 1 came with Linux 5.13, 6 with 6.12. Many containers do not permit namespaces.
        let newest = landlock_abi();
        println!("versions 1 to {newest} of Landlock");
        for refused in [&[system_calls::UNSHARE][..], &[]] {
            for abi in 1..=newest {
                let machine = Machine { refused, landlock_abi: Some(abi), user, ..Machine::default() };
                let sandbox = machine.sandbox(dir.path(), &belongings.python).unwrap();
                assert!(has_layer(&sandbox, "landlock") && !has_layer(&sandbox, "own user"), "{:?}", sandbox.layers());
                assert!(refused.is_empty() || !has_layer(&sandbox, "private root"), "{:?}", sandbox.layers());
                belongings.are_out_of_reach_of(&sandbox);
            }
        }
    }

    #[test]
    #[ignore = "needs a kernel with Landlock: scripts/test"]
    fn landlock_and_seccomp_hold_without_namespaces() {
        let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
        assert!(
            has_layer(&sandbox(dir.path()), "landlock"),
            "this kernel has no Landlock, which the sandbox needs here"
        );
        // Many containers do not permit namespaces.
        let sandbox = without(dir.path(), &[system_calls::UNSHARE]).unwrap();
        assert!(has_layer(&sandbox, "landlock") && has_layer(&sandbox, "seccomp"), "{:?}", sandbox.layers());
        assert!(
            !has_layer(&sandbox, "private root") && !has_layer(&sandbox, "network namespace"),
            "{:?}",
            sandbox.layers()
        );
        let here = env!("CARGO_MANIFEST_DIR");
        let (home, manifest) = (std::env::home_dir().unwrap(), format!("open('{here}/Cargo.toml').read()"));
        let list = format!("import os\nos.listdir('{}')", home.display());
        let (hidden, refused) = (&[error("PermissionError")][..], &[error("OSError")][..]);
        // No single file is too large, but the folder is.
        let many = "import os, time\nos.makedirs('a/b')\nfor i in range(40):\n    open(f'a/b/{i}', 'wb').write(bytes(4 << 20))\n\
                    time.sleep(100000)";
        none_passes(
            &sandbox,
            &[
                (&manifest, hidden),
                (&list, hidden),
                ("open('/etc/passwd').read()", hidden),
                ("open('/tmp/new', 'w')", hidden),
                ("import os\nopen(f'/proc/{os.getppid()}/environ', 'rb').read()", hidden),
                ("import os\nos.fork()", refused),
                ("import socket\nsocket.socket()", refused),
                ("import os\nos.kill(os.getppid(), 9)", refused),
                (
                    "f = open('a', 'wb')\nfor _ in range(300):\n    f.write(bytes(1 << 20))",
                    &[error("OSError"), ProgramOutcome::TooMuchDisk],
                ),
                (many, &[ProgramOutcome::TooMuchDisk]),
                (
                    "import os, time\nos.mkdir('closed', 0)\nos.mkdir('more')\nos.write(1, b'x')\nassert False",
                    &[ProgramOutcome::AssertionFailed, ProgramOutcome::TooMuchDisk],
                ),
            ],
        );
    }
}
