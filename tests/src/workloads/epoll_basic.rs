//! Epoll sets: every entry with its events and data, edge-triggered, one-shot (fired and not) and exclusive.

use std::os::fd::AsFd;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys;

/// What is ready now, as (data, events), sorted.
pub fn ready(epoll: &Epoll) -> Outcome<Vec<(u64, i32)>> {
    let mut events = [EpollEvent::empty(); 16];
    let n = epoll.wait(&mut events, nix::sys::epoll::EpollTimeout::ZERO)?;
    let mut found: Vec<_> = events[..n].iter().map(|e| (e.data(), e.events().bits())).collect();
    found.sort_unstable();
    Ok(found)
}

/// Adds an entry.
pub fn add(epoll: &Epoll, fd: impl AsFd, events: EpollFlags, data: u64) -> Outcome {
    Ok(epoll.add(fd, EpollEvent::new(events, data))?)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let (level, level_w) = sys::pipe(0)?;
    let (edge, edge_w) = sys::pipe(0)?;
    let (once, once_w) = sys::pipe(0)?;
    let (fired, fired_w) = sys::pipe(0)?;
    let (exclusive, exclusive_w) = sys::pipe(0)?;
    let input = EpollFlags::EPOLLIN;
    add(&epoll, &level, input | EpollFlags::EPOLLRDHUP, u64::MAX)?;
    add(&epoll, &level_w, EpollFlags::EPOLLOUT, 0)?;
    add(&epoll, &edge, input | EpollFlags::EPOLLET, 3)?;
    add(&epoll, &once, input | EpollFlags::EPOLLONESHOT, 4)?;
    add(&epoll, &fired, input | EpollFlags::EPOLLONESHOT, 5)?;
    add(&epoll, &exclusive, input | EpollFlags::EPOLLEXCLUSIVE, 6)?;
    sys::write(&fired_w, b"x")?;
    same("before", ready(&epoll)?, vec![(0, 4), (5, 1)])?;
    // Once the ready list has been seen, an edge does not fire again by itself.
    sys::write(&level_w, b"x")?;

    if ctl.wait()? {
        epoll.modify(&level, &mut EpollEvent::new(input, 9))?;
    }

    same("ready at once", ready(&epoll)?, vec![(0, 4), (u64::MAX, 1)])?;
    for writer in [&edge_w, &once_w, &exclusive_w] {
        sys::write(writer, b"y")?;
    }
    same("all ready", ready(&epoll)?, vec![(0, 4), (3, 1), (4, 1), (6, 1), (u64::MAX, 1)])?;
    same("again", ready(&epoll)?, vec![(0, 4), (6, 1), (u64::MAX, 1)])?;
    epoll.modify(&fired, &mut EpollEvent::new(input | EpollFlags::EPOLLONESHOT, 5))?;
    same("armed again", ready(&epoll)?, vec![(0, 4), (5, 1), (6, 1), (u64::MAX, 1)])
}
