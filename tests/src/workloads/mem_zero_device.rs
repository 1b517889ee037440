//! /dev/zero mapped shared and privately, in pieces of different access, and files mapped with MAP_NORESERVE.

use std::fs::{self, File};
use std::os::fd::AsRawFd;

use crate::ctl::{Ctl, Outcome, poll_until, same};
use crate::sys::{self, Map, PAGE, RW};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let zero = File::options().read(true).write(true).open("/dev/zero")?;
    let shared = Map::new(16 * PAGE, RW, libc::MAP_SHARED, zero.as_raw_fd(), 0)?;
    let private = Map::new(16 * PAGE, RW, libc::MAP_PRIVATE, zero.as_raw_fd(), 0)?;
    shared.part(0, 8 * PAGE).fill(1);
    private.part(0, 8 * PAGE).fill(2);
    for page in [1, 3, 4, 7, 9] {
        shared.page(page).protect(libc::PROT_READ)?;
        private.page(page).protect(libc::PROT_NONE)?;
    }
    fs::write(ctl.work("file"), sys::bytes(3, 8 * PAGE))?;
    let file = File::open(ctl.work("file"))?;
    let unreserved = Map::new(8 * PAGE, RW, libc::MAP_PRIVATE | libc::MAP_NORESERVE, file.as_raw_fd(), 0)?;
    unreserved.page(2).fill(4);
    let child = ctl.child("child", move |ctl| {
        ctl.wait_as("child")?;
        shared.put(15 * PAGE, 5);
        poll_until("the parent answers", || shared.get(14 * PAGE) == 6)
    })?;
    ctl.await_ready("child")?;
    let flags = unreserved.smaps("VmFlags:")?;

    if ctl.wait()? {
        shared.put(2 * PAGE, 7);
    }

    poll_until("the child writes", || shared.get(15 * PAGE) == 5)?;
    shared.put(14 * PAGE, 6);
    child.join()?;
    shared.part(0, 8 * PAGE).check("shared zeros", 1)?;
    private.protect(RW)?;
    private.part(0, 8 * PAGE).check("private zeros", 2)?;
    private.part(8 * PAGE, 8 * PAGE).check_zero("untouched zeros")?;
    unreserved.page(2).check("changed page of a file", 4)?;
    same("page of a file", unreserved.get(5 * PAGE), sys::word(3, 5 * PAGE / 8))?;
    same("VmFlags", unreserved.smaps("VmFlags:")?, flags)
}
