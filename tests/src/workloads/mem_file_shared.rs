//! A file mapped shared by two tasks: what one writes, the file and the other see.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::ctl::{Ctl, Outcome, poll_until, same};
use crate::sys::{self, Map, PAGE, RW};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let path = ctl.work("data");
    fs::write(&path, sys::bytes(5, 16 * PAGE))?;
    let file = fs::OpenOptions::new().read(true).write(true).open(&path)?;
    let map = Map::new(8 * PAGE, RW, libc::MAP_SHARED, file.as_raw_fd(), (4 * PAGE) as i64)?;
    let readable = Map::new(16 * PAGE, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)?;
    map.put(8, 0xabc);
    let child = ctl.child("writer", |ctl| {
        ctl.wait_as("writer")?;
        map.put(PAGE, 0xdef);
        Ok(())
    })?;
    ctl.await_ready("writer")?;

    if ctl.wait()? {
        map.put(8, 0);
    }

    child.join()?;
    poll_until("the child's word arrives", || map.get(PAGE) == 0xdef)?;
    same("own word", map.get(8), 0xabc)?;
    same("own word in the other mapping", readable.get(4 * PAGE + 8), 0xabc)?;
    let mut word = [0; 8];
    file.read_exact_at(&mut word, (5 * PAGE) as u64)?;
    same("child's word in the file", u64::from_le_bytes(word), 0xdef)?;
    same("an untouched word", map.get(2 * PAGE), sys::word(5, 6 * PAGE / 8))
}
