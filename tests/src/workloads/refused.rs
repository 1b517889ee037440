//! Descriptors that nobody can keep: each must be refused by its name.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::cvt_long;

/// The kinds that this machine has, by the names in the refusals.
fn open_all() -> Vec<(&'static str, OwnedFd)> {
    // struct io_uring_params, perf_event_attr (a software clock) and union bpf_attr (a queue), mostly zeros.
    let mut ring = [0_u32; 30];
    let mut event = [0_u64; 16];
    (event[0], event[1]) = (128 << 32 | 1, 0);
    let map = [22_u32, 0, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let tries = [
        // SAFETY: all structures are as large as the calls want them and outlive them.
        ("io_uring", unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, ring.as_mut_ptr()) }),
        // SAFETY: as above.
        ("perf event", unsafe { libc::syscall(libc::SYS_perf_event_open, event.as_ptr(), 0, -1, -1, 0) }),
        // SAFETY: as above.
        ("bpf-map", unsafe { libc::syscall(libc::SYS_bpf, 0, map.as_ptr(), size_of_val(&map)) }),
        // SAFETY: an integer argument.
        ("userfaultfd", unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) }),
    ];
    let made = tries.into_iter().filter_map(|(name, result)| Some((name, cvt_long(result).ok()?)));
    // SAFETY: each descriptor is new.
    made.map(|(name, fd)| (name, unsafe { OwnedFd::from_raw_fd(fd as i32) })).collect()
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let held = open_all();
    let names: Vec<&str> = held.iter().map(|(name, _)| *name).collect();
    std::fs::write(ctl.work("names"), names.join("\n"))?;
    let numbers: Vec<(&str, i32)> = held.iter().map(|(name, fd)| (*name, fd.as_raw_fd())).collect();
    let held = if ctl.wait()? {
        drop(held);
        Vec::new()
    } else {
        held
    };
    for (name, number) in numbers {
        // SAFETY: only asks whether the number is in use.
        same(name, unsafe { libc::fcntl(number, libc::F_GETFD) } >= 0, true)?;
    }
    drop(held);
    Ok(())
}
