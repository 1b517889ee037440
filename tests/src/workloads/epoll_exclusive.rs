//! Three tasks, each asleep in an epoll set of its own that watches the same pipe with EPOLLEXCLUSIVE: a write wakes one of them.

use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::epoll_basic::add;
use crate::ctl::{Child, Ctl, Outcome, pause, poll_until, same};
use crate::sys;

const TASKS: usize = 3;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (reader, writer) = sys::pipe(0)?;
    let mut children = Vec::new();
    for number in 0..TASKS {
        children.push(ctl.child(&format!("sleeper {number}"), |ctl| {
            let epoll = Epoll::new(EpollCreateFlags::empty())?;
            add(&epoll, &reader, EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE, 7)?;
            ctl.announce(&format!("ready.{number}"), b"")?;
            let mut events = [EpollEvent::empty(); 4];
            let n = epoll.wait(&mut events, EpollTimeout::NONE)?;
            same("events", (n, events[0].data()), (1, 7))?;
            ctl.announce(&format!("woken.{number}"), b"")?;
            Ok(())
        })?);
    }
    for number in 0..TASKS {
        ctl.await_ready(&number.to_string())?;
    }
    // One that is not asleep yet would see the pipe readable. epoll_wait(2) is system call 232.
    let asleep = |child: &Child| {
        let call = std::fs::read_to_string(format!("/proc/{}/syscall", child.pid));
        call.is_ok_and(|call| call.starts_with("232 "))
    };
    let all_asleep = || poll_until("all sleep", || children.iter().all(asleep));
    all_asleep()?;
    let woken = || (0..TASKS).filter(|n| ctl.dir().join(format!("woken.{n}")).exists()).count();

    if ctl.wait()? {
        sys::write(&writer, b"x")?;
        poll_until("one is woken", || woken() > 0)?;
    } else {
        all_asleep()?;
    }

    same("woken by nobody", woken(), 0)?;
    for number in 1..=TASKS {
        sys::write(&writer, b"x")?;
        poll_until("another is woken", || woken() >= number)?;
        pause(Duration::from_millis(100));
        same("woken by so many writes", woken(), number)?;
    }
    for number in 0..TASKS {
        std::fs::remove_file(ctl.dir().join(format!("woken.{number}")))?;
    }
    children.into_iter().try_for_each(|child| child.join())
}
