//! Children on which features are tried out.

use nix::{
    sys::{
        ptrace,
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};
use std::io;

/// A child that waits to be looked at; killed and reaped at the end.
pub(super) struct Child {
    pub pid: Pid,
}

impl Child {
    /// A child that runs `prepare` and then sleeps. Returns when it sleeps.
    pub fn sleeping(prepare: impl FnOnce() -> io::Result<()>) -> io::Result<Self> {
        let (ready, done) = nix::unistd::pipe()?;
        // SAFETY: this process has one thread, so the child may do whatever its parent may.
        match unsafe { fork() }? {
            ForkResult::Child => {
                drop(ready);
                let status = errno_of(prepare());
                // If the parent is gone there is nobody to tell.
                let _ = nix::unistd::write(&done, &[status as u8]);
                loop {
                    nix::unistd::pause();
                }
            }
            ForkResult::Parent { child } => {
                drop(done);
                let child = Self { pid: child };
                let mut status = [0];
                match nix::unistd::read(&ready, &mut status)? {
                    1 if status == [0] => Ok(child),
                    1 => Err(io::Error::from_raw_os_error(i32::from(status[0]))),
                    _ => Err(io::Error::other("the child died")),
                }
            }
        }
    }

    /// The same, seized and stopped.
    pub fn stopped(options: ptrace::Options, prepare: impl FnOnce() -> io::Result<()>) -> io::Result<Self> {
        let child = Self::sleeping(prepare)?;
        ptrace::seize(child.pid, options)?;
        ptrace::interrupt(child.pid)?;
        match waitpid(child.pid, Some(WaitPidFlag::__WALL))? {
            WaitStatus::PtraceEvent(..) | WaitStatus::Stopped(..) => Ok(child),
            other => Err(io::Error::other(format!("the child did not stop: {other:?}"))),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, Some(WaitPidFlag::__WALL));
    }
}

/// Runs `f` in a child; its error is ours.
pub(super) fn in_child(f: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    // SAFETY: as above.
    match unsafe { fork() }? {
        ForkResult::Child => exit(errno_of(f())),
        ForkResult::Parent { child } => outcome(child),
    }
}

/// How a child ended that exits with an errno.
pub(super) fn outcome(child: Pid) -> io::Result<()> {
    match waitpid(child, Some(WaitPidFlag::__WALL))? {
        WaitStatus::Exited(_, 0) => Ok(()),
        WaitStatus::Exited(_, errno) => Err(io::Error::from_raw_os_error(errno)),
        other => Err(io::Error::other(format!("the child ended with {other:?}"))),
    }
}

/// Ends a child at once: no destructor of the parent's may run in it.
pub(super) fn exit(status: i32) -> ! {
    // SAFETY: _exit(2) has no precondition.
    unsafe { libc::_exit(status) }
}

fn errno_of(result: io::Result<()>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
    }
}
