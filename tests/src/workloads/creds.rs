//! Credentials: a child with other real, effective, saved and file system ids, groups, and capabilities dropped; another
//! that keeps some capabilities as ordinary user.

use std::fs;

use nix::unistd::{Gid, setgroups, setresgid};

use crate::ctl::{Child, Ctl, Outcome, same};
use crate::sys::cvt;

/// The lines of /proc/self/status that tell them.
fn shown() -> Outcome<Vec<String>> {
    let wanted = ["Uid:", "Gid:", "Groups:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:", "NoNewPrivs:"];
    let status = fs::read_to_string("/proc/self/status")?;
    let lines = status.lines().filter(|line| wanted.iter().any(|name| line.starts_with(name)));
    Ok(lines.map(str::to_owned).collect())
}

/// A child that changes and compares; it can no longer write into the scenario's directory, so its status tells.
fn member(ctl: &Ctl, name: &str, change: impl FnOnce() -> Outcome) -> Outcome<Child> {
    let child = ctl.child(name, |ctl| {
        // Before the powers go.
        ctl.announce(&format!("ready.{name}"), b"")?;
        change()?;
        let before = shown()?;
        let sabotage = ctl.wait_for_request()?;
        same(name, shown()?, before)?;
        same("spoilt", sabotage, false)
    })?;
    ctl.await_ready(name)?;
    Ok(child)
}

/// prctl(2) with numbers.
fn prctl(option: i32, a: usize, b: usize) -> Outcome {
    // SAFETY: these options take numbers.
    Ok(cvt(unsafe { libc::prctl(option, a, b, 0, 0) }).map(drop)?)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let user = member(ctl, "user", || {
        setgroups(&[Gid::from_raw(7), Gid::from_raw(1000)])?;
        setresgid(2000.into(), 2001.into(), 2002.into())?;
        // CAP_NET_RAW out of the bounding set.
        prctl(libc::PR_CAPBSET_DROP, 13, 0)?;
        nix::unistd::setresuid(1000.into(), 1001.into(), 1002.into())?;
        Ok(())
    })?;
    let keeper = member(ctl, "keeper", || {
        prctl(libc::PR_SET_KEEPCAPS, 1, 0)?;
        nix::unistd::setresuid(1500.into(), 1500.into(), 1500.into())?;
        prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0)
    })?;

    ctl.wait()?;

    user.join()?;
    keeper.join()
}
