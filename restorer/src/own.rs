//! Scheduling and other settings of one thread. Only what differs is set: most need a privilege that leaving them as they are
//! does not.

use crate::proto::{Step, Thread};
use crate::sys::{Outcome, call, nr, step};

const PR_SET_TIMERSLACK: u64 = 29;
const PR_MCE_KILL: u64 = 33;
const PR_MCE_KILL_GET: u64 = 34;
const PR_MCE_KILL_SET: u64 = 1;
const PR_GET_SPECULATION_CTRL: u64 = 52;
const PR_SET_SPECULATION_CTRL: u64 = 53;
const PR_SPEC_PRCTL: u32 = 1;
const PR_SET_IO_FLUSHER: u64 = 57;
const ARCH_GET_CPUID: u64 = 0x1011;
const ARCH_SET_CPUID: u64 = 0x1012;
const IOPRIO_WHO_PROCESS: u64 = 1;
const SCHED_DEADLINE: u32 = 6;
const SCHED_RESET_ON_FORK: u32 = 0x4000_0000;
const SCHED_FLAG_RESET_ON_FORK: u64 = 1;
const SCHED_FLAG_UTIL_CLAMP: u64 = 0x60;

/// `struct sched_attr` (sched_setattr(2)).
#[repr(C)]
#[derive(Default, PartialEq, Eq)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    deadline: [u64; 3],
    utilization: [u32; 2],
}

/// All of them.
pub fn set(thread: &Thread) -> Outcome {
    scheduling(thread)?;
    affinity(thread)?;
    // SAFETY: none of these touches memory.
    unsafe {
        if thread.io_priority != 0 {
            let place = [IOPRIO_WHO_PROCESS, 0, thread.io_priority.into()];
            step(Step::IoPriority, 0, nr::IOPRIO_SET, place)?;
        }
        // Real-time and deadline policies have none.
        let real_time = matches!(thread.policy & !SCHED_RESET_ON_FORK, 1 | 2 | 6);
        if thread.timer_slack != 0 && !real_time {
            step(Step::TimerSlack, 0, nr::PRCTL, [PR_SET_TIMERSLACK, thread.timer_slack])?;
        }
        if call(nr::PRCTL, [PR_MCE_KILL_GET, 0, 0, 0, 0]) != i64::from(thread.machine_check) {
            let place = [PR_MCE_KILL, PR_MCE_KILL_SET, thread.machine_check.into(), 0, 0];
            step(Step::MachineCheck, 0, nr::PRCTL, place)?;
        }
        if thread.io_flusher != 0 {
            step(Step::IoFlusher, 0, nr::PRCTL, [PR_SET_IO_FLUSHER, 1, 0, 0, 0])?;
        }
        for (which, wanted) in thread.speculation.iter().enumerate() {
            let now = call(nr::PRCTL, [PR_GET_SPECULATION_CTRL, which as u64, 0, 0, 0]);
            if wanted & PR_SPEC_PRCTL != 0 && now != i64::from(*wanted) {
                let place = [PR_SET_SPECULATION_CTRL, which as u64, (wanted & !PR_SPEC_PRCTL).into(), 0, 0];
                step(Step::Speculation, which, nr::PRCTL, place)?;
            }
        }
        if thread.cpuid < 2 && call(nr::ARCH_PRCTL, [ARCH_GET_CPUID, 0]) != i64::from(thread.cpuid) {
            step(Step::CpuId, 0, nr::ARCH_PRCTL, [ARCH_SET_CPUID, thread.cpuid.into()])?;
        }
    }
    memory_policy(thread)
}

fn scheduling(thread: &Thread) -> Outcome {
    let size = size_of::<Attributes>() as u32;
    let mut now = Attributes::default();
    // SAFETY: the kernel writes at most `size` bytes.
    unsafe {
        step(Step::Scheduling, 0, nr::SCHED_GETATTR, [0, &raw mut now as u64, size.into(), 0])?;
    }
    let reset = if thread.policy & SCHED_RESET_ON_FORK != 0 { SCHED_FLAG_RESET_ON_FORK } else { 0 };
    let mut wanted = Attributes {
        size: now.size,
        policy: thread.policy & !SCHED_RESET_ON_FORK,
        flags: thread.sched_flags | reset,
        nice: thread.nice,
        priority: thread.priority,
        deadline: thread.deadline,
        utilization: thread.utilization,
    };
    if now == wanted {
        return Ok(());
    }
    wanted.size = size;
    // The slice that everybody has is no setting of its own.
    if wanted.policy != SCHED_DEADLINE && wanted.deadline == now.deadline {
        wanted.deadline = [0; 3];
    }
    if wanted.utilization != now.utilization {
        wanted.flags |= SCHED_FLAG_UTIL_CLAMP;
    }
    let what =
        if now.policy == wanted.policy && now.nice != wanted.nice { Step::Nice } else { Step::Scheduling };
    // SAFETY: the kernel reads one struct sched_attr.
    unsafe { step(what, 0, nr::SCHED_SETATTR, [0, &raw const wanted as u64, 0])? };
    Ok(())
}

fn affinity(thread: &Thread) -> Outcome {
    let mask = thread.affinity.entries();
    let mut now = [0_u8; 1024];
    // SAFETY: the kernel writes at most 1024 bytes.
    let got = unsafe { call(nr::SCHED_GETAFFINITY, [0, now.len() as u64, now.as_mut_ptr() as u64]) };
    let same = usize::try_from(got).ok().and_then(|len| now.get(..len)).is_some_and(|now| {
        let common = now.len().min(mask.len());
        now[..common] == mask[..common] && now[common..].iter().chain(&mask[common..]).all(|&byte| byte == 0)
    });
    if !mask.is_empty() && !same {
        let place = [0, mask.len() as u64, mask.as_ptr() as u64];
        // SAFETY: the kernel reads the mask.
        unsafe { step(Step::Affinity, 0, nr::SCHED_SETAFFINITY, place)? };
    }
    Ok(())
}

/// The memory that exists is where it is; the policy is for what comes.
fn memory_policy(thread: &Thread) -> Outcome {
    let nodes = thread.memory_nodes.entries();
    if thread.memory_policy != 0 || !nodes.is_empty() {
        // One more than the bits, which the kernel takes off first (get_nodes in mm/mempolicy.c).
        let bits = nodes.len() as u64 * 64 + 1;
        let place = [thread.memory_policy.into(), nodes.as_ptr() as u64, bits];
        // SAFETY: the kernel reads the nodes.
        unsafe { step(Step::MemoryPolicy, 0, nr::SET_MEMPOLICY, place)? };
    }
    Ok(())
}
