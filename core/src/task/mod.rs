//! What is one task's own: the image's `Task` and `Thread` records, from /proc, from system calls about the task, and
//! from what the guardian collected by ptrace and by code injected into the task.

mod context;
mod scheduling;
mod thread;
mod timers;

pub use context::{ProcessContext, ThreadContext};

use crate::{
    files::{Names, Refusal},
    image::records::{self, Limit, MemoryMap, PathRef, Thread},
    proc::{ProcDir, ProcError, status::StatField},
    tree::{NamespaceMap, Process, TreeError},
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

/// Numbers of what a process may share with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    /// Its memory map.
    pub memory: u32,
    /// Its descriptor table.
    pub files: u32,
    /// Root, cwd and umask; 0 if it shares them with nobody.
    pub fs: u32,
}

/// The record of a process that is not dead. `id` numbers its memory map and descriptor table, `fs` those with whom it shares its
/// directories.
pub fn describe(
    process: &Process,
    context: &ProcessContext,
    namespaces: &NamespaceMap,
    paths: &TaskPaths,
    ids: Ids,
) -> Result<records::Task, TaskError> {
    refuse_unsupported(process)?;
    let proc = &process.proc;
    let (credentials, mut threads) = thread::describe_all(process, context, namespaces)?;
    let dead_leader = process.has_dead_leader();
    if dead_leader {
        threads.insert(0, dead_leader_record(process));
    }
    let terminal = process.stat.get(StatField::TtyNr)? as i32;
    let foreground = process.stat.get(StatField::Tpgid)? as i32;
    Ok(records::Task {
        pid: process.pid,
        ppid: process.ppid,
        pgid: process.pgid,
        sid: process.sid,
        group_stop: process.group_stop,
        exit_signal: process.exit_signal,
        exit_status: if dead_leader { process.exit_code } else { 0 },
        dead_leader,
        mm: ids.memory,
        files: ids.files,
        exe: Some(paths.exe.clone()),
        cwd: Some(paths.cwd.clone()),
        root: Some(paths.root.clone()),
        umask: process.status.octal("Umask")?,
        personality: personality(proc)?,
        credentials: Some(credentials),
        actions: context.actions.clone(),
        pending: context.pending.clone(),
        itimers: context.itimers.clone(),
        posix_timers: timers::describe(process, &context.posix_timers)?,
        limits: limits(proc)?,
        namespaces: namespaces
            .of(process)?
            .into_iter()
            .map(|(kind, id)| records::Namespace { kind: kind.into(), id })
            .collect(),
        threads,
        fs: ids.fs,
        login_uid: process.proc.read_text("loginuid").ok().and_then(|text| text.trim().parse().ok()),
        oom_score_adj: number(proc, "oom_score_adj")? as i32,
        child_subreaper: context.child_subreaper,
        dumpable: context.dumpable,
        thp_disable: context.thp_disable,
        mdwe: context.mdwe,
        memory_merge: context.memory_merge,
        membarrier: context.membarrier,
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
        exit_status: process.exit_code,
        exit_signal: process.exit_signal,
        host_pid: process.host_pid,
        threads: vec![Thread {
            tid: process.pid,
            name: process.name.clone().into_bytes(),
            ..Thread::default()
        }],
        ..records::Task::default()
    })
}

/// The record of a first thread that has exited while others live: nothing but its number and its name is left.
fn dead_leader_record(process: &Process) -> Thread {
    Thread { tid: process.pid, name: process.name.clone().into_bytes(), ..Thread::default() }
}

/// State that a restore would lose in silence.
fn refuse_unsupported(process: &Process) -> Result<(), TaskError> {
    let refuse = |what: &str| TaskError::Unsupported {
        pid: process.host_pid,
        name: process.name.clone(),
        what: what.into(),
    };
    // Linear address masking (arch/x86, since Linux 6.4): bits of pointers that the CPU ignores.
    if process.status.text("untag_mask").is_ok_and(|mask| mask != "0xffffffffffffffff") {
        return Err(refuse("has the CPU ignore bits of its pointers (ARCH_ENABLE_TAGGED_ADDR)"));
    }
    for &(tid, _) in &process.threads {
        if scheduling::has_core_cookie(tid) {
            return Err(refuse("has a core scheduling cookie (PR_SCHED_CORE)"));
        }
    }
    // Labels of a security module, which restored tasks would have from us.
    for label in ["current", "exec", "fscreate", "keycreate", "sockcreate"] {
        let file = format!("attr/{label}");
        // Read only if a module is there to give them.
        let read = |proc: &ProcDir| proc.read(&file).unwrap_or_default();
        let found = read(&process.proc);
        if !found.is_empty() && found != read(&ProcDir::open_self()?) {
            let label = String::from_utf8_lossy(&found).trim_end_matches(['\0', '\n']).to_owned();
            return Err(refuse(&format!("has the security label {label} ({file}), which stasis has not")));
        }
    }
    Ok(())
}

/// Memory map: addresses that prctl(PR_SET_MM_MAP) puts back (proc_pid_stat(5)).
pub fn memory_map(process: &Process, found: &ProcessContext, id: u32) -> Result<MemoryMap, TaskError> {
    let get = |field| -> Result<u64, ProcError> { Ok(process.stat.get(field)? as u64) };
    Ok(MemoryMap {
        id,
        vmas: Vec::new(),
        start_code: get(StatField::StartCode)?,
        end_code: get(StatField::EndCode)?,
        start_data: get(StatField::StartData)?,
        end_data: get(StatField::EndData)?,
        start_brk: get(StatField::StartBrk)?,
        brk: found.brk,
        start_stack: get(StatField::StartStack)?,
        arg_start: get(StatField::ArgStart)?,
        arg_end: get(StatField::ArgEnd)?,
        env_start: get(StatField::EnvStart)?,
        env_end: get(StatField::EnvEnd)?,
        auxv: process.proc.read("auxv")?,
        lock_future: found.lock_future,
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
