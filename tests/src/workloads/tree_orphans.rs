//! Orphans whose parents have ended and that a child subreaper has got; the subreaper still is one afterwards.

use nix::sys::prctl;
use nix::sys::wait::{WaitStatus, wait, waitpid};
use nix::unistd::{getpid, getppid};

use crate::ctl::{Ctl, Outcome, ensure, same};

/// Makes a grandchild whose parent ends at once.
fn orphan(ctl: &Ctl, name: &'static str) -> Outcome {
    let root = getpid();
    ctl.child("middle", |ctl| {
        ctl.child(name, |ctl| {
            crate::ctl::poll_until("the parent has ended", || getppid() == root)?;
            if ctl.wait_as(name)? {
                return Err(crate::ctl::changed("spoilt".into()));
            }
            same("parent", getppid(), root)
        })
        .map(drop)
    })?
    .join()?;
    ctl.await_ready(name)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    prctl::set_child_subreaper(true)?;
    for name in ["one", "two"] {
        orphan(ctl, name)?;
    }

    ctl.wait()?;

    for _ in 0..2 {
        let status = wait()?;
        ensure(matches!(status, WaitStatus::Exited(_, 0)), &format!("an orphan ended with {status:?}"))?;
    }
    ensure(prctl::get_child_subreaper()?, "no longer a subreaper")?;
    let root = getpid();
    let child = ctl.child("later", |ctl| {
        let grandchild = ctl.child("latest", |_| crate::ctl::poll_until("adopted", || getppid() == root))?;
        ctl.announce("latest", grandchild.pid.to_string().as_bytes()).map_err(Into::into)
    })?;
    child.join()?;
    let latest = std::fs::read_to_string(ctl.dir().join("latest"))?.parse().unwrap_or(-1);
    let latest = nix::unistd::Pid::from_raw(latest);
    same("orphan made afterwards", waitpid(latest, None)?, WaitStatus::Exited(latest, 0))
}
