//! Descriptors of the task itself, of a child, of one that has ended and waits for its parent, and of ones that are gone;
//! shared with a child, and watched by an epoll.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollFlags};

use super::epoll_basic::{add, ready};
use crate::ctl::{Ctl, Outcome, poll_until, same};
use crate::sys::{self, cvt, cvt_long, errno_of, fcntl};

/// `PIDFD_THREAD` (include/uapi/linux/pidfd.h).
const PIDFD_THREAD: i32 = libc::O_EXCL;

fn open(pid: i32, flags: i32) -> Outcome<OwnedFd> {
    // SAFETY: integers; the descriptor is new.
    unsafe { Ok(OwnedFd::from_raw_fd(cvt_long(libc::syscall(libc::SYS_pidfd_open, pid, flags))? as i32)) }
}

/// pidfd_send_signal(2) of signal 0.
fn reaches(pidfd: &OwnedFd) -> i32 {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: no signal and no siginfo.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), 0, none, 0) };
    errno_of(&cvt_long(sent))
}

/// waitid(2): (code, status).
fn wait(pidfd: &OwnedFd) -> Outcome<(i32, i32)> {
    // SAFETY: a zeroed siginfo_t is one, and is filled by a successful call.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        cvt(libc::waitid(libc::P_PIDFD, pidfd.as_raw_fd() as u32, &mut info, libc::WEXITED))?;
        Ok((info.si_code, info.si_status()))
    }
}

/// What fdinfo says of the process.
fn shown(pidfd: &OwnedFd) -> Outcome<String> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    Ok(text.lines().find(|line| line.starts_with("Pid:")).unwrap_or_default().to_owned())
}

fn has_ended(pidfd: &OwnedFd) -> bool {
    sys::readiness(pidfd, libc::POLLIN).is_ok_and(|events| events & libc::POLLIN != 0)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let own = open(std::process::id() as i32, libc::O_NONBLOCK)?;
    let thread = open(std::process::id() as i32, PIDFD_THREAD)?;
    let ended = |code: i32| -> Outcome<OwnedFd> {
        // SAFETY: ends the child at once.
        let child = ctl.child("ended", |_| unsafe { libc::_exit(code) })?;
        let pidfd = open(child.pid.as_raw(), 0)?;
        poll_until("the child ends", || has_ended(&pidfd))?;
        Ok(pidfd)
    };
    let zombie = ended(7)?;
    let gone = ended(8)?;
    let gone_too = gone.try_clone()?;
    wait(&gone)?;
    let child = ctl.child("runner", |ctl| {
        ctl.wait_as("runner")?;
        same("the parent, by its child", reaches(&own), 0)
    })?;
    ctl.await_ready("runner")?;
    let runner = open(child.pid.as_raw(), 0)?;
    let twin = runner.try_clone()?;
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    add(&epoll, runner.as_fd(), EpollFlags::EPOLLIN, 1)?;
    add(&epoll, gone.as_fd(), EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 2)?;
    same("ready", ready(&epoll)?.len(), 1)?;

    if ctl.wait()? {
        wait(&zombie)?;
    }

    same("own", (reaches(&own), has_ended(&own)), (0, false))?;
    same("of the thread", shown(&thread)?, format!("Pid:\t{}", std::process::id()))?;
    same("flags", fcntl(&thread, libc::F_GETFL, 0)? & PIDFD_THREAD, PIDFD_THREAD)?;
    same("flags", fcntl(&own, libc::F_GETFL, 0)? & (PIDFD_THREAD | libc::O_NONBLOCK), libc::O_NONBLOCK)?;
    same("not waited for", wait(&zombie)?, (libc::CLD_EXITED, 7))?;
    same("gone", (reaches(&gone), has_ended(&gone)), (libc::ESRCH, true))?;
    same("gone, waited for", has_ended(&gone_too), true)?;
    same("gone, shown", shown(&gone)?, "Pid:\t-1".to_owned())?;
    poll_until("the child ends", || has_ended(&twin))?;
    let events: Vec<u64> = ready(&epoll)?.into_iter().map(|(data, _)| data).collect();
    same("the child in the epoll", events.contains(&1), true)?;
    child.join()
}
