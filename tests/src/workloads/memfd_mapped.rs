//! Memory files as mappings: mapped by two tasks and open in one; mapped only, by both; privately, with some pages changed;
//! sealed against writing with a read-only mapping, and against future writing with a writable one.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::memfd::{create, seals};
use crate::ctl::{Ctl, Outcome, poll_until, same};
use crate::sys::{self, Map, PAGE, fcntl};

const LEN: usize = 64 * PAGE;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let file = |name, seed| -> Outcome<_> {
        let file = create(name)?;
        file.set_len(LEN as u64)?;
        let map = Map::new(LEN, sys::RW, libc::MAP_SHARED, file.as_raw_fd(), 0)?;
        map.fill(seed);
        Ok((file, map))
    };
    let (open, of_open) = file(c"open", 1)?;
    let (closed, of_closed) = file(c"closed", 2)?;
    let second = Map::new(2 * PAGE, libc::PROT_READ, libc::MAP_SHARED, closed.as_raw_fd(), PAGE as i64)?;
    drop(closed);
    let private = Map::new(LEN, sys::RW, libc::MAP_PRIVATE, open.as_raw_fd(), 0)?;
    private.page(3).fill(33);
    let (future, of_future) = file(c"future", 3)?;
    fcntl(&future, libc::F_ADD_SEALS, libc::F_SEAL_FUTURE_WRITE)?;
    let sealed = create(c"sealed")?;
    sealed.write_all_at(&sys::bytes(4, PAGE), 0)?;
    fcntl(&sealed, libc::F_ADD_SEALS, libc::F_SEAL_WRITE)?;
    let of_sealed = Map::new(PAGE, libc::PROT_READ, libc::MAP_SHARED, sealed.as_raw_fd(), 0)?;
    let child = ctl.child("sharer", |ctl| {
        private.page(5).fill(55);
        ctl.wait_as("sharer")?;
        of_open.put(0, 1001);
        of_closed.put(PAGE, 1002);
        private.page(3).check("private page of before the fork, in the child", 33)?;
        private.page(5).check("private page of the child", 55)
    })?;
    ctl.await_ready("sharer")?;

    if ctl.wait()? {
        private.put(7 * PAGE, 7);
        of_closed.put(0, 7);
    }

    child.join()?;
    poll_until("the child's write is seen", || of_open.get(0) == 1001 && second.get(0) == 1002)?;
    let mut word = [0; 8];
    open.read_exact_at(&mut word, 0)?;
    same("by the descriptor", u64::from_le_bytes(word), 1001)?;
    open.write_all_at(&2002u64.to_le_bytes(), 8)?;
    same("by the mapping", of_open.get(8), 2002)?;
    same("by the private mapping", private.get(8), 2002)?;
    of_open.put(0, sys::word(1, 0));
    of_open.put(8, sys::word(1, 1));
    of_open.check("open", 1)?;
    of_closed.put(PAGE, sys::word(2, PAGE / 8));
    of_closed.check("closed", 2)?;
    same("its second mapping", second.get(0), sys::word(2, PAGE / 8))?;
    private.page(3).check("changed page of a private mapping", 33)?;
    same("unchanged page of a private mapping", private.get(7 * PAGE), sys::word(1, 7 * PAGE / 8))?;
    of_future.check("future", 3)?;
    of_future.put(0, 5);
    same("seals", (seals(&future)?, seals(&sealed)?), (libc::F_SEAL_FUTURE_WRITE, libc::F_SEAL_WRITE))?;
    of_sealed.check("sealed", 4)
}
