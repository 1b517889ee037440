//! A thread that may have its system calls dispatched to a handler of its own, which cannot be kept.

use std::sync::atomic::AtomicU8;

use crate::ctl::{Ctl, Fail, Outcome, ensure};
use crate::sys::cvt;

/// SYSCALL_DISPATCH_FILTER_ALLOW: none is dispatched.
static SELECTOR: AtomicU8 = AtomicU8::new(0);
const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    // SAFETY: the selector lives as long as the process.
    cvt(unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, 1, 0, 0, SELECTOR.as_ptr()) })
        .map_err(|error| Fail::Absent(format!("syscall user dispatch: {error}")))?;
    let sabotage = ctl.wait()?;
    ensure(!sabotage, "nothing that could be spoilt")
}
