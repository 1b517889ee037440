//! Files unlinked under the name by which they were opened, but not under others: they must stay the very same files.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys::{self, Map, PAGE};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (path, other) = (ctl.work("opened"), ctl.work("other"));
    fs::write(&path, sys::bytes(1, 2 * PAGE))?;
    fs::hard_link(&path, &other)?;
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    let map = Map::new(2 * PAGE, sys::RW, libc::MAP_SHARED, file.as_raw_fd(), 0)?;
    fs::remove_file(&path)?;
    // Larger than any limit for what goes into the image.
    fs::write(ctl.work("large"), vec![7; 3 << 20])?;
    fs::hard_link(ctl.work("large"), ctl.work("kept"))?;
    let large = File::open(ctl.work("large"))?;
    fs::remove_file(ctl.work("large"))?;
    let inodes = (fs::metadata(&other)?.ino(), fs::metadata(ctl.work("kept"))?.ino());

    if ctl.wait()? {
        fs::remove_file(&other)?;
        fs::copy(ctl.work("kept"), &other)?;
    }

    ensure(!path.exists() && !ctl.work("large").exists(), "a name has come back")?;
    same("inodes", (file.metadata()?.ino(), large.metadata()?.ino()), inodes)?;
    same("inode of the other name", fs::metadata(&other)?.ino(), inodes.0)?;
    map.put(PAGE, 4711);
    let text = fs::read(&other)?;
    same("written by the mapping", u64::from_le_bytes(text[PAGE..PAGE + 8].try_into().unwrap_or_default()), 4711)?;
    same("size", large.metadata()?.len(), 3 << 20)
}
