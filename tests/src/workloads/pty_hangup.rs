//! Terminals that have hung up: one whose master is closed, and, where that is allowed, one with a master and good
//! descriptors beside those from before a vhangup(2).

use std::fs::File;
use std::os::fd::AsFd;

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys::{self, errno_of};
use crate::terminal::{Terminal, call};

const TIOCVHANGUP: libc::c_ulong = 0x5437;

fn is_dead(slave: &File, what: &str) -> Outcome {
    same(what, sys::read(slave, 10)?, Vec::new())?;
    same(what, errno_of(&sys::write(slave, b"x")), libc::EIO)?;
    let state = sys::readiness(slave.as_fd(), libc::POLLIN | libc::POLLOUT)?;
    ensure(state & (libc::POLLHUP | libc::POLLERR) != 0, &format!("{what}: state {state:#x}"))
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let orphan = Terminal::open()?;
    let orphaned = orphan.open_slave()?;
    drop(orphan);
    let mut kept = Terminal::open()?;
    let before = kept.open_slave()?;
    // Needs CAP_SYS_ADMIN outside of any user namespace.
    let hung = call(&before, TIOCVHANGUP, 0).is_ok();
    let after = kept.open_slave()?;

    if ctl.wait()? {
        drop(kept.open_slave()?);
        kept = Terminal::open()?;
    }

    is_dead(&orphaned, "a slave without master")?;
    if hung {
        is_dead(&before, "a slave from before the hangup")?;
    }
    sys::write(&after, b"still there\n")?;
    kept.until("still there").map(drop)
}
