//! Settings of a task: nice value, policy, affinity, I/O priority, timer slack, parent-death signal, limits, OOM score,
//! dumpable.

use std::fs;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::Pid;

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{cvt, cvt_long};

/// All of them, as the kernel tells.
fn shown() -> Outcome<Vec<String>> {
    let (mut slack_signal, mut affinity) = (0i32, 0u64);
    // SAFETY: each call gets numbers or places that live through it.
    let numbers = unsafe {
        cvt(libc::prctl(libc::PR_GET_PDEATHSIG, &raw mut slack_signal, 0, 0, 0))?;
        cvt_long(libc::syscall(libc::SYS_sched_getaffinity, 0, 8, &raw mut affinity))?;
        [
            i64::from(libc::getpriority(libc::PRIO_PROCESS, 0)),
            i64::from(libc::sched_getscheduler(0)),
            libc::syscall(libc::SYS_ioprio_get, 1, 0),
            i64::from(libc::prctl(libc::PR_GET_TIMERSLACK, 0, 0, 0, 0)),
            i64::from(libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0)),
            i64::from(libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0)),
            i64::from(slack_signal),
            affinity as i64,
        ]
    };
    let mut all = vec![format!("{numbers:?}")];
    for name in ["limits", "oom_score_adj", "coredump_filter"] {
        all.push(fs::read_to_string(format!("/proc/self/{name}"))?);
    }
    Ok(all)
}

fn change() -> Outcome {
    let mut one = CpuSet::new();
    one.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &one)?;
    setrlimit(Resource::RLIMIT_NOFILE, 200, 300)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 4096)?;
    fs::write("/proc/self/oom_score_adj", "321")?;
    fs::write("/proc/self/coredump_filter", "0x13")?;
    // SAFETY: numbers, and one struct that lives through the call.
    unsafe {
        let none: libc::sched_param = std::mem::zeroed();
        cvt(libc::sched_setscheduler(0, libc::SCHED_BATCH, &none))?;
        cvt(libc::setpriority(libc::PRIO_PROCESS, 0, 7))?;
        // Best effort, level 6 (ioprio_set(2)).
        cvt_long(libc::syscall(libc::SYS_ioprio_set, 1, 0, 2 << 13 | 6))?;
        cvt(libc::prctl(libc::PR_SET_TIMERSLACK, 123_456, 0, 0, 0))?;
        cvt(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGUSR2, 0, 0, 0))?;
        cvt(libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0))?;
    }
    Ok(())
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let child = ctl.child("settings", |ctl| {
        change()?;
        let before = shown()?;
        if ctl.wait_as("settings")? {
            setrlimit(Resource::RLIMIT_NOFILE, 199, 300)?;
        }
        same("settings", shown()?, before)
    })?;
    ctl.await_ready("settings")?;

    ctl.wait()?;

    child.join()
}
