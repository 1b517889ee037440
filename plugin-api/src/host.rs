//! Host services, as hooks see them.

use crate::{HandleInfo, HookError, Result, SessionInfo, TaskInfo, UndoStep, abi::HostRef};
use std::{
    io::{Read, Write},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// What core offers to a hook. Valid only during the call it is given to.
pub struct Host<'a> {
    inner: HostRef<'a>,
}

impl<'a> Host<'a> {
    pub(crate) fn new(inner: HostRef<'a>) -> Self {
        Self { inner }
    }

    /// The value of one of the plugin's own options; an empty string for a switch that was given. Of an option that was
    /// given several times all values, a line each ([`Self::option_values`]).
    pub fn option(&self, name: &str) -> Option<String> {
        self.inner.option(name.into()).into_option().map(Into::into)
    }

    /// Whether one of the plugin's own switches was given.
    pub fn has_option(&self, name: &str) -> bool {
        self.option(name).is_some()
    }

    /// The values of one of the plugin's own options, in the order in which they were given; none if it was not.
    pub fn option_values(&self, name: &str) -> Vec<String> {
        let text = self.option(name);
        text.iter().flat_map(|text| text.split('\n')).map(str::to_owned).collect()
    }

    /// Tells the user something he should know although the operation goes on.
    pub fn warn(&self, message: &str) {
        self.inner.warn(message.into());
    }

    /// Reports progress of a long step, in units of the plugin's choice.
    pub fn progress(&self, done: u64, total: u64) {
        self.inner.progress(done, total);
    }

    /// The task in which this hook runs (on restore), or 0 in the command process.
    pub fn current_task(&self) -> i32 {
        self.inner.current_task()
    }

    /// Whether the tree is killed after this dump, so that `commit` will run (dump only). If not, what can only be read
    /// by consuming it is refused, or documented as lost.
    pub fn ends_tree(&self) -> bool {
        self.inner.ends_tree()
    }

    /// Whether this is `stasis dump --dry-run` (dump only): the tree runs, and nothing of it may change, not for a moment; what
    /// is written goes nowhere. Hooks are called for what they would refuse, and skip what costs time or has effects.
    pub fn is_dry_run(&self) -> bool {
        self.inner.is_dry_run()
    }

    /// What the user said is outside (`--external KEY`), in his words: `tty[RDEV:DEV]`, `unix[INO]`, ...
    pub fn externals(&self) -> Vec<String> {
        self.inner.externals().into_iter().map(Into::into).collect()
    }

    /// Whether `--external` names exactly this key.
    pub fn is_external(&self, key: &str) -> bool {
        self.externals().iter().any(|external| external == key)
    }

    /// A duplicate of the descriptor that the user gave for this key (`--inherit-fd fd[N]:KEY`), if he did (restore only).
    pub fn inherited(&self, key: &str) -> Result<Option<OwnedFd>> {
        let fd: Option<i32> = self.inner.inherited(key.into()).into_result()?.into();
        Ok(fd.map(take_fd))
    }

    /// All processes of the tree.
    pub fn tasks(&self) -> Vec<TaskInfo> {
        self.inner.tasks().into()
    }

    /// All sessions of the tree that have a controlling terminal.
    pub fn sessions(&self) -> Vec<SessionInfo> {
        self.inner.sessions().into()
    }

    /// What is known of handle `id`.
    pub fn handle(&self, id: u32) -> Option<HandleInfo> {
        self.inner.handle(id).into()
    }

    /// Which handle descriptor `fd` of process `pid` refers to.
    pub fn handle_at(&self, pid: i32, fd: i32) -> Option<u32> {
        self.inner.handle_at(pid, fd).into()
    }

    /// A handle of the file with this device and inode number, whoever holds it (dump only): that of a mapping, say, whose
    /// file is no path that one could open.
    pub fn handle_of(&self, dev: u64, ino: u64) -> Option<u32> {
        self.inner.handle_of(dev, ino).into()
    }

    /// A duplicate of the open file description of handle `id`. On restore from the link phase on, or in create for
    /// handles that were named in [`Dumped::after`](crate::Dumped::after). Lifecycle hooks have it from
    /// [`Event::Restored`](crate::Event::Restored) on, for handles that a task holds.
    pub fn open_handle(&self, id: u32) -> Result<OwnedFd> {
        let fd = self.inner.open_handle(id).into_result()?;
        Ok(take_fd(fd))
    }

    /// A duplicate of a descriptor that `create` made beyond those of its handles
    /// ([`Dumped::auxiliaries`](crate::Dumped::auxiliaries)); `handle` is any of that object's. On restore from the link
    /// phase on, or in create for handles that were named in [`Dumped::after`](crate::Dumped::after).
    pub fn open_auxiliary(&self, handle: u32, index: u32) -> Result<OwnedFd> {
        let fd = self.inner.open_auxiliary(handle, index).into_result()?;
        Ok(take_fd(fd))
    }

    /// `/proc/PID` of a frozen task, as a directory descriptor (dump only).
    pub fn open_proc(&self, pid: i32) -> Result<OwnedFd> {
        let fd = self.inner.open_proc(pid).into_result()?;
        Ok(take_fd(fd))
    }

    /// Runs a system call in the frozen task `pid` (dump only). A negative `errno` becomes an error.
    pub fn remote_syscall(&self, pid: i32, number: i64, args: [u64; 6]) -> Result<i64> {
        self.inner.remote_syscall(pid, number, &args).into_result()
    }

    /// Has the guardian keep a duplicate of `fd`, and do these steps with it before the tree runs on: after a dump that
    /// leaves it running, fails, or is killed. What was asked for last is done first; an error of a step is
    /// no reason to stop. If the tree is killed the duplicate is closed when it is gone, and nothing is done (but see
    /// [`UndoStep::WriteWhenKilled`]). No steps: only the close, which comes before the tree runs on.
    ///
    /// On restore (in lifecycle hooks and [`Namespace::prepare`](crate::Namespace::prepare)): the steps are done when a restore has failed or
    /// was killed, after its tasks are gone, and dropped when the tree runs.
    ///
    /// To be called *before* the change that it undoes, so that there is no instant in which nobody would.
    pub fn undo(&self, fd: BorrowedFd<'_>, steps: &[UndoStep]) -> Result<()> {
        self.inner.undo(fd.as_raw_fd(), steps.into()).into_result()
    }

    /// Reads memory of the frozen task `pid` (dump only).
    pub fn read_memory(&self, pid: i32, address: u64, buffer: &mut [u8]) -> Result<()> {
        self.inner.read_memory(pid, address, buffer.into()).into_result()
    }

    /// Runs `f`, during which this task is not killed if the restore fails (restore only). For names of files that exist
    /// for a moment only: `f` makes them, uses them, takes them away and does nothing else.
    pub fn hold<T>(&self, f: impl FnOnce() -> T) -> T {
        struct Held<'h, 'a>(&'h Host<'a>);
        impl Drop for Held<'_, '_> {
            fn drop(&mut self) {
                self.0.inner.hold(false);
            }
        }
        self.inner.hold(true);
        let _held = Held(self);
        f()
    }

    /// A writer that appends to the plugin's blob `name` in the image (dump only). Blobs are streamed, of any size.
    pub fn blob_writer<'b>(&'b self, name: &'b str) -> impl Write + 'b {
        BlobWriter { host: self, name }
    }

    /// A reader of the plugin's blob `name` (restore only). A blob never written reads as empty.
    pub fn blob_reader<'b>(&'b self, name: &'b str) -> impl Read + 'b {
        BlobReader { host: self, name, offset: 0 }
    }
}

struct BlobWriter<'b, 'a> {
    host: &'b Host<'a>,
    name: &'b str,
}

impl Write for BlobWriter<'_, '_> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let data = &data[..data.len().min(1 << 20)];
        let result = self.host.inner.blob_append(self.name.into(), data.into()).into_result();
        result.map(|()| data.len()).map_err(into_io)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct BlobReader<'b, 'a> {
    host: &'b Host<'a>,
    name: &'b str,
    offset: u64,
}

impl Read for BlobReader<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let result = self.host.inner.blob_read(self.name.into(), self.offset, buffer.into()).into_result();
        let n = result.map_err(into_io)?;
        self.offset += n as u64;
        Ok(n)
    }
}

fn into_io(error: HookError) -> std::io::Error {
    match error.errno {
        0 => std::io::Error::other(error),
        errno => std::io::Error::from_raw_os_error(errno),
    }
}

fn take_fd(fd: i32) -> OwnedFd {
    // SAFETY: the host gives a freshly opened descriptor and keeps no copy of the number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
