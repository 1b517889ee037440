//! Processes that share their working directory and umask (CLONE_FS), and one that does not.

use std::path::PathBuf;

use crate::ctl::{Ctl, Outcome, changed, ensure, poll_until, same};
use crate::sys::cvt_long;

/// Working directory and umask of the caller.
fn place() -> Outcome<(PathBuf, u32)> {
    // SAFETY: umask cannot fail; nobody else of those that share it changes it meanwhile.
    let mask = unsafe {
        let mask = libc::umask(0);
        libc::umask(mask);
        mask
    };
    Ok((std::env::current_dir()?, mask))
}

/// clone(2) as fork(2) does it, with more flags; the child does `body` and exits.
pub(super) fn fork_with(flags: i32, body: impl FnOnce() -> Outcome) -> Outcome<i32> {
    // SAFETY: no CLONE_VM: a fork of a process with one thread.
    let pid = cvt_long(unsafe {
        libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0usize, 0usize, 0usize, 0usize)
    })?;
    if pid == 0 {
        let code = i32::from(body().is_err());
        // SAFETY: ends this copy.
        unsafe { libc::_exit(code) }
    }
    Ok(pid as i32)
}

pub(super) fn join(pid: i32) -> Outcome {
    let mut status = 0;
    // SAFETY: the kernel writes one int.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    if status == 0 { Ok(()) } else { Err(changed(format!("child {pid} ended with {status:#x}"))) }
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (first, second) = (ctl.work("first"), ctl.work("second"));
    std::fs::create_dir(&first)?;
    std::fs::create_dir(&second)?;
    std::env::set_current_dir(&first)?;
    let alone = fork_with(0, || {
        ctl.wait_as("alone")?;
        poll_until("the sharer has moved", || ctl.dir().join("work/moved").exists())?;
        same("the place of the one that shares nothing", place()?.0, first.clone())
    })?;
    let sharer = fork_with(libc::CLONE_FS, || {
        let grandchild = fork_with(libc::CLONE_FS, || {
            let sabotage = ctl.wait_as("grandchild")?;
            ensure(!sabotage, "spoilt")?;
            std::env::set_current_dir(&second)?;
            // SAFETY: cannot fail.
            unsafe { libc::umask(0o31) };
            std::fs::write(ctl.work("moved"), "")?;
            Ok(())
        })?;
        ctl.wait_as("sharer")?;
        join(grandchild)?;
        same("the sharer's place", place()?, (second.clone(), 0o31))
    })?;
    for name in ["alone", "sharer", "grandchild"] {
        ctl.await_ready(name)?;
    }

    ctl.wait()?;

    join(sharer)?;
    same("the parent's place", place()?, (second, 0o31))?;
    join(alone)
}
