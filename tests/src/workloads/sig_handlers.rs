//! Signal actions: handlers with masks and flags, ignored and default signals.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::ctl::{Ctl, Outcome, ensure, same};

static CALLS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_signal: i32) {
    CALLS.fetch_add(1, Ordering::SeqCst);
}

extern "C" fn count_with_info(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo.
    let value = unsafe { (*info).si_value().sival_ptr } as u32;
    CALLS.fetch_add(value, Ordering::SeqCst);
}

/// The kernel's view of an action, byte by byte (rt_sigaction(2)).
fn action(signal: i32) -> [u64; 4] {
    let mut raw = [0u64; 4];
    // SAFETY: `raw` is as large as the kernel's sigaction; the mask has 8 bytes.
    unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, 0usize, raw.as_mut_ptr(), 8usize) };
    raw
}

fn set(signal: i32, handler: usize, flags: i32, mask: &[i32]) {
    // SAFETY: the handlers only touch atomics.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = handler;
        new.sa_flags = flags;
        for signal in mask {
            libc::sigaddset(&mut new.sa_mask, *signal);
        }
        libc::sigaction(signal, &new, std::ptr::null_mut());
    }
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    set(libc::SIGUSR1, count as *const () as usize, 0, &[libc::SIGUSR2, libc::SIGTERM]);
    set(libc::SIGUSR2, count as *const () as usize, libc::SA_RESTART | libc::SA_NODEFER, &[]);
    set(libc::SIGRTMIN() + 3, count_with_info as *const () as usize, libc::SA_SIGINFO, &[libc::SIGRTMIN() + 4]);
    set(libc::SIGTERM, count as *const () as usize, libc::SA_RESETHAND, &[]);
    set(libc::SIGHUP, libc::SIG_IGN, 0, &[]);
    set(libc::SIGCHLD, libc::SIG_IGN, libc::SA_NOCLDWAIT | libc::SA_NOCLDSTOP, &[]);
    let before: Vec<_> = (1..=64).map(action).collect();

    if ctl.wait()? {
        set(libc::SIGWINCH, libc::SIG_IGN, 0, &[]);
    }

    for (n, was) in before.iter().enumerate() {
        same(&format!("action of signal {}", n + 1), action(n as i32 + 1), *was)?;
    }
    // SAFETY: signals to ourselves, for which there are handlers.
    unsafe {
        libc::raise(libc::SIGUSR1);
        libc::raise(libc::SIGUSR2);
        libc::raise(libc::SIGHUP);
        let value = libc::sigval { sival_ptr: 10 as *mut _ };
        libc::sigqueue(libc::getpid(), libc::SIGRTMIN() + 3, value);
        libc::raise(libc::SIGTERM);
    }
    same("what the handlers counted", CALLS.load(Ordering::SeqCst), 13)?;
    ensure(action(libc::SIGTERM)[0] == libc::SIG_DFL as u64, "SA_RESETHAND did not reset")
}
