//! A thread inside a signal handler on an alternate stack, and another with an alternate stack that is not in use.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::ctl::{Ctl, Outcome, changed, ensure, pause, poll_until, same};
use crate::sys::Map;

const SIZE: usize = 64 << 10;

static LEAVE: AtomicBool = AtomicBool::new(false);
static INSIDE: AtomicUsize = AtomicUsize::new(0);

extern "C" fn linger(_signal: i32) {
    let on_stack = 0u64;
    INSIDE.store(&raw const on_stack as usize, Ordering::SeqCst);
    while !LEAVE.load(Ordering::SeqCst) {
        pause(Duration::from_millis(2));
    }
}

/// sigaltstack(2): sets if given, returns the old one as (address, flags, size).
fn altstack(new: Option<&Map>) -> (usize, i32, usize) {
    // SAFETY: the stack is a mapping that stays; the places live through the call.
    unsafe {
        let mut old: libc::stack_t = std::mem::zeroed();
        let stack = new.map(|map| libc::stack_t { ss_sp: map.addr as *mut _, ss_flags: 0, ss_size: map.len });
        libc::sigaltstack(stack.as_ref().map_or(std::ptr::null(), |stack| stack), &mut old);
        (old.ss_sp as usize, old.ss_flags, old.ss_size)
    }
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (mine, theirs) = (Map::anon(SIZE)?, Map::anon(SIZE)?);
    // SAFETY: the handler only touches atomics and sleeps.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = linger as *const () as usize;
        action.sa_flags = libc::SA_ONSTACK;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
    }
    let thread = std::thread::spawn(move || -> Outcome {
        altstack(Some(&theirs));
        // SAFETY: there is a handler.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR1) };
        same("altstack after the handler", altstack(None), (theirs.addr, 0, SIZE))
    });
    altstack(Some(&mine));
    poll_until("the handler runs", || INSIDE.load(Ordering::SeqCst) != 0)?;
    let inside = INSIDE.load(Ordering::SeqCst);
    ensure((theirs.addr..theirs.addr + SIZE).contains(&inside), "the handler is not on its stack")?;

    if ctl.wait()? {
        altstack(Some(&theirs));
    }

    same("unused altstack", altstack(None), (mine.addr, 0, SIZE))?;
    ensure(!thread.is_finished(), "the handler has been left")?;
    LEAVE.store(true, Ordering::SeqCst);
    thread.join().map_err(|_| changed("a thread panicked".into()))?
}
