//! A file below /run/mine, which nobody but the plugin of `stasis plugins new mine` brings along: two descriptions of it, one
//! of them held twice.

use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, Write};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys;

/// The directory that the plugin's files are in.
pub const DIR: &str = "/run/mine";

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    // Of an earlier run.
    let _ = fs::remove_dir_all(DIR);
    fs::create_dir_all(DIR)?;
    let path = format!("{DIR}/file");
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    file.write_all(b"one two three")?;
    file.seek(std::io::SeekFrom::Start(4))?;
    let mut same_file = file.try_clone()?;
    let log = OpenOptions::new().append(true).open(&path)?;

    if ctl.wait()? {
        file.set_len(5)?;
    }

    let mut text = String::new();
    same_file.read_to_string(&mut text)?;
    same("from where it stood", text.as_str(), "two three")?;
    same("the other number", file.stream_position()?, 13)?;
    sys::write(&log, b" four")?;
    same("content", fs::read_to_string(&path)?.as_str(), "one two three four")?;
    Ok(fs::remove_dir_all(DIR)?)
}
