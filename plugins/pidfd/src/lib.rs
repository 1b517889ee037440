//! Process descriptors: pidfd_open(2).
//!
//! A descriptor of a task of the tree is opened again by pid; when descriptors are made, all processes exist, the
//! ended ones too. One whose process is gone for good gets a process of its own that ends the same way and is waited for.
//!
//! Refused by name: processes outside the tree, and threads other than the first, which do not exist yet at that time.

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector, export_plugin,
    register,
};
use std::{
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
mod kernel;
#[cfg(test)]
mod tests;
use records::stasis::pidfd::v1::Process;

struct Processes;

/// Which process a descriptor refers to.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    /// A task of the tree, by its innermost pid.
    Task(i32),
    Gone,
}

fn refused(why: String, remedy: &str) -> HookError {
    HookError::unsupported("pidfd", why, remedy)
}

/// Reads fdinfo (kernel/fork.c and fs/pidfs.c, pidfd_show_fdinfo): the pid as we see it, and in its own namespaces.
fn target(host: &Host<'_>, handle: &HandleInfo) -> Result<Target> {
    let number = |text: &str| {
        text.parse::<i32>().map_err(|error| HookError::invalid(format!("Pid of a pidfd: {error}")))
    };
    let pid = number(handle.field("Pid")?)?;
    if pid == -1 {
        return Ok(Target::Gone);
    }
    let tasks = host.tasks();
    if let Some(task) = tasks.iter().find(|task| task.host_pid == pid) {
        return Ok(Target::Task(task.pid));
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| -> Option<i32> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().parse().ok()
    };
    let ours = |pid: Option<i32>| pid.and_then(|pid| tasks.iter().find(|task| task.host_pid == pid));
    if let (Some(task), true) = (ours(field("Tgid")), field("Tgid") != Some(pid)) {
        let why = format!("it refers to thread {pid} of task {}, which is not its first", task.pid);
        return Err(refused(why, "let the program close it"));
    }
    let zombie = status.lines().any(|line| line.starts_with("State:\tZ"));
    if zombie && ours(field("PPid")).is_some() {
        let inner = handle.field("NSpid")?.split_whitespace().next_back().unwrap_or_default();
        return Ok(Target::Task(number(inner)?));
    }
    let remedy = "dump that process, too, or let the program close the descriptor";
    Err(refused(format!("it refers to process {pid}, which is not in the tree"), remedy))
}

impl Descriptor for Processes {
    type Record = Process;
    const KIND: &'static str = "pidfd";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::AnonInode("[pidfd]".into()), Selector::Filesystem(kernel::PID_FS_MAGIC)]
    }

    fn describe(&self, host: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        let own =
            kernel::has_own_inodes(fd).map_err(|error| HookError::failed("fstatfs of a pidfd", error))?;
        let description = match target(host, handle)? {
            Target::Task(pid) => format!("pidfd of {pid}"),
            Target::Gone => "pidfd of a process that is gone".into(),
        };
        Ok(Described {
            // Before Linux 6.9 all pidfds have one inode; then each description is taken for a process of its own.
            identity: if own { format!("inode {}", handle.ino) } else { format!("handle {}", handle.id) }
                .into(),
            description: description.into(),
            ..Described::default()
        })
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Process>> {
        let handle = &object.handles[0];
        let record = match target(host, handle)? {
            Target::Task(pid) => Process { pid, ..Process::default() },
            Target::Gone => {
                let status = kernel::exit_status(host.open_handle(handle.id)?.as_fd());
                Process { pid: 0, has_status: status.is_some(), status: status.unwrap_or_default() }
            }
        };
        Ok(Dumped::new(record))
    }

    fn create(&self, _: &Host<'_>, object: &ObjectInfo, record: &Process) -> Result<Vec<OwnedFd>> {
        let open = |pid: i32| {
            let flags = object.handles.iter().map(|handle| handle.status_flags & kernel::PIDFD_THREAD);
            flags.map(|flags| kernel::open(pid, flags)).collect::<std::io::Result<Vec<_>>>()
        };
        match record.pid {
            0 => kernel::ended(record.status, open)
                .map_err(|error| HookError::failed("make a process that is gone", error)),
            pid => open(pid).map_err(|error| HookError::failed(format!("pidfd_open of {pid}"), error)),
        }
    }
}

register!(descriptor: Processes);
export_plugin! { name: "pidfd", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
