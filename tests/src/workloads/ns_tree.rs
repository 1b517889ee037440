//! A child in fresh user, mount and pid namespaces, with children of its own; the root of the tree stays outside.

use std::fs;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Pid, getpid, getppid};

use crate::ctl::{Ctl, Outcome, changed, ensure, same};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let inner_ids = || -> Outcome<(i32, i32, u32)> {
        Ok((getpid().as_raw(), getppid().as_raw(), nix::unistd::getuid().as_raw()))
    };
    let (ready, mapped) = crate::sys::pipe(0)?;
    let middle = ctl.child("middle", |ctl| {
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID)?;
        ctl.announce("unshared", b"")?;
        crate::sys::read(&ready, 1)?;
        let init = ctl.child("init", |ctl| {
            same("pid of the first task", getpid(), Pid::from_raw(1))?;
            let child = ctl.child("inner", |ctl| {
                let before = inner_ids()?;
                ctl.wait_as("inner")?;
                same("pid, parent, user", inner_ids()?, before)
            })?;
            ctl.await_ready("inner")?;
            let (ids, maps) = (inner_ids()?, fs::read_to_string("/proc/self/uid_map")?);
            if ctl.wait_as("init")? {
                return Err(changed("spoilt".into()));
            }
            same("pid, parent, user", inner_ids()?, ids)?;
            same("map of users", fs::read_to_string("/proc/self/uid_map")?, maps)?;
            child.join()
        })?;
        init.join()
    })?;
    let unshared = ctl.dir().join("unshared");
    crate::ctl::poll_until("the namespaces are made", || unshared.exists())?;
    for name in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{}/{name}", middle.pid), "0 0 65536\n")?;
    }
    crate::sys::write(&mapped, b"go")?;
    ctl.await_ready("init")?;
    drop((ready, mapped));
    let link = |name: &str| fs::read_link(format!("/proc/{}/ns/{name}", middle.pid));
    ensure(link("user")? != fs::read_link("/proc/self/ns/user")?, "no user namespace")?;

    ctl.wait()?;

    ensure(link("user")? != fs::read_link("/proc/self/ns/user")?, "the user namespace is gone")?;
    ensure(link("mnt")? != fs::read_link("/proc/self/ns/mnt")?, "the mount namespace is gone")?;
    middle.join()
}
