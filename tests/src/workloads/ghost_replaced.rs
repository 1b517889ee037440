//! Unlinked files whose names are in use again: a log that was rotated, a file that was replaced by rename(2), twice.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::ctl::{Ctl, Outcome, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let path = ctl.work("log");
    let mut versions = Vec::new();
    for n in 0..3 {
        fs::write(ctl.work("new"), format!("version {n}"))?;
        fs::rename(ctl.work("new"), &path)?;
        versions.push(File::options().read(true).write(true).open(&path)?);
    }
    // A directory in the place of a file.
    fs::write(ctl.work("place"), "was a file")?;
    let file = File::open(ctl.work("place"))?;
    fs::remove_file(ctl.work("place"))?;
    fs::create_dir(ctl.work("place"))?;

    if ctl.wait()? {
        versions[0].write_all_at(b"V", 0)?;
    }

    for (n, version) in versions.iter().enumerate() {
        same("an old version", sys::read(version, 100)?, format!("version {n}").into_bytes())?;
    }
    versions[0].write_all_at(b"changed", 0)?;
    same("the file that has the name", fs::read_to_string(&path)?.as_str(), "version 2")?;
    versions[2].write_all_at(b"by name", 0)?;
    same("the same by descriptor", fs::read_to_string(&path)?.as_str(), "by name 2")?;
    same("was a file", sys::read(&file, 100)?, b"was a file".to_vec())
}
