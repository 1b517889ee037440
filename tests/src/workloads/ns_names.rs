//! A UTS namespace with names of its own, and what a child changes there.

use nix::sched::{CloneFlags, unshare};
use nix::sys::utsname::uname;

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::cvt;

fn names() -> Outcome<[String; 2]> {
    let names = uname()?;
    Ok([names.nodename(), names.domainname()].map(|name| name.to_string_lossy().into_owned()))
}

fn sethostname(name: &str) -> Outcome {
    // SAFETY: as many bytes as the name has.
    Ok(cvt(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }).map(drop)?)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    unshare(CloneFlags::CLONE_NEWUTS)?;
    sethostname("stasis-workload")?;
    // SAFETY: six bytes.
    cvt(unsafe { libc::setdomainname(c"domain".as_ptr(), 6) })?;
    let child = ctl.child("child", |ctl| {
        if !ctl.wait_as("child")? {
            sethostname("by-the-child")?;
        }
        Ok(())
    })?;
    ctl.await_ready("child")?;
    let before = names()?;

    ctl.wait()?;

    child.join()?;
    same("the domain name", &names()?[1], &before[1])?;
    same("the host name", &names()?[0], &"by-the-child".to_string())
}
