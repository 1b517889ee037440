//! A shell that leads a session with a pseudo-terminal as its controlling terminal, a background job in a group of its
//! own, and /dev/tty open in both.

use std::ffi::CString;
use std::time::Duration;

use crate::ctl::{Ctl, Outcome, ensure, pause};
use crate::sys;
use crate::terminal::{Terminal, set};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut terminal = Terminal::open()?;
    let shell = ctl.child("shell", |_| {
        nix::unistd::setsid()?;
        let slave = terminal.open_controlling()?;
        for number in 0..3 {
            std::mem::forget(sys::dup_to(&slave, number)?);
        }
        drop(slave);
        let word = |text: &str| CString::new(text).unwrap_or_default();
        nix::unistd::execve(&word("/bin/bash"), &[word("bash"), word("--norc"), word("-i")], &[word("PS1=> ")])?;
        Ok(())
    })?;
    let size = libc::winsize { ws_row: 33, ws_col: 99, ws_xpixel: 0, ws_ypixel: 0 };
    set(&terminal.master, libc::TIOCSWINSZ, size)?;
    terminal.send(b"stty -echo; exec 7<>/dev/tty; X=kept; sleep 1000 7<>/dev/tty & echo be\"\"gun $!\n")?;
    terminal.until("begun")?;
    pause(Duration::from_millis(100));
    terminal.drain()?;

    if ctl.wait()? {
        terminal.send(b"X=lost\n")?;
    }

    terminal.send(b"echo X is $X at $(stty size), $(jobs -r | wc -l) job\n")?;
    let said = terminal.until(" job")?;
    let kept = said.contains("X is kept") && said.contains("33 99") && said.contains("1 job");
    ensure(kept, &format!("shell: {said:?}"))?;
    terminal.send(b"echo through >&7; echo done\n")?;
    terminal.until("through")?;
    // ^C reaches the foreground group, not the background job.
    terminal.send(b"sleep 500\n")?;
    pause(Duration::from_millis(100));
    terminal.send(b"\x03")?;
    terminal.send(b"kill %1; wait; echo all ov\"\"er\n")?;
    terminal.until("all over")?;
    terminal.send(b"exit 0\n")?;
    shell.join()
}
