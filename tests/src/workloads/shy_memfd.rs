//! A memory file (memfd_create(2)) with contents, mapped and by descriptor.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{self, Map, PAGE, RW};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    // SAFETY: makes a new descriptor.
    let file = unsafe { OwnedFd::from_raw_fd(sys::cvt(libc::memfd_create(c"name".as_ptr(), 0))?) };
    sys::write(&file, &sys::bytes(6, 3 * PAGE))?;
    let map = Map::new(3 * PAGE, RW, libc::MAP_SHARED, file.as_raw_fd(), 0)?;

    if ctl.wait()? {
        map.put(8, 0);
    }

    map.check("mapping", 6)?;
    map.put(0, 1);
    same("offset", sys::position(&file)?, 3 * PAGE as i64)?;
    let mut word = [0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&std::fs::File::from(file), &mut word, 0)?;
    same("file and mapping are one", u64::from_le_bytes(word), 1)
}
