//! A shell that leads a session with a pseudo-terminal as its controlling terminal, a background job in a group of its
//! own, and /dev/tty open in both.

use std::ffi::CString;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};

use crate::ctl::{Ctl, Outcome, changed, ensure, pause};
use crate::sys;

/// Reads from the terminal until `mark` has appeared.
fn until(master: &mut std::fs::File, mark: &str) -> Outcome<String> {
    let (mut all, began) = (String::new(), Instant::now());
    loop {
        let mut piece = [0; 4096];
        match master.read(&mut piece) {
            Ok(n) => all.push_str(&String::from_utf8_lossy(&piece[..n])),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => pause(Duration::from_millis(5)),
            Err(error) => return Err(error.into()),
        }
        if all.contains(mark) {
            return Ok(all);
        }
        if began.elapsed() > Duration::from_secs(10) {
            return Err(changed(format!("the shell does not say {mark:?}, but {all:?}")));
        }
    }
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = ptsname_r(&master)?;
    let mut master = std::fs::File::from(std::os::fd::AsFd::as_fd(&master).try_clone_to_owned()?);
    let shell = ctl.child("shell", |_| {
        nix::unistd::setsid()?;
        // The first terminal that a session leader opens becomes its controlling one (tty_ioctl(4)).
        let slave = std::fs::OpenOptions::new().read(true).write(true).open(&slave)?;
        for number in 0..3 {
            std::mem::forget(sys::dup_to(&slave, number)?);
        }
        let number = slave.as_raw_fd();
        if number <= 2 {
            std::mem::forget(slave);
        } else {
            drop(slave);
        }
        let word = |text: &str| CString::new(text).unwrap_or_default();
        nix::unistd::execve(&word("/bin/bash"), &[word("bash"), word("--norc"), word("-i")], &[word("PS1=> ")])?;
        Ok(())
    })?;
    // SAFETY: setting the window size takes a struct that lives through the call.
    unsafe {
        let size = libc::winsize { ws_row: 33, ws_col: 99, ws_xpixel: 0, ws_ypixel: 0 };
        libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size);
    }
    master.write_all(b"stty -echo; exec 7<>/dev/tty; X=kept; sleep 1000 7<>/dev/tty & echo be\"\"gun $!\n")?;
    until(&mut master, "begun")?;
    pause(Duration::from_millis(100));
    while sys::readiness(&master, libc::POLLIN)? & libc::POLLIN != 0 {
        sys::read(&master, 1000)?;
    }

    if ctl.wait()? {
        master.write_all(b"X=lost\n")?;
    }

    master.write_all(b"echo X is $X at $(stty size), $(jobs -r | wc -l) job\n")?;
    let said = until(&mut master, " job")?;
    ensure(said.contains("X is kept") && said.contains("33 99") && said.contains("1 job"), &format!("shell: {said:?}"))?;
    master.write_all(b"echo through >&7; echo done\n")?;
    until(&mut master, "through")?;
    // ^C reaches the foreground group, not the background job.
    master.write_all(b"sleep 500\n")?;
    pause(Duration::from_millis(100));
    master.write_all(b"\x03")?;
    master.write_all(b"kill %1; wait; echo all ov\"\"er\n")?;
    until(&mut master, "all over")?;
    master.write_all(b"exit 0\n")?;
    shell.join()
}
