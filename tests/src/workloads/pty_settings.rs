//! Terminals with settings of every kind: termios, window size, packet mode, exclusive ends, locks, owners, and slaves that
//! were never opened or are closed, at numbers with a gap.

use std::fs::{self, Permissions};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys;
use crate::terminal::{Terminal, call, get, set, set_termios, settings, termios};

const TIOCGEXCL: libc::c_ulong = 0x8004_5440;
const TIOCGPKT: libc::c_ulong = 0x8004_5438;
const TIOCGPTLCK: libc::c_ulong = 0x8004_5439;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let plain = Terminal::open()?;
    let gap = Terminal::open()?;
    let odd = Terminal::open()?;
    let closed = Terminal::open()?;
    let locked = Terminal::open()?;
    drop(gap);

    let odd_slave = odd.open_slave()?;
    let mut wanted = termios(&odd_slave)?;
    wanted.c_lflag &= !(libc::ECHO | libc::ICANON);
    wanted.c_iflag |= libc::IUTF8 | libc::IXANY;
    wanted.c_oflag |= libc::ONLRET;
    wanted.c_cc[libc::VMIN] = 3;
    wanted.c_cc[libc::VTIME] = 7;
    wanted.c_cc[libc::VINTR] = b'!';
    wanted.c_cflag = (wanted.c_cflag & !libc::CBAUD) | libc::B1200;
    set_termios(&odd_slave, wanted)?;
    let wanted = termios(&odd_slave)?;
    let size = |row| libc::winsize { ws_row: row, ws_col: 132, ws_xpixel: 1056, ws_ypixel: 688 };
    set(&odd.master, libc::TIOCSWINSZ, size(43))?;
    call(&odd_slave, libc::TIOCEXCL as libc::c_ulong, 0)?;
    set(&odd.master, libc::TIOCPKT as libc::c_ulong, 1)?;
    fs::set_permissions(&odd.slave, Permissions::from_mode(0o666))?;
    call(&plain.master, libc::TIOCEXCL as libc::c_ulong, 0)?;
    drop(closed.open_slave()?);
    set(&locked.master, libc::TIOCSPTLCK, 1)?;
    // Locks need CAP_SYS_ADMIN outside of any user namespace.
    let mut locks = termios(&locked.master)?;
    locks.c_lflag = libc::ISIG;
    locks.c_cc = [0; 19];
    let has_locks = set(&locked.master, libc::TIOCSLCKTRMIOS as libc::c_ulong, locks).is_ok();

    if ctl.wait()? {
        set(&odd.master, libc::TIOCSWINSZ, size(44))?;
    }

    same("termios", settings(&termios(&odd_slave)?), settings(&wanted))?;
    let now: libc::winsize = get(&odd_slave, libc::TIOCGWINSZ)?;
    same("size", [now.ws_row, now.ws_col, now.ws_xpixel, now.ws_ypixel], [43, 132, 1056, 688])?;
    let exclusive = |end: &fs::File| get::<i32>(end, TIOCGEXCL);
    same("exclusive slave", exclusive(&odd_slave)?, 1)?;
    same("its master", exclusive(&odd.master)?, 0)?;
    same("exclusive master", exclusive(&plain.master)?, 1)?;
    same("packet mode", get::<i32>(&odd.master, TIOCGPKT)?, 1)?;
    same("packet mode elsewhere", get::<i32>(&plain.master, TIOCGPKT)?, 0)?;
    same("mode of the node", fs::metadata(&odd.slave)?.permissions().mode() & 0o777, 0o666)?;
    same("lock", get::<i32>(&locked.master, TIOCGPTLCK)?, 1)?;
    ensure(locked.open_slave().is_err(), "a locked terminal can be opened")?;
    if has_locks {
        let locks: libc::termios2 = get(&locked.master, libc::TIOCGLCKTRMIOS as libc::c_ulong)?;
        same("locked settings", locks.c_lflag, libc::ISIG)?;
    }
    let state = |terminal: &Terminal| sys::readiness(terminal.master.as_fd(), libc::POLLHUP);
    same("a slave never opened", state(&plain)? & libc::POLLHUP, 0)?;
    same("a closed slave", state(&closed)? & libc::POLLHUP, libc::POLLHUP)?;
    // The gap is the next free number, and the terminals work.
    let next = Terminal::open()?;
    ensure(next.slave < odd.slave, &format!("{} is free, not the gap", next.slave.display()))?;
    set(&locked.master, libc::TIOCSPTLCK, 0)?;
    sys::write(locked.open_slave()?, b"opened")?;
    sys::write(&odd_slave, b"data")?;
    crate::ctl::poll_until("data come", || {
        sys::readiness(odd.master.as_fd(), libc::POLLIN).is_ok_and(|state| state & libc::POLLIN != 0)
    })?;
    same("a packet", sys::read(&odd.master, 10)?, b"\0data".to_vec())
}
