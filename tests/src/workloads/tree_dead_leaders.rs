//! A session and a group whose leaders have ended and been waited for, with members still there.

use nix::sys::prctl;
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{Pid, getpgrp, getsid, setpgid, setsid};

use crate::ctl::{Ctl, Outcome, changed, ensure, same};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    prctl::set_child_subreaper(true)?;
    let leader = ctl.child("leader", |ctl| {
        setsid()?;
        ctl.child("member", |ctl| {
            let place = (getpgrp(), getsid(None)?);
            if ctl.wait_as("member")? {
                return Err(changed("spoilt".into()));
            }
            same("group and session", (getpgrp(), getsid(None)?), place)
        })?;
        ctl.await_ready("member")
    })?;
    let (dead_session, here) = (leader.pid, Pid::from_raw(0));
    leader.join()?;
    let group_leader = ctl.child("group leader", |ctl| {
        setpgid(here, here)?;
        let group = getpgrp();
        ctl.child("grouped", |ctl| {
            ctl.wait_as("grouped")?;
            same("group", getpgrp(), group)
        })?;
        ctl.await_ready("grouped")
    })?;
    group_leader.join()?;

    ctl.wait()?;

    for _ in 0..2 {
        let status = wait()?;
        ensure(matches!(status, WaitStatus::Exited(_, 0)), &format!("a member ended with {status:?}"))?;
    }
    ensure(getsid(Some(dead_session)).is_err(), "the dead leader lives")
}
