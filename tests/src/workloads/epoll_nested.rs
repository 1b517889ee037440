//! Epoll in epoll, and one epoll that two tasks share.

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollFlags};

use super::epoll_basic::{add, ready};
use crate::ctl::{Ctl, Outcome, poll_until, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let none = EpollCreateFlags::empty();
    let (outer, middle, inner) = (Epoll::new(none)?, Epoll::new(none)?, Epoll::new(none)?);
    let (reader, writer) = sys::pipe(0)?;
    add(&inner, &reader, EpollFlags::EPOLLIN, 1)?;
    add(&middle, &inner.0, EpollFlags::EPOLLIN, 2)?;
    add(&outer, &middle.0, EpollFlags::EPOLLIN, 3)?;
    add(&outer, &reader, EpollFlags::EPOLLIN, 4)?;
    let child = ctl.child("sharer", |ctl| {
        ctl.wait_as("sharer")?;
        sys::write(&writer, b"x")?;
        poll_until("the event comes through", || ready(&inner).is_ok_and(|found| found == [(1, 1)]))
    })?;
    ctl.await_ready("sharer")?;

    if ctl.wait()? {
        outer.delete(&reader)?;
    }

    child.join()?;
    same("inner", ready(&inner)?, vec![(1, 1)])?;
    same("middle", ready(&middle)?, vec![(2, 1)])?;
    same("outer", ready(&outer)?, vec![(3, 1), (4, 1)])
}
