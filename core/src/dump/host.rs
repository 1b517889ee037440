//! What core offers to hooks during a dump.

use super::{Afterwards, Context};
use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};
use stasis_plugin_api::{
    HandleInfo, HookError, SessionInfo, TaskInfo, UndoStep,
    abi::{AbiResult, HostAbi},
    abi_stable::std_types::{ROption, RResult, RSlice, RSliceMut, RStr, RString, RVec},
};
use std::{
    cell::RefCell,
    collections::HashMap,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd},
        unix::fs::FileExt,
    },
};

/// The host of all hooks of one dump. `plugin` is whose options and blobs are meant.
pub struct DumpHost<'a> {
    /// Everything about this dump.
    pub context: &'a Context<'a>,
    /// Whose hook is called.
    pub plugin: &'a str,
}

impl DumpHost<'_> {
    /// Refuses what would change the tree in a dry run, or is about to be undone.
    fn changes(&self, what: &str) -> Result<(), HookError> {
        match self.context.writer {
            Some(_) => Ok(()),
            None => Err(HookError::invalid(format!("{what}, which a dry run does not make"))),
        }
    }

    /// `/proc/PID` of a task of the tree.
    fn proc(&self, pid: i32) -> Result<(i32, OwnedFd), HookError> {
        let inventory = self.context.inventory.borrow();
        let process = inventory.tree.by_pid(pid);
        let process = process.ok_or_else(|| HookError::invalid(format!("no task {pid} in the tree")))?;
        let fd = process.proc.as_dir().try_clone_to_owned();
        Ok((process.host_pid, fd.map_err(|error| HookError::failed("duplicating /proc/PID", error))?))
    }
}

impl HostAbi for DumpHost<'_> {
    fn option(&self, name: RStr<'_>) -> ROption<RString> {
        let core = (name.as_str() == "shell-job" && self.context.options.shell_job).then_some("");
        self.context.registry.option(self.plugin, name.as_str()).or(core).map(Into::into).into()
    }

    fn warn(&self, message: RStr<'_>) {
        tracing::warn!(plugin = self.plugin, "{message}");
        self.context.warnings.borrow_mut().push(format!("{}: {message}", self.plugin));
    }

    fn progress(&self, done: u64, total: u64) {
        tracing::debug!(plugin = self.plugin, done, total, "progress");
    }

    fn current_task(&self) -> i32 {
        0
    }

    fn ends_tree(&self) -> bool {
        self.context.options.afterwards == Afterwards::Kill
    }

    fn is_dry_run(&self) -> bool {
        self.context.writer.is_none()
    }

    fn externals(&self) -> RVec<RString> {
        self.context.options.external.iter().map(|key| key.as_str().into()).collect()
    }

    fn inherited(&self, key: RStr<'_>) -> AbiResult<ROption<i32>> {
        RResult::RErr(HookError::invalid(format!("{key}: descriptors are inherited by a restore only")))
    }

    fn tasks(&self) -> RVec<TaskInfo> {
        self.context.inventory.borrow().tasks().into()
    }

    fn sessions(&self) -> RVec<SessionInfo> {
        self.context.inventory.borrow().sessions().into()
    }

    fn handle(&self, id: u32) -> ROption<HandleInfo> {
        self.context.inventory.borrow().handle_info(id).into()
    }

    fn handle_at(&self, pid: i32, fd: i32) -> ROption<u32> {
        self.context.inventory.borrow().handle_at(pid, fd).into()
    }

    fn handle_of(&self, dev: u64, ino: u64) -> ROption<u32> {
        self.context.inventory.borrow().handle_of(dev, ino).into()
    }

    fn open_handle(&self, id: u32) -> AbiResult<i32> {
        let opened = self.context.inventory.borrow().open_handle(id).map(IntoRawFd::into_raw_fd);
        opened.map_err(|errno| HookError::failed(format!("duplicating handle {id}"), errno)).into()
    }

    fn open_auxiliary(&self, handle: u32, _: u32) -> AbiResult<i32> {
        RResult::RErr(HookError::invalid(format!("auxiliaries of handle {handle} are for restore only")))
    }

    fn open_proc(&self, pid: i32) -> AbiResult<i32> {
        self.proc(pid).map(|(_, fd)| fd.into_raw_fd()).into()
    }

    fn remote_syscall(&self, pid: i32, number: i64, args: &[u64; 6]) -> AbiResult<i64> {
        let call = || {
            self.changes("a system call in a task")?;
            let (host_pid, _) = self.proc(pid)?;
            let result = self.context.guardian.borrow_mut().syscall(host_pid, number, *args);
            result.map_err(|error| HookError::invalid(format!("system call {number} in task {pid}: {error}")))
        };
        match call() {
            // The range of errno values (include/linux/err.h, MAX_ERRNO).
            Ok(value @ -4095..0) => {
                let what = format!("system call {number} in task {pid}");
                RResult::RErr(HookError::failed(what, Errno::from_raw(-value as i32)))
            }
            other => other.into(),
        }
    }

    fn read_memory(&self, pid: i32, address: u64, mut buffer: RSliceMut<'_, u8>) -> AbiResult<()> {
        let mut read = || {
            let (_, proc) = self.proc(pid)?;
            let failed = |error: io::Error| HookError::failed(format!("reading memory of task {pid}"), error);
            let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
            let memory = openat(&proc, "mem", flags, Mode::empty()).map(File::from);
            let memory = memory.map_err(|errno| failed(errno.into()))?;
            memory.read_exact_at(buffer.as_mut_slice(), address).map_err(failed)
        };
        let result = read();
        result.into()
    }

    fn undo(&self, fd: i32, steps: RSlice<'_, UndoStep>) -> AbiResult<()> {
        if let Err(error) = self.changes("an entry in the journal") {
            return RResult::RErr(error);
        }
        // SAFETY: the hook has it open during this call.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let result = self.context.guardian.borrow_mut().undo(fd, steps.iter().map(Into::into).collect());
        result.map_err(|error| HookError::invalid(format!("a journal entry: {error}"))).into()
    }

    fn blob_append(&self, name: RStr<'_>, data: RSlice<'_, u8>) -> AbiResult<()> {
        let Ok(writer) = self.context.writer() else { return RResult::ROk(()) };
        let result = writer.append_blob(self.plugin, name.as_str(), data.as_slice());
        result.map_err(|error| HookError::invalid(format!("writing blob {name}: {error}"))).into()
    }

    fn blob_read(&self, name: RStr<'_>, _offset: u64, _buffer: RSliceMut<'_, u8>) -> AbiResult<usize> {
        RResult::RErr(HookError::invalid(format!("blob {name} can only be read on restore")))
    }

    fn hold(&self, _begin: bool) {}
}

/// Process descriptors of the tree, for pidfd_getfd(2).
#[derive(Debug, Default)]
pub struct PidFds {
    open: RefCell<HashMap<i32, OwnedFd>>,
}

impl PidFds {
    /// A duplicate of descriptor `number` of process `pid` (as stasis sees it), by its thread `worker`: another than the first
    /// if that has exited, and has no descriptors any more.
    pub fn get(&self, worker: i32, pid: i32, number: i32) -> Result<OwnedFd, Errno> {
        let mut open = self.open.borrow_mut();
        let pidfd = match open.entry(pid) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                // PIDFD_THREAD, since Linux 6.9.
                let flags = if worker == pid { 0 } else { libc::O_EXCL };
                // SAFETY: pidfd_open takes no pointers.
                let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, worker, flags) })?;
                // SAFETY: the kernel just made this descriptor for us.
                entry.insert(unsafe { OwnedFd::from_raw_fd(fd as i32) })
            }
        };
        // SAFETY: pidfd_getfd takes no pointers.
        let fd =
            Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })?;
        // SAFETY: the kernel just made this descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }
}
