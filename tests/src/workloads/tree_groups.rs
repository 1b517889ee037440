//! Process groups and sessions: a child in a group of its own, one in its sibling's, one in a session of its own with
//! a child in another group of that session.

use nix::unistd::{Pid, getpgid, getpgrp, getppid, getsid, setpgid, setsid};

use crate::ctl::{Child, Ctl, Outcome, same};

/// What a task is, of the tree's structure.
fn place() -> Outcome<(Pid, Pid, Pid, Pid)> {
    Ok((nix::unistd::getpid(), getppid(), getpgrp(), getsid(None)?))
}

/// A child that takes its place and compares it later.
fn member(ctl: &Ctl, name: &'static str, move_to: impl FnOnce(&Ctl) -> Outcome) -> Outcome<Child> {
    let child = ctl.child(name, |ctl| {
        move_to(ctl)?;
        let before = place()?;
        let sabotage = ctl.wait_as(name)?;
        if sabotage && name == "own-group" {
            setpgid(Pid::from_raw(0), getppid())?;
        }
        same(name, place()?, before)
    })?;
    ctl.await_ready(name)?;
    Ok(child)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let here = Pid::from_raw(0);
    let plain = member(ctl, "plain", |_| Ok(()))?;
    let own = member(ctl, "own-group", |_| Ok(setpgid(here, here)?))?;
    let group = own.pid;
    let joined = member(ctl, "joined-group", |_| Ok(setpgid(here, group)?))?;
    let session = ctl.child("session", |ctl| {
        setsid()?;
        let inner = member(ctl, "inner", |_| Ok(()))?;
        let inner_group = member(ctl, "inner-group", |_| Ok(setpgid(here, here)?))?;
        let before = place()?;
        ctl.wait_as("session")?;
        same("session leader", place()?, before)?;
        inner.join()?;
        inner_group.join()
    })?;
    ctl.await_ready("session")?;
    // Not its parent: a detached restore gives it another.
    let place = || -> Outcome<(Pid, Pid, Pid)> { Ok((nix::unistd::getpid(), getpgrp(), getsid(None)?)) };
    let before = place()?;

    ctl.wait()?;

    same("root", place()?, before)?;
    same("group of a child, seen by its parent", getpgid(Some(joined.pid))?, group)?;
    for child in [plain, own, joined, session] {
        child.join()?;
    }
    Ok(())
}
