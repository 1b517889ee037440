//! Open directories: one as an anchor for openat, one whose entries are read half.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::ctl::{Ctl, Outcome, same};
use crate::sys;

/// The names that one getdents64(2) with room for `room` bytes gives.
fn names(dir: &OwnedFd, room: usize) -> Outcome<Vec<String>> {
    let mut buffer = vec![0u8; room];
    // SAFETY: the buffer has `room` bytes.
    let got = sys::cvt_long(unsafe {
        libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), buffer.as_mut_ptr(), room)
    })? as usize;
    let (mut found, mut at) = (Vec::new(), 0);
    while at < got {
        let length = usize::from(u16::from_le_bytes([buffer[at + 16], buffer[at + 17]]));
        let name: Vec<u8> = buffer[at + 19..at + length].iter().copied().take_while(|&b| b != 0).collect();
        found.push(String::from_utf8_lossy(&name).into_owned());
        at += length;
    }
    Ok(found)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let dir = ctl.work("many");
    fs::create_dir_all(&dir)?;
    let all: BTreeSet<String> = (0..200).map(|n| format!("entry-{n}")).collect();
    for name in &all {
        fs::write(dir.join(name), name)?;
    }
    let open = || nix::fcntl::open(&dir, OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty());
    let (anchor, half) = (open()?, open()?);
    fs::write(ctl.work(".read"), "only read")?;
    let read = fs::File::open(ctl.work(".read"))?;
    let mut seen: Vec<String> = names(&half, 2000)?;

    if ctl.wait()? {
        names(&half, 500)?;
    }

    loop {
        let more = names(&half, 2000)?;
        if more.is_empty() {
            break;
        }
        seen.extend(more);
    }
    seen.retain(|name| name.starts_with("entry"));
    same("number of entries", seen.len(), all.len())?;
    same("entries", seen.into_iter().collect::<BTreeSet<_>>(), all)?;
    let file = openat(&anchor, "entry-17", OFlag::O_RDONLY, Mode::empty())?;
    same("file that is only read", sys::read(&read, 9)?, b"only read".to_vec())?;
    same("file opened by the anchor", sys::read(&file, 100)?, b"entry-17".to_vec())
}
