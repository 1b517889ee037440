//! The memory devices: null, zero, full, random, urandom; flags kept, each still what it was.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys::{self, Map, RW, errno_of};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let open = |name: &str| OpenOptions::new().read(true).write(true).open(format!("/dev/{name}"));
    let (mut null, zero, full) = (open("null")?, open("zero")?, open("full")?);
    let random = OpenOptions::new().read(true).open("/dev/random")?;
    let urandom = OpenOptions::new().read(true).open("/dev/urandom")?;
    sys::fcntl(&zero, libc::F_SETFL, libc::O_NONBLOCK)?;
    let map = Map::new(8192, RW, libc::MAP_PRIVATE, zero.as_raw_fd(), 0)?;
    map.part(0, 4096).fill(3);

    if ctl.wait()? {
        null = zero.try_clone()?;
    }

    same("null", (sys::read(&null, 10)?, sys::write(&null, b"gone")?), (Vec::new(), 4))?;
    same("zero", sys::read(&zero, 10)?, vec![0; 10])?;
    same("full", errno_of(&sys::write(&full, b"x")), libc::ENOSPC)?;
    for device in [&random, &urandom] {
        ensure(sys::read(device, 16)? != sys::read(device, 16)?, "randomness repeats itself")?;
    }
    same("flags", sys::fcntl(&zero, libc::F_GETFL, 0)? & libc::O_NONBLOCK, libc::O_NONBLOCK)?;
    map.part(0, 4096).check("private mapping of zero", 3)?;
    map.part(4096, 4096).check_zero("untouched page of it")
}
