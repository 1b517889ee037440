//! Threads of which some have filters that others have not, over one that all have; and one that synchronises them.

use std::sync::mpsc;

use crate::ctl::{Ctl, Outcome, changed, ensure, same};
use crate::sys::{cvt, cvt_long, gettid};

/// A filter by which one call fails with an errno (seccomp(2)).
fn install(call: i64, errno: u32, flags: u64) -> Outcome {
    let code = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call as u32),
        code(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno),
        code(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program lives through the calls; the kernel copies it.
    unsafe {
        cvt(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        // Positive: a thread that cannot be synchronised.
        let result = cvt_long(libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &program))?;
        same("what seccomp gave", result, 0)?;
    }
    Ok(())
}

/// What two calls give here, and how many filters there are.
fn answers() -> Outcome<(i32, i32, String)> {
    let errno = |call| {
        // SAFETY: calls without arguments.
        let result = cvt_long(unsafe { libc::syscall(call) });
        result.err().and_then(|error| error.raw_os_error()).unwrap_or(0)
    };
    let status = std::fs::read_to_string(format!("/proc/self/task/{}/status", gettid()))?;
    let count = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:")).unwrap_or_default();
    Ok((errno(libc::SYS_getppid), errno(libc::SYS_getpgrp), count.trim().to_owned()))
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    install(libc::SYS_getppid, 101, 0)?;
    let mut threads = Vec::new();
    for own in [false, true, false] {
        let (ready, is_ready) = mpsc::channel();
        let (check, asked) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || -> Outcome {
            if own {
                install(libc::SYS_getpgrp, 102, 0)?;
                // Of two answers the later filter's counts.
                install(libc::SYS_getppid, 105, 0)?;
            }
            let expected = if own { (105, 102, "3".to_owned()) } else { (101, 0, "1".to_owned()) };
            same("before", answers()?, expected.clone())?;
            let _ = ready.send(());
            let _ = asked.recv();
            let _ = asked.recv();
            let synchronised = if own { expected } else { (101, 103, "2".to_owned()) };
            same("after", answers()?, synchronised)
        });
        is_ready.recv().map_err(|_| changed("a filter cannot be installed".into()))?;
        threads.push((own, thread, check));
    }

    let sabotage = ctl.wait()?;

    same("the first thread's", answers()?, (101, 0, "1".to_owned()))?;
    // Who has a filter of his own cannot be synchronised; so he goes first.
    let (with, without): (Vec<_>, Vec<_>) = threads.into_iter().partition(|(own, ..)| *own);
    for (_, thread, check) in with {
        drop(check);
        thread.join().map_err(|_| changed("a thread panicked".into()))??;
    }
    // They must still be descendants of one and the same filter.
    const SECCOMP_FILTER_FLAG_TSYNC: u64 = 1;
    install(libc::SYS_getpgrp, if sabotage { 104 } else { 103 }, SECCOMP_FILTER_FLAG_TSYNC)?;
    for (_, thread, check) in without {
        drop(check);
        thread.join().map_err(|_| changed("a thread panicked".into()))??;
    }
    ensure(std::fs::read_to_string("/proc/self/status")?.contains("Seccomp_filters:\t2"), "not synchronised")
}
