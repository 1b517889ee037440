//! The process tree as it was found: who is whose child, in which namespaces, and who shares what.

mod namespaces;
mod sharing;

pub use namespaces::{ForeignNamespace, IdTranslation, NamespaceMap};
pub use sharing::{Sharing, sharing};

use crate::proc::{
    ProcDir, ProcError,
    status::{Stat, StatField, Status},
};
use std::collections::HashMap;

/// The tree cannot be described, or not be dumped.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// Reading /proc failed.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// Two tasks share something that is not dumped yet.
    #[error("tasks {first} ({first_name}) and {second} share their {what}, which is not supported yet")]
    Shared {
        /// One task.
        first: i32,
        /// Its name.
        first_name: String,
        /// The other.
        second: i32,
        /// "descriptor table", ...
        what: &'static str,
    },
    /// A thread has of its own what threads usually share.
    #[error("thread {tid} of task {pid} ({name}) has a {what} of its own, which is not supported yet")]
    Unshared {
        /// The process.
        pid: i32,
        /// Its name.
        name: String,
        /// The thread.
        tid: i32,
        /// "descriptor table", ...
        what: &'static str,
    },
    /// A task's session or group is outside the tree.
    #[error(
        "task {pid} ({name}) belongs to {what} {id}, whose leader is outside the tree \
         (use --shell-job to restore it into the session of a shell, or dump the tree from the leader on)"
    )]
    LeaderOutside {
        /// The task.
        pid: i32,
        /// Its name.
        name: String,
        /// "session" or "process group".
        what: &'static str,
        /// Its id.
        id: i32,
    },
}

/// One process as it was found.
#[derive(Debug)]
pub struct Process {
    /// Pid as stasis sees it.
    pub host_pid: i32,
    /// Pid in the innermost namespace of the process: the one the image keeps.
    pub pid: i32,
    /// Parent, likewise; 0 for the root of the tree.
    pub ppid: i32,
    /// Process group, in the innermost namespace.
    pub pgid: i32,
    /// Session, in the innermost namespace.
    pub sid: i32,
    /// Command name.
    pub name: String,
    /// Dead, not yet waited for.
    pub zombie: bool,
    /// Signal that stopped the group, or 0.
    pub group_stop: i32,
    /// Live threads: (tid as stasis sees it, tid in the innermost namespace), leader first unless it is dead.
    pub threads: Vec<(i32, i32)>,
    /// Signal that its end sends to the parent.
    pub exit_signal: i32,
    /// Wait status of the leader, if it has exited.
    pub exit_code: i32,
    /// `/proc/PID`, or that of another thread if the leader is dead and shows nothing any more.
    pub proc: ProcDir,
    /// Its status file.
    pub status: Status,
    /// Its stat file.
    pub stat: Stat,
}

/// A process that the guardian stopped.
#[derive(Debug, Clone)]
pub struct Found {
    /// Pid as stasis sees it.
    pub pid: i32,
    /// Threads, leader first.
    pub tids: Vec<i32>,
    /// Dead, not yet waited for.
    pub zombie: bool,
    /// Signal that stopped the group, or 0.
    pub group_stop: i32,
}

/// The whole tree, parents before children.
#[derive(Debug, Default)]
pub struct Tree {
    /// All processes, the root first.
    pub processes: Vec<Process>,
}

impl Tree {
    /// Reads the tree from /proc. `found[0]` is its root.
    pub fn read(found: &[Found]) -> Result<Self, TreeError> {
        let mut processes = Vec::with_capacity(found.len());
        for one in found {
            match read_process(one) {
                // Its parent waited for it in the moment before the parent itself was stopped.
                Err(TreeError::Proc(error)) if one.zombie && error.is_gone() => {}
                process => processes.push(process?),
            }
        }
        let inner: HashMap<i32, i32> =
            processes.iter().map(|process| (process.host_pid, process.pid)).collect();
        for (index, process) in processes.iter_mut().enumerate() {
            let parent = process.stat.get(StatField::Ppid)? as i32;
            process.ppid = if index == 0 { 0 } else { inner.get(&parent).copied().unwrap_or(0) };
        }
        Ok(Self { processes })
    }

    /// The root process.
    pub fn root(&self) -> &Process {
        &self.processes[0]
    }

    /// Processes that are not dead.
    pub fn living(&self) -> impl Iterator<Item = &Process> {
        self.processes.iter().filter(|process| !process.zombie)
    }

    /// A process by its pid in the image.
    pub fn by_pid(&self, pid: i32) -> Option<&Process> {
        self.processes.iter().find(|process| process.pid == pid)
    }

    /// Refuses sessions and groups that restore could not rebuild, unless the tree is a shell's job.
    pub fn check_leaders(&self, shell_job: bool) -> Result<(), TreeError> {
        if shell_job {
            return Ok(());
        }
        let root = self.root();
        // The ids of a session that began outside the pid namespace show as 0.
        let outside = |id: i32| id == 0 || (id != root.pid && (id == root.sid || id == root.pgid));
        // A namespace inside the tree is another matter, for the plugin of its kind to refuse.
        let depth = |process: &Process| {
            process.status.text("NSpid").map_or(0, |pids| pids.split_whitespace().count())
        };
        for process in self.processes.iter().filter(|process| depth(process) == depth(root)) {
            for (what, id) in [("session", process.sid), ("process group", process.pgid)] {
                if outside(id) && self.by_pid(id).is_none() {
                    let name = process.name.clone();
                    return Err(TreeError::LeaderOutside { pid: process.host_pid, name, what, id });
                }
            }
        }
        Ok(())
    }
}

impl Process {
    /// The first thread has exited while others live.
    pub fn has_dead_leader(&self) -> bool {
        self.worker() != self.host_pid
    }

    /// The thread whose /proc is read.
    pub fn worker(&self) -> i32 {
        self.proc.pid()
    }
}

fn read_process(found: &Found) -> Result<Process, TreeError> {
    let worker = if found.zombie { found.pid } else { found.tids.first().copied().unwrap_or(found.pid) };
    let proc = ProcDir::open(worker)?;
    let status = Status::read(&proc)?;
    let stat = Stat::read(&proc)?;
    let leader = if worker == found.pid { None } else { Some(ProcDir::open(found.pid)?) };
    let leader =
        leader.map(|proc| Ok::<_, ProcError>((Stat::read(&proc)?, Status::read(&proc)?))).transpose()?;
    let (leader_stat, leader_status) =
        leader.as_ref().map_or((&stat, &status), |(stat, status)| (stat, status));
    let pid = leader_status.last_number("NSpid")?;
    let mut threads = if worker == found.pid { vec![(found.pid, pid)] } else { Vec::new() };
    // Without a pid namespace in between, both views agree and a thousand files need not be read.
    let nested = status.numbers::<i32>("NSpid")?.len() > 1;
    for &tid in found.tids.iter().filter(|&&tid| tid != found.pid) {
        let inner = match nested {
            true => Status::read_file(&proc, &format!("task/{tid}/status"))?.last_number("NSpid")?,
            false => tid,
        };
        threads.push((tid, inner));
    }
    Ok(Process {
        host_pid: found.pid,
        pid,
        ppid: 0,
        pgid: status.last_number("NSpgid")?,
        sid: status.last_number("NSsid")?,
        name: leader_status.text("Name")?.to_string(),
        exit_signal: leader_stat.get(StatField::ExitSignal)? as i32,
        exit_code: leader_stat.get(StatField::ExitCode)? as i32,
        zombie: found.zombie,
        group_stop: found.group_stop,
        threads,
        proc,
        status,
        stat,
    })
}
