//! Offsets of regular files: own ones, one shared by dup, one shared with a child by fork.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};

use crate::ctl::{Ctl, Outcome, ensure, poll_until, same};
use crate::sys::position;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let path = ctl.work("data");
    fs::write(&path, "0123456789abcdefghijklmnopqrstuvwxyz")?;
    let open = || fs::OpenOptions::new().read(true).write(true).open(&path);
    let (mut own, mut same_file, mut shared) = (open()?, open()?, open()?);
    own.seek(SeekFrom::Start(5))?;
    same_file.seek(SeekFrom::Start(1 << 33))?;
    shared.seek(SeekFrom::Start(10))?;
    let dup = own.try_clone()?;
    let child = ctl.child("sharer", |ctl| {
        ctl.wait_as("sharer")?;
        let mut got = [0; 3];
        (&shared).read_exact(&mut got)?;
        same("what the child read", &got[..], &b"abc"[..])?;
        ctl.announce("has-read", b"").map_err(Into::into)
    })?;
    ctl.await_ready("sharer")?;

    if ctl.wait()? {
        own.seek(SeekFrom::Start(6))?;
    }

    let has_read = ctl.dir().join("has-read");
    poll_until("the child has read", || has_read.exists())?;
    child.join()?;
    fs::remove_file(has_read)?;
    same("offset shared with the child", position(&shared)?, 13)?;
    same("offset", position(&own)?, 5)?;
    (&dup).write_all(b"XY")?;
    same("offset shared by dup", position(&own)?, 7)?;
    same("far offset", position(&same_file)?, 1 << 33)?;
    let content = fs::read_to_string(&path)?;
    ensure(content.starts_with("01234XY789abc"), &format!("the file holds {content}"))
}
