//! An unlinked file mapped shared by two tasks and open in one, another mapped private with some pages changed, and one
//! that nobody has open any more.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::ctl::{Ctl, Outcome, poll_until, same};
use crate::sys::{self, Map, PAGE, RW};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let make = |name: &str, seed: u64| -> Outcome<File> {
        let path = ctl.work(name);
        fs::write(&path, sys::bytes(seed, 16 * PAGE))?;
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        fs::remove_file(&path)?;
        Ok(file)
    };
    let (open, private, closed) = (make("open", 1)?, make("private", 2)?, make("closed", 3)?);
    let map = |file: &File, flags| Map::new(16 * PAGE, RW, flags, file.as_raw_fd(), 0);
    let shared = map(&open, libc::MAP_SHARED)?;
    let read_only = Map::new(4 * PAGE, libc::PROT_READ, libc::MAP_SHARED, open.as_raw_fd(), 8 * PAGE as i64)?;
    let changed = map(&private, libc::MAP_PRIVATE)?;
    let alone = map(&closed, libc::MAP_SHARED)?;
    drop((private, closed));
    shared.put(8 * PAGE, 1);
    alone.put(0, 33);
    for n in (0..16).step_by(2) {
        changed.page(n).fill(200 + n as u64);
    }
    let child = ctl.child("sharer", |ctl| {
        changed.page(1).fill(999);
        ctl.wait_as("sharer")?;
        poll_until("the parent has written", || shared.get(8 * PAGE + 8) == 4711)?;
        shared.put(0, 42);
        same("own page of the child", changed.page(1).get(8), sys::word(999, 1))
    })?;
    ctl.await_ready("sharer")?;

    if ctl.wait()? {
        shared.put(8 * PAGE, 2);
    }

    same("by the other mapping", read_only.get(0), 1)?;
    let mut word = [0; 8];
    open.read_exact_at(&mut word, 8 * PAGE as u64)?;
    same("by the descriptor", u64::from_le_bytes(word), 1)?;
    open.write_all_at(&4711_u64.to_le_bytes(), 8 * PAGE as u64 + 8)?;
    same("written by the descriptor", shared.get(8 * PAGE + 8), 4711)?;
    for n in 0..16 {
        if n % 2 == 0 {
            changed.page(n).check("changed page", 200 + n as u64)?;
        } else {
            same("unchanged page", changed.page(n).get(8), sys::word(2, n * PAGE / 8 + 1))?;
        }
    }
    same("file that is only mapped", (alone.get(0), alone.get(8)), (33, sys::word(3, 1)))?;
    child.join()?;
    same("written by the child", shared.get(0), 42)
}
