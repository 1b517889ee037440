//! Calls that last, with a time limit and without: each goes on after a restore and ends as it would have, never with EINTR.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, Signal, kill};

use crate::ctl::{Child, Ctl, Outcome, pause, same};
use crate::sys::{cvt_long, pipe, read, write};

const HOUR: libc::timespec = libc::timespec { tv_sec: 3600, tv_nsec: 0 };

/// Nearly as long as the kernel can count.
const AGES: libc::timespec = libc::timespec { tv_sec: 9_000_000_000, tv_nsec: 0 };

/// A child in a call, and what ends that call.
struct Waiter {
    child: Child,
    release: Box<dyn FnOnce(&Child) -> Outcome>,
}

/// epoll_wait(2) of a pipe that gets readable.
fn epoll(ctl: &Ctl, name: &str, timeout: i64) -> Outcome<Waiter> {
    let (reader, writer) = pipe(libc::O_CLOEXEC)?;
    // SAFETY: an integer argument.
    let epoll = cvt_long(unsafe { libc::syscall(libc::SYS_epoll_create1, 0) })? as i32;
    // SAFETY: new.
    let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 77 };
    let control = [libc::EPOLL_CTL_ADD, reader.as_raw_fd()];
    // SAFETY: the event outlives the call.
    cvt_long(i64::from(unsafe { libc::epoll_ctl(epoll.as_raw_fd(), control[0], control[1], &mut event) }))?;
    let child = ctl.child(name, |ctl| {
        let mut got = libc::epoll_event { events: 0, u64: 0 };
        ctl.announce(&format!("ready.{name}"), b"")?;
        // SAFETY: room for one event.
        let n = unsafe { libc::syscall(libc::SYS_epoll_wait, epoll.as_raw_fd(), &raw mut got, 1, timeout) };
        same("epoll_wait", (cvt_long(n)?, { got.u64 }), (1, 77))
    })?;
    let release = move |_: &Child| {
        write(&writer, b"x")?;
        drop(reader);
        Ok(())
    };
    Ok(Waiter { child, release: Box::new(release) })
}

/// rt_sigtimedwait(2) for a signal that is sent.
fn signal(ctl: &Ctl, name: &str, time: Option<libc::timespec>) -> Outcome<Waiter> {
    let child = ctl.child(name, |ctl| {
        SigSet::from(Signal::SIGUSR1).thread_block()?;
        let (set, time) = (1_u64 << (libc::SIGUSR1 - 1), time);
        let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let mut info = [0_u64; 16];
        ctl.announce(&format!("ready.{name}"), b"")?;
        // SAFETY: set, siginfo_t and time outlive the call.
        let result =
            unsafe { libc::syscall(libc::SYS_rt_sigtimedwait, &raw const set, info.as_mut_ptr(), time, 8) };
        same("rt_sigtimedwait", cvt_long(result)?, i64::from(libc::SIGUSR1))
    })?;
    Ok(Waiter { child, release: Box::new(|child| Ok(kill(child.pid, Signal::SIGUSR1)?)) })
}

/// flock(2) of a file that its parent has locked.
fn flock(ctl: &Ctl, name: &str) -> Outcome<Waiter> {
    let path = ctl.work(name);
    let held = Flock::lock(File::create(&path)?, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let child = ctl.child(name, |ctl| {
        let file = File::open(&path)?;
        ctl.announce(&format!("ready.{name}"), b"")?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        Ok(())
    })?;
    Ok(Waiter { child, release: Box::new(move |_| Ok(held.unlock().map(drop).map_err(|(_, errno)| errno)?)) })
}

/// F_SETLKW of a file that its parent has locked.
fn posix_lock(ctl: &Ctl, name: &str) -> Outcome<Waiter> {
    fn set(file: &File, command: i32, kind: i32) -> Outcome<i64> {
        // SAFETY: all zeros is a valid struct flock: the whole file.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = kind as i16;
        // SAFETY: the structure outlives the call.
        Ok(cvt_long(i64::from(unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &raw const lock) }))?)
    }
    let path = ctl.work(name);
    let held = File::create(&path)?;
    set(&held, libc::F_SETLK, libc::F_WRLCK)?;
    let child = ctl.child(name, |ctl| {
        let file = File::options().write(true).open(&path)?;
        ctl.announce(&format!("ready.{name}"), b"")?;
        set(&file, libc::F_SETLKW, libc::F_WRLCK).map(drop)
    })?;
    Ok(Waiter { child, release: Box::new(move |_| set(&held, libc::F_SETLK, libc::F_UNLCK).map(drop)) })
}

/// accept4(2) of a connection that comes.
fn accept(ctl: &Ctl, name: &str) -> Outcome<Waiter> {
    let path = ctl.work(name);
    let listener = UnixListener::bind(&path)?;
    let child = ctl.child(name, |ctl| {
        ctl.announce(&format!("ready.{name}"), b"")?;
        // SAFETY: asks for no address.
        let fd = unsafe { libc::syscall(libc::SYS_accept4, listener.as_raw_fd(), 0, 0, libc::SOCK_CLOEXEC) };
        // SAFETY: new.
        let connection = unsafe { OwnedFd::from_raw_fd(cvt_long(fd)? as i32) };
        same("what came", read(&connection, 9)?, b"hello".to_vec())
    })?;
    let release = move |_: &Child| {
        write(std::os::unix::net::UnixStream::connect(&path)?, b"hello")?;
        Ok(())
    };
    Ok(Waiter { child, release: Box::new(release) })
}

/// waitid(2) for a grandchild that ends.
fn wait(ctl: &Ctl, name: &str) -> Outcome<Waiter> {
    let (reader, writer) = pipe(libc::O_CLOEXEC)?;
    let child = ctl.child(name, |ctl| {
        let inner = ctl.child("inner", |_| same("the pipe", read(&reader, 1)?, b"x".to_vec()))?;
        ctl.announce(&format!("ready.{name}"), b"")?;
        inner.join()
    })?;
    let release = move |_: &Child| {
        write(&writer, b"x")?;
        Ok(())
    };
    Ok(Waiter { child, release: Box::new(release) })
}

/// msgrcv(2) of a message that is sent. The queue goes with its namespace.
fn message(ctl: &Ctl, name: &str) -> Outcome<Waiter> {
    // SAFETY: numbers only.
    let queue = cvt_long(unsafe { libc::syscall(libc::SYS_msgget, libc::IPC_PRIVATE, 0o600) })?;
    let child = ctl.child(name, |ctl| {
        // Type and text.
        let mut got = [0_u64; 2];
        ctl.announce(&format!("ready.{name}"), b"")?;
        // SAFETY: room for eight bytes behind the type.
        let length = unsafe { libc::syscall(libc::SYS_msgrcv, queue, got.as_mut_ptr(), 8, 0, 0) };
        same("msgrcv", (cvt_long(length)?, got), (8, [7, 0xABCD]))
    })?;
    let release = move |_: &Child| {
        let message = [7_u64, 0xABCD];
        // SAFETY: eight bytes behind the type.
        cvt_long(unsafe { libc::syscall(libc::SYS_msgsnd, queue, message.as_ptr(), 8, 0) }).map(drop)?;
        Ok(())
    };
    Ok(Waiter { child, release: Box::new(release) })
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let waiters = [
        epoll(ctl, "epoll", -1)?,
        epoll(ctl, "epoll-hour", 3_600_000)?,
        signal(ctl, "signal", None)?,
        signal(ctl, "signal-hour", Some(HOUR))?,
        signal(ctl, "signal-ages", Some(AGES))?,
        flock(ctl, "flock")?,
        posix_lock(ctl, "posix-lock")?,
        accept(ctl, "accept")?,
        wait(ctl, "wait")?,
        message(ctl, "message")?,
    ];
    for name in ["epoll", "epoll-hour", "signal", "signal-hour", "signal-ages", "flock", "posix-lock", "accept", "wait", "message"] {
        ctl.await_ready(name)?;
    }
    pause(Duration::from_millis(50));

    let sabotage = ctl.wait()?;

    for waiter in waiters {
        // Something that ends no wait as it should end.
        if sabotage {
            kill(waiter.child.pid, Signal::SIGTERM)?;
        } else {
            (waiter.release)(&waiter.child)?;
        }
        waiter.child.join()?;
    }
    Ok(())
}
