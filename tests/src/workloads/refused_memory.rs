//! A process that shares the memory of its parent without being a thread of it (CLONE_VM): refused by name.

use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::time::Duration;

use crate::ctl::{Ctl, Outcome, ensure, pause, poll_until};
use crate::sys::cvt;

static STEP: AtomicI32 = AtomicI32::new(0);

/// The child: nothing but system calls, since it has the parent's memory.
extern "C" fn child(_: *mut libc::c_void) -> i32 {
    STEP.store(1, Relaxed);
    while STEP.load(Relaxed) != 2 {
        pause(Duration::from_millis(5));
    }
    0
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut stack = vec![0_u128; 4096];
    let top = stack.as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::SIGCHLD;
    // SAFETY: the stack outlives the child, which is waited for below.
    let pid = cvt(unsafe { libc::clone(child, top.cast(), flags, std::ptr::null_mut()) })?;
    poll_until("the child runs", || STEP.load(Relaxed) == 1)?;

    let sabotage = ctl.wait()?;

    STEP.store(2, Relaxed);
    let mut status = 0;
    // SAFETY: the kernel writes one int.
    cvt(unsafe { libc::waitpid(pid, &raw mut status, 0) })?;
    drop(stack);
    ensure(status == 0 && !sabotage, "the child has failed")
}
