//! An open file that has no name any more.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};

use crate::ctl::{Ctl, Outcome, same};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let path = ctl.work("gone");
    let mut file = fs::OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&path)?;
    file.write_all(b"still here")?;
    fs::remove_file(&path)?;

    if ctl.wait()? {
        file.set_len(3)?;
    }

    file.seek(SeekFrom::Start(0))?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    same("content", text.as_str(), "still here")?;
    same("links", std::os::unix::fs::MetadataExt::nlink(&file.metadata()?), 0)
}
