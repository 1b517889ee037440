//! 15,000 descriptors of mixed kinds, 2,500 pipes among them.

use std::fs;
use std::os::fd::OwnedFd;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::ctl::{Ctl, Fail, Outcome, same};
use crate::sys;

const PIPES: usize = 2_500;
const OTHERS: usize = 5_000;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if hard < 16_000 {
        return Err(Fail::Absent(format!("RLIMIT_NOFILE is {hard}")));
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    fs::write(ctl.work("data"), "0123456789")?;
    let mut pipes = Vec::new();
    for n in 0..PIPES {
        let (reader, writer) = sys::pipe(0)?;
        sys::write(&writer, &(n as u32).to_le_bytes())?;
        pipes.push((reader, writer));
    }
    let (mut files, mut events): (Vec<OwnedFd>, Vec<EventFd>) = (Vec::new(), Vec::new());
    for n in 0..OTHERS {
        let file = fs::File::open(ctl.work("data"))?;
        sys::read(&file, n % 10)?;
        files.push(file.into());
        events.push(EventFd::from_value_and_flags(n as u32, EfdFlags::EFD_NONBLOCK)?);
    }

    if ctl.wait()? {
        sys::read(&files[4990], 1)?;
    }

    for (n, (reader, _writer)) in pipes.iter().enumerate() {
        same("pipe", sys::read(reader, 100)?, (n as u32).to_le_bytes().to_vec())?;
    }
    for n in 0..OTHERS {
        same("offset", sys::position(&files[n])?, (n % 10) as i64)?;
        same("eventfd", events[n].read().unwrap_or(0), n as u64)?;
    }
    Ok(())
}
