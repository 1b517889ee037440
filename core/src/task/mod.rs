//! What is one task's own: the image's `Task` and `Thread` records, from /proc, from system calls about the task, and
//! from what the guardian collected by ptrace and by code injected into the task.

mod scheduling;

use crate::{
    files::{Names, Refusal},
    image::records::{self, Credentials, Limit, MemoryMap, PathRef, Restart, SignalAction, Thread},
    proc::{
        ProcDir, ProcError,
        status::{StatField, Status},
    },
    tree::{IdTranslation, NamespaceMap, Process, TreeError},
};
use nix::errno::Errno;

/// The state of a task cannot be read, or not be kept.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// Reading /proc failed.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// Reading namespaces failed.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A system call about the task failed.
    #[error("{call} of task {tid}: {errno}")]
    Call {
        /// The system call.
        call: &'static str,
        /// The thread.
        tid: i32,
        /// Why.
        errno: Errno,
    },
    /// The task has state that is not kept yet.
    #[error("task {pid} ({name}) {what}, which is not supported yet")]
    Unsupported {
        /// The process.
        pid: i32,
        /// Its name.
        name: String,
        /// "has POSIX timers", ...
        what: String,
    },
}

/// What only ptrace and injected code can tell of a thread.
#[derive(Debug, Clone, Default)]
pub struct ThreadContext {
    /// Thread id, as stasis sees it.
    pub tid: i32,
    /// struct user_regs_struct.
    pub registers: Vec<u8>,
    /// NT_X86_XSTATE.
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub signal_mask: u64,
    /// sigaltstack: base, flags, size.
    pub altstack: (u64, u32, u64),
    /// set_tid_address.
    pub clear_child_tid: u64,
    /// Robust futex list: head, length.
    pub robust_list: (u64, u64),
    /// rseq registration: address, size, signature.
    pub rseq: Option<(u64, u32, u32)>,
    /// Private pending signals, as siginfo_t.
    pub pending: Vec<Vec<u8>>,
    /// PR_SET_PDEATHSIG.
    pub parent_death_signal: u32,
    /// PR_SET_TIMERSLACK, nanoseconds.
    pub timer_slack_ns: u64,
    /// A relative sleep to go on with.
    pub restart: Option<Restart>,
}

/// What only ptrace and injected code can tell of a process.
#[derive(Debug, Clone, Default)]
pub struct ProcessContext {
    /// rt_sigaction of signals 1 to 64.
    pub actions: Vec<SignalAction>,
    /// ITIMER_REAL, VIRTUAL, PROF.
    pub itimers: Vec<records::IntervalTimer>,
    /// brk(0).
    pub brk: u64,
    /// PR_GET_DUMPABLE.
    pub dumpable: u32,
    /// PR_GET_THP_DISABLE.
    pub thp_disable: u32,
    /// PR_GET_SECUREBITS.
    pub securebits: u32,
    /// PR_GET_KEEPCAPS.
    pub keep_caps: bool,
    /// PR_GET_CHILD_SUBREAPER.
    pub child_subreaper: bool,
    /// Shared pending signals, as siginfo_t.
    pub pending: Vec<Vec<u8>>,
    /// Seccomp filters, innermost first.
    pub seccomp_filters: Vec<records::SeccompFilter>,
    /// Threads, leader first.
    pub threads: Vec<ThreadContext>,
}

/// The files that a process has by its very nature.
#[derive(Debug, Clone, Default)]
pub struct TaskPaths {
    /// Executable.
    pub exe: PathRef,
    /// Working directory.
    pub cwd: PathRef,
    /// Root directory.
    pub root: PathRef,
}

impl TaskPaths {
    /// Reads them; what cannot be found again is passed to `refuse` with what it is.
    pub fn read(
        proc: &ProcDir,
        names: &mut Names,
        mut refuse: impl FnMut(&'static str, Vec<u8>, Refusal),
    ) -> Result<Self, ProcError> {
        let mut read = |file: &'static str, what| -> Result<PathRef, ProcError> {
            let (link, stat) = (proc.link(file)?, proc.stat(file)?);
            Ok(names.refer(proc, file, &link, &stat).unwrap_or_else(|refusal| {
                refuse(what, link, refusal);
                PathRef::default()
            }))
        };
        Ok(Self {
            exe: read("exe", "executable")?,
            cwd: read("cwd", "working directory")?,
            root: read("root", "root directory")?,
        })
    }
}

/// The record of a process that is not dead. `id` numbers its memory map and descriptor table.
pub fn describe(
    process: &Process,
    context: &ProcessContext,
    namespaces: &NamespaceMap,
    paths: &TaskPaths,
    id: u32,
) -> Result<records::Task, TaskError> {
    refuse_unsupported(process)?;
    let proc = &process.proc;
    let status = &process.status;
    let foreign_user = namespaces.is_foreign("user", process);
    let ids =
        |file| if foreign_user { IdTranslation::read(proc, file) } else { Ok(IdTranslation::default()) };
    let (uids, gids) = (ids("uid_map")?, ids("gid_map")?);
    let mut credentials = credentials(status, &uids, &gids)?;
    credentials.securebits = context.securebits;
    credentials.keep_caps = context.keep_caps;
    credentials.seccomp_filters = context.seccomp_filters.clone();
    let threads = process
        .threads
        .iter()
        .map(|&(tid, inner)| {
            let found = context.threads.iter().find(|thread| thread.tid == tid);
            // The guardian stopped exactly these threads.
            let found = found.ok_or(TaskError::Call { call: "PTRACE_GETREGS", tid, errno: Errno::ESRCH })?;
            describe_thread(process, found, inner, &credentials, (&uids, &gids))
        })
        .collect::<Result<Vec<_>, TaskError>>()?;
    let terminal = process.stat.get(StatField::TtyNr)? as i32;
    let foreground = process.stat.get(StatField::Tpgid)? as i32;
    Ok(records::Task {
        pid: process.pid,
        ppid: process.ppid,
        pgid: process.pgid,
        sid: process.sid,
        group_stop: process.group_stop,
        exit_signal: process.stat.get(StatField::ExitSignal)? as i32,
        mm: id,
        files: id,
        exe: Some(paths.exe.clone()),
        cwd: Some(paths.cwd.clone()),
        root: Some(paths.root.clone()),
        umask: status.octal("Umask")?,
        personality: personality(proc)?,
        credentials: Some(credentials),
        actions: context.actions.clone(),
        pending: context.pending.clone(),
        itimers: context.itimers.clone(),
        limits: limits(proc)?,
        namespaces: namespaces
            .of(process)?
            .into_iter()
            .map(|(kind, id)| records::Namespace { kind: kind.into(), id })
            .collect(),
        threads,
        oom_score_adj: number(proc, "oom_score_adj")? as i32,
        child_subreaper: context.child_subreaper,
        dumpable: context.dumpable,
        thp_disable: context.thp_disable,
        coredump_filter: hexadecimal(proc, "coredump_filter")? as u32,
        tty_nr: (terminal != 0).then_some(terminal),
        tty_pgrp: (terminal != 0).then_some(foreground),
        host_pid: process.host_pid,
        ..records::Task::default()
    })
}

/// The record of a process that has exited but was not waited for.
pub fn describe_zombie(process: &Process) -> Result<records::Task, TaskError> {
    Ok(records::Task {
        pid: process.pid,
        ppid: process.ppid,
        pgid: process.pgid,
        sid: process.sid,
        zombie: true,
        exit_status: process.stat.get(StatField::ExitCode)? as i32,
        exit_signal: process.stat.get(StatField::ExitSignal)? as i32,
        host_pid: process.host_pid,
        threads: vec![Thread {
            tid: process.pid,
            name: process.name.clone().into_bytes(),
            ..Thread::default()
        }],
        ..records::Task::default()
    })
}

/// State that a restore would lose in silence.
fn refuse_unsupported(process: &Process) -> Result<(), TaskError> {
    let refuse = |what: &str| TaskError::Unsupported {
        pid: process.host_pid,
        name: process.name.clone(),
        what: what.into(),
    };
    if !process.proc.read("timers")?.is_empty() {
        return Err(refuse("has POSIX timers (timer_create)"));
    }
    // A 32-bit task is told by the segment of its code; /proc has no word for it.
    if hexadecimal(&process.proc, "personality")? & 0xff == 8 {
        return Err(refuse("is a 32-bit Linux program"));
    }
    Ok(())
}

fn describe_thread(
    process: &Process,
    context: &ThreadContext,
    tid: i32,
    leader: &Credentials,
    (uids, gids): (&IdTranslation, &IdTranslation),
) -> Result<Thread, TaskError> {
    let dir = format!("task/{}", context.tid);
    let proc = &process.proc;
    let mut name = proc.read(&format!("{dir}/comm"))?;
    name.truncate(name.trim_ascii_end().len());
    let mut own = None;
    if context.tid != process.host_pid {
        let mut theirs = credentials(&Status::read_file(proc, &format!("{dir}/status"))?, uids, gids)?;
        theirs.securebits = leader.securebits;
        theirs.keep_caps = leader.keep_caps;
        theirs.seccomp_filters = leader.seccomp_filters.clone();
        own = (theirs != *leader).then_some(theirs);
    }
    let scheduling = scheduling::read(context.tid)?;
    let (rseq_address, rseq_size, rseq_signature) = context.rseq.unwrap_or_default();
    Ok(Thread {
        tid,
        registers: context.registers.clone(),
        xstate: context.xstate.clone(),
        signal_mask: context.signal_mask,
        name,
        altstack_base: context.altstack.0,
        altstack_flags: context.altstack.1,
        altstack_size: context.altstack.2,
        clear_child_tid: context.clear_child_tid,
        robust_list: context.robust_list.0,
        robust_list_len: context.robust_list.1,
        rseq_address,
        rseq_size,
        rseq_signature,
        pending: context.pending.clone(),
        parent_death_signal: context.parent_death_signal,
        timer_slack_ns: context.timer_slack_ns,
        sched_policy: scheduling.policy,
        nice: scheduling.nice,
        sched_priority: scheduling.priority,
        affinity: scheduling.affinity,
        restart: context.restart,
        credentials: own,
        io_priority: scheduling.io_priority,
    })
}

/// Credentials from a status file, as the task's own user namespace names them.
fn credentials(
    status: &Status,
    uids: &IdTranslation,
    gids: &IdTranslation,
) -> Result<Credentials, ProcError> {
    let numbers = |name, map: &IdTranslation| -> Result<Vec<u32>, ProcError> {
        Ok(status.numbers(name)?.into_iter().map(|id| map.inside(id)).collect())
    };
    Ok(Credentials {
        uid: numbers("Uid", uids)?,
        gid: numbers("Gid", gids)?,
        groups: numbers("Groups", gids)?,
        cap_inheritable: status.hexadecimal("CapInh")?,
        cap_permitted: status.hexadecimal("CapPrm")?,
        cap_effective: status.hexadecimal("CapEff")?,
        cap_bounding: status.hexadecimal("CapBnd")?,
        cap_ambient: status.hexadecimal("CapAmb")?,
        no_new_privs: status.text("NoNewPrivs")? == "1",
        seccomp_mode: status.last_number("Seccomp")?,
        ..Credentials::default()
    })
}

/// Memory map: addresses that prctl(PR_SET_MM_MAP) puts back (proc_pid_stat(5)).
pub fn memory_map(process: &Process, brk: u64, id: u32) -> Result<MemoryMap, TaskError> {
    let get = |field| -> Result<u64, ProcError> { Ok(process.stat.get(field)? as u64) };
    Ok(MemoryMap {
        id,
        vmas: Vec::new(),
        start_code: get(StatField::StartCode)?,
        end_code: get(StatField::EndCode)?,
        start_data: get(StatField::StartData)?,
        end_data: get(StatField::EndData)?,
        start_brk: get(StatField::StartBrk)?,
        brk,
        start_stack: get(StatField::StartStack)?,
        arg_start: get(StatField::ArgStart)?,
        arg_end: get(StatField::ArgEnd)?,
        env_start: get(StatField::EnvStart)?,
        env_end: get(StatField::EnvEnd)?,
        auxv: process.proc.read("auxv")?,
    })
}

fn number(proc: &ProcDir, file: &'static str) -> Result<i64, ProcError> {
    let text = proc.read_text(file)?;
    text.trim().parse().map_err(|_| ProcError::Format { pid: proc.pid(), file, what: text.clone() })
}

fn hexadecimal(proc: &ProcDir, file: &'static str) -> Result<u64, ProcError> {
    let text = proc.read_text(file)?;
    u64::from_str_radix(text.trim(), 16).map_err(|_| ProcError::Format {
        pid: proc.pid(),
        file,
        what: text.clone(),
    })
}

fn personality(proc: &ProcDir) -> Result<u32, ProcError> {
    Ok(hexadecimal(proc, "personality")? as u32)
}

/// Names in `/proc/PID/limits`, in the order of `RLIMIT_*` (asm-generic/resource.h). Not prlimit(2), which the kernel
/// refuses for tasks of other users without CAP_SYS_RESOURCE.
const LIMITS: [&str; 16] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

fn limits(proc: &ProcDir) -> Result<Vec<Limit>, ProcError> {
    let text = proc.read_text("limits")?;
    let value = |word: &str| if word == "unlimited" { Some(libc::RLIM_INFINITY) } else { word.parse().ok() };
    let limit = |name: &str| {
        let mut words = text.lines().find_map(|line| line.strip_prefix(name))?.split_ascii_whitespace();
        Some(Limit { soft: value(words.next()?)?, hard: value(words.next()?)? })
    };
    let missing =
        |name: &str| ProcError::Format { pid: proc.pid(), file: "limits", what: format!("no {name}") };
    LIMITS.iter().map(|name| limit(name).ok_or_else(|| missing(name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_those_of_getrlimit() {
        let limits = limits(&ProcDir::open_self().unwrap()).unwrap();
        for (number, limit) in limits.iter().enumerate() {
            let mut own = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: `own` is a valid rlimit to write to.
            assert_eq!(unsafe { libc::getrlimit(number as u32, &mut own) }, 0);
            assert_eq!((limit.soft, limit.hard), (own.rlim_cur, own.rlim_max), "{}", LIMITS[number]);
        }
    }
}
