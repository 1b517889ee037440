//! Epoll entries are (number, file) pairs: entries whose number was closed while a duplicate lives on, or was taken by
//! another file, and two entries for one file by two numbers.

use std::os::fd::AsRawFd;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollFlags};

use super::epoll_basic::{add, ready};
use crate::ctl::{Ctl, Outcome, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    let (first, first_w) = sys::pipe(0)?;
    let (second, second_w) = sys::pipe(0)?;
    let input = EpollFlags::EPOLLIN;
    add(&epoll, &first, input, 1)?;
    let twin = first.try_clone()?;
    add(&epoll, &twin, input, 2)?;
    let number = first.as_raw_fd();
    drop(first);
    // The freed number now is another file, and has an entry too.
    let taken = sys::dup_to(&second, number)?;
    add(&epoll, &taken, input, 3)?;

    if ctl.wait()? {
        epoll.delete(&twin)?;
    }

    same("nothing ready", ready(&epoll)?, vec![])?;
    sys::write(&first_w, b"x")?;
    same("both entries of the first", ready(&epoll)?, vec![(1, 1), (2, 1)])?;
    sys::write(&second_w, b"x")?;
    same("all", ready(&epoll)?, vec![(1, 1), (2, 1), (3, 1)])?;
    epoll.delete(&taken)?;
    same("without the one by number", ready(&epoll)?, vec![(1, 1), (2, 1)])
}
