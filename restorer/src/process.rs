//! What belongs to the process as a whole; the leader does it.

use crate::proto::{Arguments, Filter, Limit, Step, Table};
use crate::sys::{Outcome, call, nr, step};
use crate::{thread, timers};
use core::sync::atomic::Ordering;

const PR_SET_CHILD_SUBREAPER: u64 = 36;
const PR_SET_THP_DISABLE: u64 = 41;
const PR_SET_MDWE: u64 = 65;
const PR_SET_MEMORY_MERGE: u64 = 67;
const PR_GET_DUMPABLE: u64 = 3;
const PR_SET_DUMPABLE: u64 = 4;
const SECCOMP_SET_MODE_FILTER: u64 = 1;
const FUTEX_WAIT: u64 = 0;
/// The kernel changes no action of SIGKILL and SIGSTOP.
const UNCHANGEABLE: [usize; 2] = [9, 19];

/// Restores the process, its threads included. Returns in the leader when all that is left is its trap.
pub fn restore(arguments: &'static Arguments) -> Outcome {
    attributes(arguments)?;
    for (index, action) in arguments.actions.entries().iter().enumerate() {
        let signal = index + 1;
        if !UNCHANGEABLE.contains(&signal) {
            let action = &raw const *action as u64;
            // SAFETY: the kernel reads one Action, which has the layout of its struct sigaction.
            unsafe { step(Step::Action, signal, nr::RT_SIGACTION, [signal as u64, action, 0, 8])? };
        }
    }
    filters(arguments.filters)?;
    let threads = arguments.threads.entries();
    for index in 1..threads.len() {
        thread::make(arguments, index)?;
    }
    let Some(leader) = threads.first() else { return Ok(()) };
    for (index, info) in arguments.pending.entries().iter().enumerate() {
        let place = [arguments.pid as u64, info[0] & 0x7f, &raw const *info as u64];
        // SAFETY: the kernel reads one siginfo_t.
        unsafe { step(Step::Pending, index, nr::RT_SIGQUEUEINFO, place)? };
    }
    timers::create(arguments)?;
    // One that exits now leaves nothing of its own.
    if arguments.leader_exits == 0 {
        thread::attributes(arguments, leader)?;
    }
    for (index, number) in arguments.close.entries().iter().enumerate() {
        // SAFETY: closes a descriptor that is none of the task's.
        unsafe { step(Step::Close, index, nr::CLOSE, [*number as u64])? };
    }
    // Threads that still set up themselves need the powers and limits that go now.
    while arguments.ready.load(Ordering::Acquire) as usize + 1 < threads.len() {
        let ready = arguments.ready.load(Ordering::Acquire);
        if ready as usize + 1 < threads.len() {
            let address = &raw const arguments.ready as u64;
            // SAFETY: waits while the counter has that value; threads wake us when they are ready.
            unsafe { call(nr::FUTEX, [address, FUTEX_WAIT, ready.into(), 0]) };
        }
    }
    thread::credentials(leader)?;
    // A change of ids resets it (commit_creds in kernel/cred.c).
    // SAFETY: no memory is involved.
    if unsafe { call(nr::PRCTL, [PR_GET_DUMPABLE]) } != i64::from(arguments.dumpable) {
        // SAFETY: as above.
        unsafe { step(Step::Dumpable, 0, nr::PRCTL, [PR_SET_DUMPABLE, arguments.dumpable.into(), 0, 0, 0])? };
    }
    limits(arguments)
}

fn attributes(arguments: &Arguments) -> Outcome {
    // SAFETY: none of these touches memory.
    unsafe {
        call(nr::UMASK, [arguments.umask.into()]);
        if call(nr::PERSONALITY, [0xffff_ffff]) != i64::from(arguments.personality) {
            step(Step::Personality, 0, nr::PERSONALITY, [arguments.personality.into()])?;
        }
        // PR_GET_THP_DISABLE gives the flags of the setting beside its first bit.
        let (disable, flags) = (arguments.thp_disable & 1, arguments.thp_disable & !1);
        step(Step::ThpDisable, 0, nr::PRCTL, [PR_SET_THP_DISABLE, disable.into(), flags.into(), 0, 0])?;
        if arguments.memory_merge != 0 {
            step(Step::MemoryMerge, 0, nr::PRCTL, [PR_SET_MEMORY_MERGE, 1, 0, 0, 0])?;
        }
        for bit in (0..32).filter(|bit| arguments.membarrier >> bit & 1 == 1) {
            // Registrations are reported as the commands that make them.
            step(Step::Membarrier, bit, nr::MEMBARRIER, [1 << bit, 0, 0])?;
        }
        if arguments.mdwe != 0 {
            step(Step::Mdwe, 0, nr::PRCTL, [PR_SET_MDWE, arguments.mdwe.into(), 0, 0, 0])?;
        }
        step(
            Step::Subreaper,
            0,
            nr::PRCTL,
            [PR_SET_CHILD_SUBREAPER, arguments.child_subreaper.into(), 0, 0, 0],
        )?;
    }
    Ok(())
}

/// Installs seccomp filters. The tracer has PTRACE_O_SUSPEND_SECCOMP, so none of them acts yet.
pub fn filters(filters: Table<Filter>) -> Outcome {
    for (index, filter) in filters.entries().iter().enumerate() {
        // `len` and `program` lie as in struct sock_fprog.
        let program = &raw const filter.len as u64;
        // SAFETY: the kernel reads the program, which is in the blob's memory.
        unsafe { step(Step::Seccomp, index, nr::SECCOMP, [SECCOMP_SET_MODE_FILTER, filter.flags, program])? };
    }
    Ok(())
}

/// Only what differs is set: raising a hard limit needs a privilege, leaving it does not.
fn limits(arguments: &Arguments) -> Outcome {
    for (index, limit) in arguments.limits.entries().iter().enumerate() {
        let mut now = Limit { soft: 0, hard: 0 };
        // SAFETY: the kernel writes one struct rlimit64.
        unsafe { step(Step::Limit, index, nr::PRLIMIT64, [0, index as u64, 0, &raw mut now as u64])? };
        if now != *limit {
            // SAFETY: the kernel reads one struct rlimit64.
            unsafe {
                step(Step::Limit, index, nr::PRLIMIT64, [0, index as u64, &raw const *limit as u64, 0])?
            };
        }
    }
    Ok(())
}
