//! Working directory, umask, personality, name and parent-death signal.

use std::path::Path;

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::cvt;

/// personality(2): sets unless -1 is given, returns the old.
fn personality(new: u64) -> Outcome<i32> {
    // SAFETY: takes a number.
    Ok(cvt(unsafe { libc::personality(new) })?)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let dir = ctl.work("a directory\twith\nodd 'signs'");
    std::fs::create_dir_all(&dir)?;
    let child = ctl.child("elsewhere", |ctl| {
        std::env::set_current_dir(&dir)?;
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o137));
        personality(libc::ADDR_NO_RANDOMIZE as u64 | libc::SHORT_INODE as u64)?;
        nix::sys::prctl::set_name(c"other (name) 1")?;
        if ctl.wait_as("elsewhere")? {
            std::env::set_current_dir("/")?;
        }
        same("cwd", std::env::current_dir()?, dir.clone())?;
        let mask = nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        same("umask", mask.bits(), 0o137)?;
        same("personality", personality(0xffff_ffff)?, libc::ADDR_NO_RANDOMIZE | libc::SHORT_INODE)?;
        same("name", nix::sys::prctl::get_name()?.as_c_str(), c"other (name) 1")?;
        same("relative path", Path::new(".").canonicalize()?, dir.clone())
    })?;
    ctl.await_ready("elsewhere")?;

    ctl.wait()?;

    same("own cwd", std::env::current_dir()?.as_path(), Path::new("/"))?;
    child.join()
}
