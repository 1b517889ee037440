//! A cgroup namespace: what is above its root stays hidden.

use std::fs;

use nix::sched::{CloneFlags, setns, unshare};

use crate::ctl::{Ctl, Fail, Outcome, ensure, same};

/// Paths of the cgroups of this process, as it sees them.
fn paths() -> Outcome<Vec<String>> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    Ok(text.lines().filter_map(|line| line.splitn(3, ':').nth(2).map(str::to_owned)).collect())
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let outside = fs::read_link("/proc/self/ns/cgroup")?;
    unshare(CloneFlags::CLONE_NEWCGROUP)
        .map_err(|errno| Fail::Absent(format!("unshare(CLONE_NEWCGROUP): {errno}")))?;
    ensure(fs::read_link("/proc/self/ns/cgroup")? != outside, "no new namespace")?;
    let child = ctl.child("inside", |ctl| {
        ctl.wait_as("inside")?;
        ensure(paths()?.iter().all(|path| path == "/"), "the child sees more than the root")
    })?;
    ctl.await_ready("inside")?;

    let sabotage = ctl.wait()?;

    if sabotage {
        // Who started us is outside.
        let parent = format!("/proc/{}/ns/cgroup", nix::unistd::getppid());
        setns(fs::File::open(parent)?, CloneFlags::CLONE_NEWCGROUP)?;
    }
    let seen = paths()?;
    same("paths", seen.clone(), vec!["/".to_owned(); seen.len()])?;
    ensure(fs::read_link("/proc/self/ns/cgroup")? != outside, "it is in the namespace of stasis")?;
    child.join()
}
