//! Threads under every scheduling policy, with nice values, slices, affinity and I/O priorities of their own.

use std::sync::mpsc;

use crate::ctl::{Ctl, Outcome, changed, ensure, same};
use crate::sys::{cvt, cvt_long};

/// struct sched_attr (sched_setattr(2)).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    utilization: [u32; 2],
}

/// policy, flags, nice, priority, runtime (of a slice or a deadline).
const KINDS: [(&str, u32, u64, i32, u32, u64); 8] = [
    ("other", 0, 0, 0, 0, 0),
    ("nice", 0, 0, 7, 0, 0),
    ("slice", 0, 0, 3, 0, 5_000_000),
    ("fifo", 1, 0, 0, 11, 0),
    ("round robin, reset on fork", 2, 1, 0, 12, 0),
    ("batch", 3, 0, 5, 0, 0),
    ("idle", 5, 0, 0, 0, 0),
    // SCHED_FLAG_RECLAIM, and reset on fork.
    ("deadline", 6, 3, 0, 0, 2_000_000),
];

/// What the kernel says of the calling thread.
fn now() -> Outcome<(Attributes, i64, Vec<u8>)> {
    let (mut found, mut mask) = (Attributes::default(), vec![0u8; 128]);
    // SAFETY: the kernel writes no more than the sizes given.
    let priority = unsafe {
        cvt_long(libc::syscall(libc::SYS_sched_getattr, 0, &mut found, size_of::<Attributes>(), 0))?;
        cvt_long(libc::syscall(libc::SYS_sched_getaffinity, 0, mask.len(), mask.as_mut_ptr()))?;
        libc::syscall(libc::SYS_ioprio_get, 1, 0)
    };
    Ok((found, priority, mask))
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut threads = Vec::new();
    for (n, (name, policy, flags, nice, priority, runtime)) in KINDS.into_iter().enumerate() {
        let (ready, is_ready) = mpsc::channel();
        let (check, asked) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || -> Outcome<bool> {
            let deadline = if policy == 6 { 100_000_000 } else { 0 };
            let wanted = Attributes {
                size: size_of::<Attributes>() as u32,
                policy,
                flags,
                nice,
                priority,
                runtime,
                deadline,
                period: 2 * deadline,
                utilization: [0; 2],
            };
            // SAFETY: the kernel reads one struct sched_attr; nothing but numbers for the others.
            let set = unsafe { cvt_long(libc::syscall(libc::SYS_sched_setattr, 0, &wanted, 0)) };
            let can = set.is_ok();
            // A deadline thread may run everywhere.
            if policy != 6 && n % 2 == 1 {
                // SAFETY: a set of this frame.
                unsafe {
                    let mut set: libc::cpu_set_t = std::mem::zeroed();
                    libc::CPU_SET(0, &mut set);
                    cvt(libc::sched_setaffinity(0, size_of_val(&set), &set))?;
                }
            }
            // IOPRIO_CLASS_BE and a level.
            // SAFETY: takes numbers.
            cvt_long(unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, 2 << 13 | (n as i64 % 8)) })?;
            let before = now()?;
            let _ = ready.send(());
            let _ = asked.recv();
            same(name, now()?, before)?;
            Ok(can)
        });
        is_ready.recv().map_err(|_| changed(format!("cannot set {name}")))?;
        threads.push((name, thread, check));
    }

    let sabotage = ctl.wait()?;

    for (name, thread, check) in threads {
        drop(check);
        let can = thread.join().map_err(|_| changed("a thread panicked".into()))??;
        // In a user namespace only what lowers is allowed.
        // SAFETY: takes nothing.
        let uid_map = std::fs::read_to_string("/proc/self/uid_map")?;
        ensure(can || !uid_map.contains("4294967295"), &format!("{name} could not be set"))?;
    }
    ensure(!sabotage, "spoilt")
}
