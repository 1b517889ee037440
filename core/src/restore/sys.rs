//! System calls that no crate of ours wraps.

use super::pids;
use nix::errno::Errno;
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    sync::atomic::AtomicU32,
    time::{Duration, Instant},
};

/// `struct clone_args` of `linux/sched.h`, up to `set_tid_size` and `cgroup`.
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// How long a number may stay in use when its last process is gone.
const PATIENCE: Duration = Duration::from_secs(2);

/// [`fork_once`], which waits for a number that nobody has any more: the kernel frees it a moment after the process is gone from
/// /proc (release_task in kernel/exit.c).
pub fn fork(flags: u64, exit_signal: i32, pid: i32) -> io::Result<i32> {
    let started = Instant::now();
    loop {
        match fork_once(flags, exit_signal, pid) {
            Err(error)
                if error.raw_os_error() == Some(libc::EEXIST)
                    && started.elapsed() < PATIENCE
                    && !std::path::Path::new(&format!("/proc/{pid}")).exists() =>
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
}

/// Forks with clone3(2); gives 0 in the child. `pid` 0: any. The caller has one thread.
pub fn fork_once(flags: u64, exit_signal: i32, pid: i32) -> io::Result<i32> {
    let set_tid = [pid];
    let args = CloneArgs {
        flags,
        // CLONE_PARENT takes the signal of the parent's own creation (clone(2)).
        exit_signal: if flags & libc::CLONE_PARENT as u64 != 0 { 0 } else { exit_signal as u64 },
        set_tid: if pid == 0 { 0 } else { set_tid.as_ptr() as u64 },
        set_tid_size: u64::from(pid != 0),
        ..CloneArgs::default()
    };
    let started = Instant::now();
    loop {
        // SAFETY: a fork (no CLONE_VM) of a process with one thread; the arguments outlive the call.
        let forked = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
        match Errno::result(forked) {
            // The kernel frees a number a moment after its last task is out of sight (release_task, kernel/exit.c).
            Err(Errno::EEXIST) if !pids::taken(pid) && started.elapsed() < pids::PATIENCE => {
                std::thread::sleep(Duration::from_millis(1));
            }
            forked => return Ok(forked? as i32),
        }
    }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = Errno::result(result)?;
    // SAFETY: a descriptor that the kernel has just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// pidfd_open(2).
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: two integers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// pidfd_getfd(2).
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: three integers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })
}

/// dup3(2) to a number that is free or may be replaced.
pub fn duplicate_to(from: RawFd, to: RawFd, cloexec: bool) -> io::Result<()> {
    let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
    // SAFETY: descriptors of this process, which keeps no owner for `to`.
    Errno::result(unsafe { libc::dup3(from, to, flags) })?;
    Ok(())
}

/// A duplicate at the lowest free number from `from` on.
pub fn duplicate_above(fd: RawFd, from: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: an integer argument.
    owned(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, from) }.into())
}

/// fcntl(2) with an integer argument.
pub fn fcntl(fd: RawFd, command: i32, argument: i64) -> io::Result<i32> {
    // SAFETY: used with commands that take an integer.
    Ok(Errno::result(unsafe { libc::fcntl(fd, command, argument) })?)
}

/// close_range(2).
pub fn close_range(first: RawFd, last: u32) -> io::Result<()> {
    if first as u32 > last {
        return Ok(());
    }
    // SAFETY: descriptors that have no owner in this process any more.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first as u32, last, 0) })?;
    Ok(())
}

/// Closes a descriptor that has no owner.
pub fn close(fd: RawFd) {
    // SAFETY: the caller gives it up. An error of close(2) leaves it closed.
    unsafe { libc::close(fd) };
}

/// Waits while `word` is `value`, until woken or for `timeout` (futex(2), shared between processes).
pub fn futex_wait(word: &AtomicU32, value: u32, timeout: Duration) {
    let timeout = libc::timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
    // SAFETY: the word and the timeout outlive the call. Any error is a reason to look again.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const timeout) };
}

/// Wakes all who wait on `word`.
pub fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word outlives the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// A `prctl(2)` with one argument.
pub fn prctl(option: i32, argument: u64) -> io::Result<i32> {
    // SAFETY: used with options whose argument is an integer.
    Ok(Errno::result(unsafe { libc::prctl(option, argument, 0, 0, 0) })?)
}
