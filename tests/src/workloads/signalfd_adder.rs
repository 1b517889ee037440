//! A signalfd that a child has put into an epoll set of its parent's: a signal to the child, and to nobody else, wakes it.

use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::signal::{SigSet, Signal, kill};

use super::epoll_basic::add;
use crate::ctl::{Ctl, Outcome, pause, same};
use crate::sys;

/// Longer than a wake-up takes, and shorter than a scenario waits.
const LOST: u16 = 8_000;

fn receiver() -> Outcome<OwnedFd> {
    let set = SigSet::from(Signal::SIGUSR1);
    // SAFETY: makes a new descriptor; the set lives through the call.
    Ok(unsafe { OwnedFd::from_raw_fd(sys::cvt(libc::signalfd(-1, set.as_ref(), 0))?) })
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    SigSet::from(Signal::SIGUSR1).thread_block()?;
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    let own = receiver()?;
    add(&epoll, &own, EpollFlags::EPOLLIN, 1)?;
    let child = ctl.child("adder", |ctl| {
        let receiver = receiver()?;
        add(&epoll, &receiver, EpollFlags::EPOLLIN, 2)?;
        ctl.announce("ready.adder", b"")?;
        let sabotage = ctl.wait_for_request()?;
        if sabotage {
            epoll.delete(&receiver)?;
            // The parent's own entry would do as well.
            epoll.delete(&own)?;
        }
        ctl.announce("ready.asleep", b"")?;
        let mut events = [EpollEvent::empty(); 4];
        let n = epoll.wait(&mut events, if sabotage { 500 } else { LOST })?;
        let mut woken: Vec<u64> = events[..n].iter().map(EpollEvent::data).collect();
        woken.sort_unstable();
        same("the child's entry", woken.contains(&2), true)?;
        same("the signal", sys::read(&receiver, 128)?[0], Signal::SIGUSR1 as u8)
    })?;
    ctl.await_ready("adder")?;

    ctl.wait()?;

    ctl.await_ready("asleep")?;
    // Asleep by now; if it is not yet, this sees less, but fails nothing.
    pause(Duration::from_millis(100));
    kill(child.pid, Signal::SIGUSR1)?;
    child.join()
}
