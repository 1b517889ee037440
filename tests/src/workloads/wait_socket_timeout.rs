//! Threads blocked on sockets that have a timeout: a stop would end such waits with EINTR, unlike most others.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt::ReceiveTimeout};
use nix::sys::time::TimeVal;

use crate::ctl::{Ctl, Outcome, changed, pause, same};
use crate::sys::{cvt_long, write};

/// A pair of which the first end has a receive timeout.
fn pair() -> Outcome<(OwnedFd, OwnedFd)> {
    let (one, other) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::empty())?;
    setsockopt(&one, ReceiveTimeout, &TimeVal::new(600, 0))?;
    Ok((one, other))
}

/// A call that blocks.
type Call = fn(i32, *mut u8) -> i64;

const CALLS: [(&str, Call); 2] = [
    // SAFETY: one byte of room.
    ("recv", |fd, byte| unsafe { libc::recv(fd, byte.cast(), 1, 0) as i64 }),
    // SAFETY: as above.
    ("read", |fd, byte| unsafe { libc::read(fd, byte.cast(), 1) as i64 }),
];

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut threads = Vec::new();
    for (name, call) in CALLS {
        let (one, other) = pair()?;
        let thread = std::thread::spawn(move || {
            let mut byte = 0u8;
            let result = cvt_long(call(one.as_raw_fd(), &mut byte));
            (result.map_err(|error| error.to_string()), byte)
        });
        threads.push((name, thread, other));
    }
    pause(std::time::Duration::from_millis(50));

    let sabotage = ctl.wait()?;

    for (n, (name, thread, other)) in threads.into_iter().enumerate() {
        write(&other, &[if sabotage { 0 } else { 7 + n as u8 }])?;
        let got = thread.join().map_err(|_| changed("a thread panicked".into()))?;
        same(name, got, (Ok(1), 7 + n as u8))?;
    }
    Ok(())
}
