//! A task under a filter that allows only what it needs to wait and to check: nanosleep, futex, read, write, exit.
//! Everything else kills it, so a tool that makes a call in it must lift the filter first, and put it back.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::ctl::{Ctl, Outcome, changed, ensure, pause, poll_until, same};
use crate::sys::{Map, cvt, cvt_long};

const ALLOWED: [i64; 7] = [
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_write,
    libc::SYS_exit_group,
    libc::SYS_exit,
    libc::SYS_rt_sigreturn,
];

/// Installs the filter: the allowed calls pass, getpid gives errno 99, all else kills the process (seccomp(2)).
fn install() -> Outcome {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let jump = |k: u32, jt: u8| libc::sock_filter { code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, jt, jf: 0, k };
    let count = ALLOWED.len() as u8;
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    program.push(jump(libc::SYS_getpid as u32, count + 1));
    for (n, call) in ALLOWED.into_iter().enumerate() {
        program.push(jump(call as u32, count - n as u8 + 1));
    }
    let give = |k| statement(libc::BPF_RET | libc::BPF_K, k);
    program.extend([give(libc::SECCOMP_RET_KILL_PROCESS), give(libc::SECCOMP_RET_ERRNO | 99), give(libc::SECCOMP_RET_ALLOW)]);
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program lives through the calls; the kernel copies it.
    unsafe {
        cvt(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        cvt_long(libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &program))?;
    }
    Ok(())
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let shared = Map::shared(4096)?;
    let word = |n: usize| {
        // SAFETY: an aligned word of a mapping that stays.
        unsafe { AtomicU32::from_ptr((shared.addr + 8 * n) as *mut u32) }
    };
    let private = Map::anon(1 << 16)?;
    private.fill(5);
    let child = ctl.child("filtered", |_| {
        install()?;
        word(0).store(1, Ordering::SeqCst);
        while word(1).load(Ordering::SeqCst) == 0 {
            pause(Duration::from_millis(3));
        }
        // SAFETY: takes nothing; the filter answers instead of the kernel.
        let answer = unsafe { libc::syscall(libc::SYS_getpid) };
        let errno = std::io::Error::last_os_error().raw_os_error();
        let good = private.check("private memory", 5).is_ok() && answer == -1 && errno == Some(99);
        word(2).store(if good { 1 } else { 2 }, Ordering::SeqCst);
        if word(1).load(Ordering::SeqCst) == 2 {
            // SAFETY: the filter must kill us for this.
            unsafe { libc::syscall(libc::SYS_getuid) };
        }
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) }
    })?;
    poll_until("the filter is in place", || word(0).load(Ordering::SeqCst) == 1)?;

    let sabotage = ctl.wait()?;

    let status = std::fs::read_to_string(format!("/proc/{}/status", child.pid))?;
    ensure(status.contains("Seccomp:\t2"), "the filter is gone")?;
    word(1).store(2, Ordering::SeqCst);
    poll_until("the filtered task answers", || word(2).load(Ordering::SeqCst) != 0)?;
    same("what it found", word(2).load(Ordering::SeqCst), 1 + u32::from(sabotage))?;
    match nix::sys::wait::waitpid(child.pid, None)? {
        nix::sys::wait::WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGSYS, _) => Ok(()),
        other => Err(changed(format!("the forbidden call ended with {other:?}"))),
    }
}
