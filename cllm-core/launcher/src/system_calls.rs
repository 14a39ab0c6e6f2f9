//! The system calls that Python may make in the sandbox. The kernel answers all others as if it
//! lacked them, so that no program starts a process, opens a connection, mounts, traces, or reaches
//! another process. What other layers cover only on some kernels is covered here on all of them:
//! signals by way of a descriptor's owner, and changes to files that need no open file to write to.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::protocol::Problem;

/// Calls allowed with any arguments.
const ALLOWED: &[libc::c_long] = &[
    // Files, as far as the other layers permit.
    libc::SYS_read,
    libc::SYS_pread64,
    libc::SYS_readv,
    libc::SYS_preadv,
    libc::SYS_write,
    libc::SYS_pwrite64,
    libc::SYS_writev,
    libc::SYS_pwritev,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_lseek,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_chdir,
    libc::SYS_fchdir,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_sendfile,
    libc::SYS_copy_file_range,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_umask,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_recvfrom,
    // Memory.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    // Threads and signals within the process.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_setitimer,
    libc::SYS_getitimer,
    libc::SYS_restart_syscall,
    libc::SYS_wait4,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Python itself starts by this call. Another program would have the same restrictions.
    libc::SYS_execve,
    // Ids, usage and time.
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getpgid,
    libc::SYS_getsid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getgroups,
    libc::SYS_getrusage,
    libc::SYS_times,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
];

/// Older forms of the same calls, which newer architectures lack.
#[cfg(target_arch = "x86_64")]
const ALLOWED_LEGACY: &[libc::c_long] = &[
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_getdents,
    libc::SYS_dup2,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_wait,
    libc::SYS_alarm,
    libc::SYS_pause,
    libc::SYS_getpgrp,
    libc::SYS_time,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_LEGACY: &[libc::c_long] = &[];

/// The requests that Python's file objects make of a descriptor: TCGETS, TIOCGWINSZ, FIONREAD,
/// FIONBIO, FIONCLEX, FIOCLEX.
const IOCTLS: [u64; 6] = [0x5401, 0x5413, 0x541b, 0x5421, 0x5450, 0x5451];
/// What `fcntl` may do: duplicate descriptors, read and set their flags, lock, and size pipes. Not
/// among them are the commands that name a process to send signals to (`F_SETOWN`, `F_SETOWN_EX`,
/// `F_SETSIG`), and leases, which hold up other programs that open a file.
const FCNTLS: [libc::c_int; 13] = [
    libc::F_DUPFD,
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_GETLK,
    libc::F_SETLK,
    libc::F_SETLKW,
    libc::F_OFD_GETLK,
    libc::F_OFD_SETLK,
    libc::F_OFD_SETLKW,
    libc::F_GETPIPE_SZ,
];
/// Names regions of memory; glibc does that for its allocations.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// What `fork` of the C libraries asks of the kernel.
const FORK: u64 = (libc::CLONE_CHILD_CLEARTID | libc::CLONE_CHILD_SETTID | libc::SIGCHLD) as u64;

fn failed(error: impl std::fmt::Display) -> Problem {
    format!("its filter of system calls cannot be set: {error}")
}

/// Puts the filter on this process, for good.
pub(super) fn restrict() -> Result<(), Problem> {
    let program = compile(rules().map_err(failed)?, not_implemented(), SeccompAction::Allow)?;
    seccompiler::apply_filter(&program).map_err(failed)
}

/// The filter that both processes of the harness add to this one when there are two: no further
/// process, and no further filter. In hexadecimal digits, as the kernel reads it.
pub(super) fn filter_of_harness() -> Result<String, Problem> {
    let condition =
        |argument, operator, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value);
    let rule =
        |condition: Result<_, _>| condition.and_then(|condition| SeccompRule::new(vec![condition])).map_err(failed);
    let thread = libc::CLONE_THREAD as u64;
    let rules = BTreeMap::from([
        (libc::SYS_clone, vec![rule(condition(0, SeccompCmpOp::MaskedEq(thread), 0))?]),
        (libc::SYS_prctl, vec![rule(condition(0, SeccompCmpOp::Eq, libc::PR_SET_SECCOMP as u64))?]),
    ]);
    let program = compile(rules, SeccompAction::Allow, not_implemented())?;
    let bytes = |line: &seccompiler::sock_filter| {
        [&line.code.to_ne_bytes()[..], &[line.jt, line.jf], &line.k.to_ne_bytes()].concat()
    };
    Ok(program.iter().flat_map(bytes).map(|byte| format!("{byte:02x}")).collect())
}

fn not_implemented() -> SeccompAction {
    SeccompAction::Errno(u32::try_from(libc::ENOSYS).expect("ENOSYS is positive"))
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    action: SeccompAction,
) -> Result<BpfProgram, Problem> {
    let arch: TargetArch = std::env::consts::ARCH.try_into().map_err(failed)?;
    SeccompFilter::new(rules, otherwise, action, arch).and_then(TryInto::try_into).map_err(failed)
}

fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let equals = |argument: u8, value: u64| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().chain(ALLOWED_LEGACY).map(|&call| (call, Vec::new())).collect();
    // Threads are allowed. Of processes, the harness starts one, and then no more. `clone3` has its
    // flags in memory, which no filter can see; libc falls back to `clone`.
    let thread = libc::CLONE_THREAD as u64;
    let flag = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(thread), thread)?;
    let fork = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, FORK)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![flag])?, SeccompRule::new(vec![fork])?]);
    rules.insert(libc::SYS_openat, opening(2)?);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, opening(1)?);
    rules.insert(libc::SYS_fcntl, FCNTLS.iter().map(|&command| equals(1, command as u64)).collect::<Result<_, _>>()?);
    rules.insert(libc::SYS_ioctl, IOCTLS.iter().map(|&request| equals(1, request)).collect::<Result<_, _>>()?);
    // Signals to itself, and its own limits.
    let own_id = u64::from(std::process::id());
    for call in [libc::SYS_kill, libc::SYS_tgkill] {
        rules.insert(call, vec![equals(0, own_id)?]);
    }
    rules.insert(libc::SYS_prlimit64, vec![equals(0, 0)?]);
    let options = [libc::PR_SET_NAME as u64, libc::PR_SET_SECCOMP as u64, PR_SET_VMA];
    rules.insert(libc::SYS_prctl, options.iter().map(|&option| equals(0, option)).collect::<Result<_, _>>()?);
    // A pair of connected sockets, by which event loops wake themselves, reaches no other process.
    rules.insert(libc::SYS_socketpair, vec![equals(0, libc::AF_UNIX as u64)?]);
    let no_address = SeccompCondition::new(4, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    rules.insert(libc::SYS_sendto, vec![SeccompRule::new(vec![no_address])?]);
    Ok(rules)
}

/// Allows opening files unless that empties a file which is opened for reading alone: Landlock knows
/// truncation since Linux 6.2 (ABI 3). `flags` is the index of the argument.
fn opening(flags: u8) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let masked = |mask: libc::c_int, value: libc::c_int| {
        let operator = SeccompCmpOp::MaskedEq(mask as u64);
        SeccompCondition::new(flags, SeccompCmpArgLen::Dword, operator, value as u64)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    [(libc::O_TRUNC, 0), (libc::O_ACCMODE, libc::O_WRONLY), (libc::O_ACCMODE, libc::O_RDWR)]
        .into_iter()
        .map(|(mask, value)| masked(mask, value))
        .collect()
}
