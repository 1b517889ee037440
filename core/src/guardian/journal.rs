//! What must be undone besides the state of the tasks themselves, which the tree knows: cgroups, descriptors.

use super::{GuardianError, protocol::UndoStep, wait::Waiter};
use crate::inject::run::Patience;
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags},
    unistd::{UnlinkatFlags, linkat, unlinkat},
};
use std::{
    borrow::Cow,
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// A cgroup that was frozen while its tasks were seized.
///
/// Frozen tasks cannot run injected code, so it is thawed as soon as every task has a stop pending, and frozen again at the end
/// if it was frozen before.
#[derive(Debug)]
pub struct Freezer {
    directory: PathBuf,
    /// Version 1 has freezer.state, version 2 cgroup.freeze.
    version_1: bool,
    was_frozen: bool,
}

impl Freezer {
    /// Freezes and waits until it is so.
    pub fn freeze(directory: &Path, deadline: Instant, waiter: &mut Waiter) -> Result<Self, GuardianError> {
        let version_1 = directory.join("freezer.state").exists();
        let mut freezer = Self { directory: directory.to_path_buf(), version_1, was_frozen: false };
        freezer.was_frozen = freezer.is_to_be_frozen()?;
        freezer.set(true)?;
        if let Err(error) = freezer.wait_until_frozen(deadline, waiter) {
            let _ = freezer.put_back();
            return Err(error);
        }
        Ok(freezer)
    }

    fn wait_until_frozen(&self, deadline: Instant, waiter: &mut Waiter) -> Result<(), GuardianError> {
        let mut looks = 0;
        while !self.is_frozen()? {
            looks += 1;
            // Version 1 may stay in FREEZING for ever when tasks fork or die meanwhile; it must be thawed and tried again.
            if self.version_1 && looks % 20 == 0 {
                self.thaw()?;
                waiter.wait(Instant::now() + Duration::from_millis(2));
                self.set(true)?;
            }
            if waiter.command_gone {
                return Err(GuardianError::CommandEnded);
            }
            if Instant::now() >= deadline {
                return Err(self.error("freezing", &io::Error::from_raw_os_error(libc::ETIMEDOUT)));
            }
            waiter.wait(Instant::now() + Duration::from_millis(1));
        }
        Ok(())
    }

    fn is_frozen(&self) -> Result<bool, GuardianError> {
        let (file, wanted) =
            if self.version_1 { ("freezer.state", "FROZEN") } else { ("cgroup.events", "frozen 1") };
        let text =
            fs::read_to_string(self.directory.join(file)).map_err(|error| self.error("reading", &error))?;
        Ok(text.lines().any(|line| line == wanted))
    }

    /// Whether somebody wants it frozen, which may take a while, and is not the same as a group above it being frozen.
    fn is_to_be_frozen(&self) -> Result<bool, GuardianError> {
        let file = if self.version_1 { "freezer.self_freezing" } else { "cgroup.freeze" };
        let text = fs::read_to_string(self.directory.join(file));
        Ok(text.map_err(|error| self.error("reading", &error))?.trim() == "1")
    }

    fn set(&self, frozen: bool) -> Result<(), GuardianError> {
        let (file, text) = match (self.version_1, frozen) {
            (true, true) => ("freezer.state", "FROZEN"),
            (true, false) => ("freezer.state", "THAWED"),
            (false, true) => ("cgroup.freeze", "1"),
            (false, false) => ("cgroup.freeze", "0"),
        };
        let operation = if frozen { "freezing" } else { "thawing" };
        fs::write(self.directory.join(file), text).map_err(|error| self.error(operation, &error))
    }

    /// Lets its tasks run, as far as ptrace lets them.
    pub fn thaw(&self) -> Result<(), GuardianError> {
        self.set(false)
    }

    /// As it was before.
    pub fn put_back(&self) -> Result<(), GuardianError> {
        self.set(self.was_frozen)
    }

    fn error(&self, operation: &'static str, error: &io::Error) -> GuardianError {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        GuardianError::Cgroup { operation: Cow::Borrowed(operation), path: self.directory.clone(), errno }
    }
}

/// The journal of a dump.
#[derive(Debug, Default)]
pub struct Journal {
    /// A frozen cgroup.
    pub freezer: Option<Freezer>,
    /// Descriptors that were installed in a task: process, number.
    pub descriptors: Vec<(i32, i32)>,
    /// What plugins want done with descriptors before the tree runs on.
    pub undo: Vec<(OwnedFd, Vec<UndoStep>)>,
    /// Hard links that were made for the image: directory, name.
    pub links: Vec<(OwnedFd, String)>,
}

impl Journal {
    /// Makes a hard link to a file (by any descriptor of it) and notes it.
    pub fn link(&mut self, file: &OwnedFd, directory: OwnedFd, name: String) -> Result<(), GuardianError> {
        let source = format!("/proc/self/fd/{}", file.as_raw_fd());
        linkat(AT_FDCWD, source.as_str(), &directory, name.as_str(), AtFlags::AT_SYMLINK_FOLLOW)
            .map_err(|errno| GuardianError::Link { name: name.clone(), errno: errno as i32 })?;
        self.links.push((directory, name));
        Ok(())
    }

    /// Takes away the links: there will be no image that needs them.
    pub fn unlink(&mut self) {
        for (directory, name) in self.links.drain(..) {
            let _ = unlinkat(&directory, name.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }

    /// The tree is gone: what plugins asked for in that case, the last first. Nothing is left to be undone.
    pub fn tree_was_killed(&mut self) {
        for (fd, steps) in self.undo.iter().rev() {
            for step in steps {
                if let UndoStep::WriteWhenKilled(data) = step {
                    write(fd, data);
                }
            }
        }
        self.undo.clear();
    }

    /// Does what plugins asked for, the last first. A step that fails has nobody to tell.
    pub fn undo_steps(&mut self) {
        while let Some((fd, steps)) = self.undo.pop() {
            for step in &steps {
                match step {
                    UndoStep::SetOption { level, name, value } => {
                        let length = value.len() as libc::socklen_t;
                        // SAFETY: the kernel reads a slice that outlives the call.
                        unsafe {
                            libc::setsockopt(fd.as_raw_fd(), *level, *name, value.as_ptr().cast(), length)
                        };
                    }
                    UndoStep::Write(data) => write(&fd, data),
                    UndoStep::RemoveDirectory(name) => remove_directory(&fd, name),
                    UndoStep::WriteWhenKilled(_) => {}
                    UndoStep::Syscall { number, arguments: [a, b, c, d, e, f] } => {
                        // SAFETY: the plugin promises that it takes numbers only.
                        unsafe { libc::syscall(*number, *a, *b, *c, *d, *e, *f) };
                    }
                }
            }
        }
    }
}

/// What nobody answers for.
fn write(fd: &OwnedFd, data: &[u8]) {
    // SAFETY: the kernel reads a slice that outlives the call.
    unsafe { libc::write(fd.as_raw_fd(), data.as_ptr().cast(), data.len()) };
}

/// How long a directory may be in use by processes that are on their way out.
const BUSY_TIME: Duration = Duration::from_secs(2);

fn remove_directory(parent: &OwnedFd, name: &str) {
    let deadline = Instant::now() + BUSY_TIME;
    while unlinkat(parent, name, UnlinkatFlags::RemoveDir) == Err(Errno::EBUSY) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}
