//! A child that is stopped: it stays stopped, and its parent can continue it.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use crate::ctl::{Ctl, Outcome, ensure, pause};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let child = ctl.child("stopped", |ctl| {
        ctl.announce("ready.stopped", b"")?;
        nix::sys::signal::raise(Signal::SIGSTOP)?;
        ctl.announce("continued", b"").map_err(Into::into)
    })?;
    ctl.await_ready("stopped")?;
    let stopped = waitpid(child.pid, Some(WaitPidFlag::WUNTRACED))?;
    ensure(matches!(stopped, WaitStatus::Stopped(_, Signal::SIGSTOP)), "the child did not stop")?;

    if ctl.wait()? {
        kill(child.pid, Signal::SIGCONT)?;
    }

    pause(Duration::from_millis(50));
    let continued = ctl.dir().join("continued");
    ensure(!continued.exists(), "the child has gone on")?;
    kill(child.pid, Signal::SIGCONT)?;
    child.join()?;
    ensure(continued.exists(), "the child did not go on")?;
    Ok(std::fs::remove_file(continued)?)
}
