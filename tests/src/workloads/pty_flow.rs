//! Output that is stopped: by ^S, with a task blocked in write(2), and by tcflow(3).

use std::os::fd::AsFd;
use std::time::Duration;

use crate::ctl::{Ctl, Outcome, ensure, pause, same};
use crate::sys;
use crate::terminal::{Terminal, call, set_termios, termios};

fn writable(slave: &impl AsFd) -> Outcome<bool> {
    Ok(sys::readiness(slave, libc::POLLOUT)? & libc::POLLOUT != 0)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut stopped = Terminal::open()?;
    let slave = stopped.open_slave()?;
    let suspended = Terminal::open()?;
    let other = suspended.open_slave()?;
    let mut settings = termios(&other)?;
    settings.c_iflag &= !libc::IXON;
    set_termios(&other, settings)?;
    stopped.send(b"\x13")?;
    call(&other, libc::TCXONC, libc::TCOOFF as libc::c_ulong)?;
    crate::ctl::poll_until("output stops", || writable(&slave).is_ok_and(|writable| !writable))?;
    let path = stopped.slave.clone();
    let writer = ctl.child("writer", |_| {
        sys::write(std::fs::OpenOptions::new().write(true).open(path)?, b"held up")?;
        Ok(())
    })?;
    pause(Duration::from_millis(50));

    if ctl.wait()? {
        stopped.send(b"\x11")?;
        pause(Duration::from_millis(50));
    }

    ensure(!writable(&slave)?, "^S was forgotten")?;
    ensure(!writable(&other)?, "TCOOFF was forgotten")?;
    same("stopped output", stopped.drain()?, Vec::new())?;
    call(&other, libc::TCXONC, libc::TCOON as libc::c_ulong)?;
    ensure(writable(&other)?, "TCOON does not undo TCOOFF")?;
    stopped.send(b"\x11")?;
    stopped.until("held up")?;
    writer.join()
}
