//! Flags of each end, its owner and signal (F_SETOWN, F_SETSIG, O_ASYNC), which still works.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use crate::ctl::{Ctl, Outcome, poll_until, same};
use crate::sys::{self, errno_of, fcntl};

static GOT: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: for SIGIO-like signals the kernel fills in si_fd, which follows si_band (sigaction(2)).
    let fd = unsafe { info.cast::<i32>().add(6).read() };
    GOT.store(fd, Ordering::SeqCst);
}

/// `struct f_owner_ex` and its commands (fcntl(2)).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
struct Owner {
    kind: i32,
    pid: i32,
}
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
const F_OWNER_PGRP: i32 = 2;

fn owner(fd: &OwnedFd, command: i32, mut owner: Owner) -> Outcome<Owner> {
    // SAFETY: the struct lives through the call.
    sys::cvt(unsafe { libc::fcntl(fd.as_raw_fd(), command, &mut owner) })?;
    Ok(owner)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (reader, writer) = sys::pipe(0)?;
    let signal = libc::SIGRTMIN() + 2;
    // SAFETY: the handler only touches an atomic.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = note as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        libc::sigaction(signal, &action, std::ptr::null_mut());
    }
    fcntl(&reader, libc::F_SETFL, libc::O_NONBLOCK | libc::O_ASYNC)?;
    fcntl(&reader, libc::F_SETOWN, std::process::id() as i32)?;
    // F_SETSIG and F_GETSIG (fcntl(2)).
    fcntl(&reader, 10, signal)?;
    let (_quiet, group_owned) = sys::pipe(libc::O_CLOEXEC)?;
    // SAFETY: no arguments.
    let group = Owner { kind: F_OWNER_PGRP, pid: unsafe { libc::getpgrp() } };
    owner(&group_owned, F_SETOWN_EX, group)?;

    if ctl.wait()? {
        fcntl(&reader, libc::F_SETFL, libc::O_ASYNC)?;
    }

    same("reader's flags", fcntl(&reader, libc::F_GETFL, 0)?, libc::O_NONBLOCK | libc::O_ASYNC)?;
    same("writer's flags", fcntl(&writer, libc::F_GETFL, 0)?, libc::O_WRONLY)?;
    same("owner", fcntl(&reader, libc::F_GETOWN, 0)?, std::process::id() as i32)?;
    same("signal", fcntl(&reader, 11, 0)?, signal)?;
    same("group that owns", owner(&group_owned, F_GETOWN_EX, Owner { kind: -1, pid: -1 })?, group)?;
    same("close-on-exec", fcntl(&group_owned, libc::F_GETFD, 0)?, libc::FD_CLOEXEC)?;
    same("empty", errno_of(&sys::read(&reader, 1)), libc::EAGAIN)?;
    same("signals until now", GOT.load(Ordering::SeqCst), 0)?;
    sys::write(&writer, b"x")?;
    let number = reader.as_raw_fd();
    poll_until("the signal comes", || GOT.load(Ordering::SeqCst) == number)
}
