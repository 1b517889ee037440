//! Scheduling of a thread, asked from outside (sched(7), ioprio_get(2)).

use super::TaskError;
use nix::errno::Errno;

/// Largest affinity mask asked for: 8192 CPUs, the most a kernel can be built for.
const AFFINITY_BYTES: usize = 1024;

/// How a thread is scheduled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scheduling {
    /// `SCHED_*`, with `SCHED_RESET_ON_FORK` or-ed in.
    pub policy: u32,
    /// Real-time priority.
    pub priority: u32,
    /// Nice value.
    pub nice: i32,
    /// CPU mask, without trailing zero bytes.
    pub affinity: Vec<u8>,
    /// ioprio_get(2).
    pub io_priority: u32,
    /// Runtime, deadline and period of SCHED_DEADLINE, nanoseconds; of SCHED_OTHER the slice of time, where the kernel tells it.
    pub deadline: [u64; 3],
    /// `SCHED_FLAG_*` besides the reset on fork.
    pub flags: u64,
    /// Utilization clamps, where the kernel has them.
    pub utilization: (u32, u32),
}

/// struct sched_attr (sched_getattr(2)); kernels without utilization clamps leave those zero.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    utilization_min: u32,
    utilization_max: u32,
}

/// Whether a thread has a core scheduling cookie (Documentation/admin-guide/hw-vuln/core-scheduling.rst).
pub fn has_core_cookie(tid: i32) -> bool {
    const PR_SCHED_CORE: i32 = 62;
    const PR_SCHED_CORE_GET: u64 = 0;
    const OF_THREAD: u64 = 0;
    let mut cookie = 0u64;
    // SAFETY: the kernel writes one word; where it has no such cookies it fails.
    let result =
        unsafe { libc::prctl(PR_SCHED_CORE, PR_SCHED_CORE_GET, tid as u64, OF_THREAD, &raw mut cookie) };
    result == 0 && cookie != 0
}

/// Asks the kernel about thread `tid`.
pub fn read(tid: i32) -> Result<Scheduling, TaskError> {
    let failed = |call| move || TaskError::Call { call, tid, errno: Errno::last() };
    let mut attributes = Attributes::default();
    // SAFETY: the kernel writes at most the size given, which is that of the struct.
    let result = unsafe {
        libc::syscall(libc::SYS_sched_getattr, tid, &mut attributes, size_of::<Attributes>() as u32, 0)
    };
    if result < 0 {
        return Err(failed("sched_getattr")());
    }
    let mut affinity = vec![0_u8; AFFINITY_BYTES];
    // SAFETY: the kernel writes at most the size given, which is that of the buffer.
    let written =
        unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, AFFINITY_BYTES, affinity.as_mut_ptr()) };
    if written < 0 {
        return Err(failed("sched_getaffinity")());
    }
    affinity.truncate(written as usize);
    affinity.truncate(affinity.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1));
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: ioprio_get takes no pointers.
    let io_priority = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid) };
    if io_priority < 0 {
        return Err(failed("ioprio_get")());
    }
    const SCHED_FLAG_RESET_ON_FORK: u64 = 1;
    let reset =
        if attributes.flags & SCHED_FLAG_RESET_ON_FORK != 0 { libc::SCHED_RESET_ON_FORK as u32 } else { 0 };
    Ok(Scheduling {
        policy: attributes.policy | reset,
        priority: attributes.priority,
        nice: attributes.nice,
        affinity,
        io_priority: io_priority as u32,
        deadline: [attributes.runtime, attributes.deadline, attributes.period],
        flags: attributes.flags & !SCHED_FLAG_RESET_ON_FORK,
        utilization: (attributes.utilization_min, attributes.utilization_max),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_our_own_scheduling() {
        // SAFETY: gettid and getpriority take no pointers.
        let (tid, nice) = unsafe { (libc::gettid(), libc::getpriority(libc::PRIO_PROCESS, 0)) };
        let scheduling = read(tid).unwrap();
        assert_eq!((scheduling.policy, scheduling.nice), (libc::SCHED_OTHER as u32, nice));
        assert!(scheduling.affinity.iter().any(|&byte| byte != 0));
    }
}
