//! Children that have ended and have not been waited for: exit status, killing signal, group and session.

use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, setpgid, setsid};

use crate::ctl::{Ctl, Outcome, same};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let here = Pid::from_raw(0);
    let exited = ctl.child("exited", |_| {
        // SAFETY: ends this child.
        unsafe { libc::_exit(7) }
    })?;
    let killed = ctl.child("killed", |_| {
        setpgid(here, here)?;
        raise(Signal::SIGKILL).map_err(Into::into)
    })?;
    let leader = ctl.child("leader", |_| setsid().map(drop).map_err(Into::into))?;
    for child in [&exited, &killed, &leader] {
        // Waits for the end, and leaves the zombie.
        waitid(Id::Pid(child.pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)?;
    }

    if ctl.wait()? {
        waitpid(killed.pid, None)?;
    }

    same("exited child", waitpid(exited.pid, None)?, WaitStatus::Exited(exited.pid, 7))?;
    same("killed child", waitpid(killed.pid, None)?, WaitStatus::Signaled(killed.pid, Signal::SIGKILL, false))?;
    same("session leader", waitpid(leader.pid, None)?, WaitStatus::Exited(leader.pid, 0))
}
