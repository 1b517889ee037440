//! Both ends of terminals in one task, with data in both directions: output that the master has not read, lines that the
//! slave has not read or read half, an end of file, a line half typed, and raw bytes. A slave that was closed with output
//! still in the master.

use std::os::fd::AsFd;
use std::time::Duration;

use crate::ctl::{Ctl, Outcome, ensure, pause, same};
use crate::sys;
use crate::terminal::{Terminal, set_termios, termios};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut cooked = Terminal::open()?;
    let slave = cooked.open_slave()?;
    cooked.send(b"first line\nsecond\nlast\x04\x04half ty")?;
    same("the beginning of a line", sys::read(&slave, 6)?, b"first ".to_vec())?;
    sys::write(&slave, b"not read\n")?;

    let mut raw = Terminal::open()?;
    let raw_slave = raw.open_slave()?;
    let mut settings = termios(&raw_slave)?;
    settings.c_lflag = 0;
    settings.c_iflag = 0;
    settings.c_oflag = 0;
    set_termios(&raw_slave, settings)?;
    let input: Vec<u8> = (0..3000_u32).map(|n| (n % 256) as u8).collect();
    let output = sys::bytes(7, 6000);
    for piece in input.chunks(500) {
        raw.send(piece)?;
    }
    for piece in output.chunks(1000) {
        sys::write(&raw_slave, piece)?;
    }

    let mut closed = Terminal::open()?;
    let last = closed.open_slave()?;
    sys::write(&last, b"last words")?;
    drop(last);
    // The kernel's worker carries the bytes over.
    pause(Duration::from_millis(100));

    if ctl.wait()? {
        sys::read(&slave, 100)?;
    }

    same("the rest of a line", sys::read(&slave, 100)?, b"line\n".to_vec())?;
    same("a line", sys::read(&slave, 4)?, b"seco".to_vec())?;
    same("a line", sys::read(&slave, 100)?, b"nd\n".to_vec())?;
    same("a line ended by ^D", sys::read(&slave, 100)?, b"last".to_vec())?;
    same("an end of file", sys::read(&slave, 100)?, Vec::new())?;
    ensure(sys::read(&slave, 100).is_err(), "a line that is not complete can be read")?;
    cooked.send(b"x\x7fped\n")?;
    same("a line typed before and after", sys::read(&slave, 100)?, b"half typed\n".to_vec())?;
    let said = String::from_utf8_lossy(&cooked.drain()?).into_owned();
    ensure(said.starts_with("first line\r\nsecond\r\nlast"), &format!("the echo is {said:?}"))?;
    ensure(said.contains("not read\r\n"), &format!("the output is {said:?}"))?;
    same("how often a line is said", said.matches("first line").count(), 1)?;

    let mut got = Vec::new();
    while let Ok(piece) = sys::read(&raw_slave, 700) {
        got.extend(piece);
    }
    ensure(got == input, &format!("raw input: {} of {} bytes", got.len(), input.len()))?;
    let got = raw.drain()?;
    ensure(got == output, &format!("raw output: {} of {} bytes", got.len(), output.len()))?;

    same("words of a closed slave", closed.drain()?, b"last words".to_vec())?;
    let hung = sys::readiness(closed.master.as_fd(), libc::POLLHUP)?;
    same("whether the slave is closed", hung & libc::POLLHUP, libc::POLLHUP)
}
