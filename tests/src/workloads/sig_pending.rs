//! Blocked signals that are pending: for the process, for one thread, and queued real-time ones with their values in
//! their order.

use std::sync::{Arc, Barrier};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};

use crate::ctl::{Ctl, Outcome, changed, ensure, same};

/// Takes one signal of the set, if one is pending: (number, value, code, sending pid).
fn take(signals: &[i32]) -> Option<(i32, usize, i32, i32)> {
    // SAFETY: all places live through the call; the timeout of zero makes it a look.
    unsafe {
        let (mut set, mut info): (libc::sigset_t, libc::siginfo_t) = std::mem::zeroed();
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // Not by glibc's face, which turns SI_TKILL into SI_USER.
        let got = libc::syscall(libc::SYS_rt_sigtimedwait, &set, &mut info, &now, 8usize) as i32;
        (got > 0).then(|| (got, info.si_value().sival_ptr as usize, info.si_code, info.si_pid()))
    }
}

fn queue(signal: i32, value: usize) {
    // SAFETY: a signal to ourselves, which is blocked.
    unsafe { libc::sigqueue(libc::getpid(), signal, libc::sigval { sival_ptr: value as *mut _ }) };
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (rt, rt2) = (libc::SIGRTMIN() + 1, libc::SIGRTMIN() + 5);
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGUSR1);
    blocked.add(Signal::SIGUSR2);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&blocked), None)?;
    // SAFETY: adds two real-time signals, which nix' SigSet has not, to the mask.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut set, rt);
        libc::sigaddset(&mut set, rt2);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
    let barrier = Arc::new(Barrier::new(2));
    let (other, theirs) = (barrier.clone(), ctl.clone());
    let thread = std::thread::spawn(move || -> Outcome {
        // SAFETY: directed at this very thread, which blocks it.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR2) };
        other.wait();
        theirs.wait_for_request()?;
        let got = take(&[libc::SIGUSR2]);
        ensure(got.is_some_and(|(_, _, code, _)| code == libc::SI_TKILL), "the thread's own signal is gone")
    });
    barrier.wait();
    for value in [5, 3, 4] {
        queue(rt, value);
    }
    queue(rt2, usize::MAX);
    // SAFETY: as above.
    unsafe { libc::kill(libc::getpid(), libc::SIGUSR1) };
    let pid = std::process::id() as i32;

    if ctl.wait()? {
        take(&[rt]);
    }

    thread.join().map_err(|_| changed("a thread panicked".into()))??;
    for value in [5, 3, 4] {
        same("queued signal", take(&[rt]), Some((rt, value, libc::SI_QUEUE, pid)))?;
    }
    same("queued signal", take(&[rt2]), Some((rt2, usize::MAX, libc::SI_QUEUE, pid)))?;
    let usr1 = take(&[libc::SIGUSR1]);
    ensure(usr1.is_some_and(|(_, _, code, from)| code == libc::SI_USER && from == pid), "SIGUSR1 is not as it was")?;
    same("nothing more is pending", take(&[rt, rt2, libc::SIGUSR1, libc::SIGUSR2]), None)
}
