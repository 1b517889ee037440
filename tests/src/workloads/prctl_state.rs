//! What prctl(2) and its kin set for a process or a thread.

use crate::ctl::{Ctl, Outcome, changed, pause, same};
use crate::sys::cvt_long;

const PR_SET_THP_DISABLE: i32 = 41;
const PR_MCE_KILL: i32 = 33;
const PR_SET_MDWE: i32 = 65;
const PR_SET_MEMORY_MERGE: i32 = 67;
const ARCH_GET_CPUID: i64 = 0x1011;
const ARCH_SET_CPUID: i64 = 0x1012;
const MEMBARRIER_CMD_GET_REGISTRATIONS: i64 = 1 << 9;
const MPOL_INTERLEAVE: i64 = 3;

fn prctl(option: i32, a: u64, b: u64) -> i64 {
    // SAFETY: only options that take numbers.
    unsafe { libc::syscall(libc::SYS_prctl, option, a, b, 0, 0) }
}

fn prctl_int(option: i32) -> i64 {
    let mut value = -1i32;
    // SAFETY: the kernel writes one int.
    unsafe { libc::syscall(libc::SYS_prctl, option, &mut value, 0, 0, 0) };
    i64::from(value)
}

/// get_mempolicy(2) of the calling thread.
fn policy() -> (i64, u64) {
    let (mut mode, mut nodes) = (0i32, [0u64; 16]);
    // SAFETY: the kernel writes an int and at most 1024 bits.
    unsafe { libc::syscall(libc::SYS_get_mempolicy, &mut mode, &mut nodes, 1024, 0, 0) };
    (i64::from(mode), nodes[0])
}

/// Sets some of them.
type Set = fn() -> Outcome;

/// Every setting of the process and of the calling thread.
fn settings() -> Vec<(&'static str, i64)> {
    let (mode, nodes) = policy();
    // SAFETY: take numbers.
    let (membarrier, cpuid) = unsafe {
        (
            libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0),
            libc::syscall(libc::SYS_arch_prctl, ARCH_GET_CPUID, 0),
        )
    };
    vec![
        ("dumpable", prctl(3, 0, 0)),
        ("THP disabled", prctl(42, 0, 0)),
        ("MDWE", prctl(66, 0, 0)),
        ("memory merge", prctl(68, 0, 0)),
        ("subreaper", prctl_int(37)),
        ("keepcaps", prctl(7, 0, 0)),
        ("securebits", prctl(27, 0, 0)),
        ("no_new_privs", prctl(39, 0, 0)),
        ("timer slack", prctl(30, 0, 0)),
        ("parent death signal", prctl_int(2)),
        ("TSC", prctl_int(25)),
        ("machine check", prctl(34, 0, 0)),
        ("store bypass", prctl(52, 0, 0)),
        ("membarrier", membarrier),
        ("CPUID", cpuid),
        ("memory policy", mode),
        ("nodes", nodes as i64),
    ]
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut children = Vec::new();
    // One feature a child, or they would hide each other.
    let kinds: [(&str, Set); 3] = [
        ("plain", || {
            for (option, a, b) in [
                (libc::PR_SET_DUMPABLE, 0, 0),
                (PR_SET_THP_DISABLE, 1, 0),
                (libc::PR_SET_CHILD_SUBREAPER, 1, 0),
                (libc::PR_SET_KEEPCAPS, 1, 0),
                (libc::PR_SET_TIMERSLACK, 123_456, 0),
                (libc::PR_SET_PDEATHSIG, libc::SIGURG as u64, 0),
                (PR_MCE_KILL, 1, 1),
            ] {
                cvt_long(prctl(option, a, b))?;
            }
            for command in [1 << 2, 1 << 4] {
                // SAFETY: takes numbers.
                cvt_long(unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) })?;
            }
            let node = 1u64;
            // SAFETY: the kernel reads one word.
            cvt_long(unsafe { libc::syscall(libc::SYS_set_mempolicy, MPOL_INTERLEAVE, &node, 65) })?;
            Ok(())
        }),
        ("strict", || {
            cvt_long(prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0))?;
            cvt_long(prctl(PR_SET_MDWE, 1, 0))?;
            // SECBIT_NOROOT and its lock.
            cvt_long(prctl(libc::PR_SET_SECUREBITS, 3, 0))?;
            // SAFETY: nobody here executes CPUID from now on. Absent on some processors.
            unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_CPUID, 0) };
            Ok(())
        }),
        ("merged", || {
            cvt_long(prctl(PR_SET_MEMORY_MERGE, 1, 0))?;
            // But where advised; since Linux 6.18.
            if prctl(PR_SET_THP_DISABLE, 1, 2) < 0 {
                cvt_long(prctl(PR_SET_THP_DISABLE, 1, 0))?;
            }
            // Rust's clocks read it by the vdso, so nothing here may ask for the time.
            cvt_long(prctl(libc::PR_SET_TSC, libc::PR_TSC_SIGSEGV as u64, 0))?;
            Ok(())
        }),
    ];
    for (name, set) in kinds {
        children.push(ctl.child(name, move |ctl| {
            // As its owner, since /proc/self is root's own when it is not dumpable.
            set()?;
            let before = settings();
            ctl.announce(&format!("ready.{name}"), b"")?;
            let request = ctl.dir().join("check-request");
            while !request.exists() {
                pause(std::time::Duration::from_millis(3));
            }
            let sabotage = std::fs::read(&request)? == b"sabotage";
            if sabotage && name == "plain" {
                prctl(libc::PR_SET_TIMERSLACK, 1000, 0);
            }
            for (was, is) in before.into_iter().zip(settings()) {
                same(was.0, is.1, was.1)?;
            }
            Ok(())
        })?);
        ctl.await_ready(name)?;
    }

    ctl.wait()?;

    let verdicts: Vec<Outcome> = children.into_iter().map(crate::ctl::Child::join).collect();
    verdicts.into_iter().find(Result::is_err).unwrap_or(Ok(())).map_err(|fail| changed(fail.to_string()))
}
