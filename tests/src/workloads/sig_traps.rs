//! The signals that a tool's own traps raise: ignored, handled, and pending because somebody sent them.

use crate::ctl::{Ctl, Outcome, same};

/// rt_sigaction(2): handler and flags.
fn action(signal: i32) -> (usize, i32) {
    // SAFETY: reads the action of a signal.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action);
        (action.sa_sigaction, action.sa_flags)
    }
}

extern "C" fn handler(_: i32) {}

const SENT: [i32; 4] = [libc::SIGTRAP, libc::SIGSEGV, libc::SIGSYS, libc::SIGILL];

/// Takes one of [`SENT`]: (number, code, sender).
fn take() -> Option<(i32, i32, i32)> {
    // SAFETY: all places live through the call.
    unsafe {
        let (mut set, mut info): (libc::sigset_t, libc::siginfo_t) = std::mem::zeroed();
        SENT.iter().for_each(|&signal| {
            libc::sigaddset(&mut set, signal);
        });
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let got = libc::syscall(libc::SYS_rt_sigtimedwait, &set, &mut info, &now, 8usize) as i32;
        (got > 0).then(|| (got, info.si_code, info.si_pid()))
    }
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut children = Vec::new();
    for (name, how) in [("ignored", libc::SIG_IGN), ("handled", handler as *const () as usize)] {
        children.push(ctl.child(name, move |ctl| {
            // SAFETY: a handler that does nothing.
            unsafe { libc::signal(libc::SIGTRAP, how) };
            let before = action(libc::SIGTRAP);
            let sabotage = ctl.wait_as(name)?;
            if sabotage {
                // SAFETY: as above.
                unsafe { libc::signal(libc::SIGTRAP, libc::SIG_DFL) };
            }
            same("the action of SIGTRAP", action(libc::SIGTRAP), before)
        })?);
        ctl.await_ready(name)?;
    }
    children.push(ctl.child("pending", |ctl| {
        // SAFETY: sets of this frame, signals to ourselves, which are blocked.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            SENT.iter().for_each(|&signal| {
                libc::sigaddset(&mut set, signal);
            });
            libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            SENT.iter().for_each(|&signal| {
                libc::kill(libc::getpid(), signal);
            });
            libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), libc::SIGTRAP);
        }
        ctl.wait_as("pending")?;
        let pid = std::process::id() as i32;
        let mut got: Vec<_> = std::iter::from_fn(take).collect();
        got.sort();
        let mut expected: Vec<_> = SENT.iter().map(|&signal| (signal, libc::SI_USER, pid)).collect();
        expected.push((libc::SIGTRAP, libc::SI_TKILL, pid));
        expected.sort();
        same("pending signals", got, expected)
    })?);
    ctl.await_ready("pending")?;

    ctl.wait()?;

    for child in children {
        child.join()?;
    }
    Ok(())
}
