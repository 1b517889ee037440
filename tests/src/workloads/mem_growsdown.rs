//! A mapping made with MAP_GROWSDOWN, already grown once, and growing again afterwards.

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{ANON, Map, PAGE, RW};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    // Room below, so that there is space to grow: the kernel keeps a gap of 256 pages.
    let room = Map::new(1024 * PAGE, RW, ANON | libc::MAP_NORESERVE, -1, 0)?;
    room.unmap()?;
    let top = room.addr + 1000 * PAGE;
    // SAFETY: the address range was ours and is free.
    let got = unsafe {
        libc::mmap(top as *mut _, 4 * PAGE, RW, ANON | libc::MAP_GROWSDOWN | libc::MAP_FIXED_NOREPLACE, -1, 0)
    };
    same("address", got as usize, top)?;
    let grown = Map { addr: top - 2 * PAGE, len: 6 * PAGE };
    grown.page(1).put(0, 1);
    grown.page(0).put(0, 1);
    grown.fill(21);

    if ctl.wait()? {
        grown.put(PAGE, 0);
    }

    grown.check("grown mapping", 21)?;
    let more = Map { addr: top - 3 * PAGE, len: PAGE };
    more.fill(22);
    more.check("grown again", 22)
}
