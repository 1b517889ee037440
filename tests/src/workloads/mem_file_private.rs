//! A file mapped privately: pages changed, pages not, a page beyond the end of the file, and the mapping's protection
//! in pieces.

use std::fs;

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys::{self, Map, PAGE, RW};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let path = ctl.work("data");
    fs::write(&path, sys::bytes(3, 32 * PAGE + 100))?;
    let file = fs::OpenOptions::new().read(true).open(&path)?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    let map = Map::new(33 * PAGE, RW, libc::MAP_PRIVATE, fd, 0)?;
    let middle = Map::new(8 * PAGE, libc::PROT_READ, libc::MAP_PRIVATE, fd, (4 * PAGE) as i64)?;
    drop(file);
    for n in (0..32).step_by(3) {
        map.page(n).fill(100 + n as u64);
    }
    map.put(32 * PAGE + 104, 9);
    map.part(10 * PAGE, 5 * PAGE).protect(libc::PROT_READ)?;

    if ctl.wait()? {
        map.page(3).put(0, 1);
    }

    for n in 0..32 {
        if n % 3 == 0 {
            map.page(n).check("changed page", 100 + n as u64)?;
        } else {
            same("unchanged page", map.page(n).get(8), sys::word(3, n * PAGE / 8 + 1))?;
        }
    }
    same("page after the end of the file", map.get(32 * PAGE + 104), 9)?;
    same("second mapping", middle.get(0), sys::word(3, 4 * PAGE / 8))?;
    ensure(fs::read(&path)? == sys::bytes(3, 32 * PAGE + 100), "the file has changed")
}
