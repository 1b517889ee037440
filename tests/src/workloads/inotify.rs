//! Watches on a directory, files, a symbolic link and a file renamed since, with gaps in their numbers; an instance that
//! two tasks share. Files of the watched directory are open and mapped: restore opens them again and nobody must hear of it.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{self, Map, cvt, errno_of};

/// An event as (watch, mask, name).
pub type Event = (i32, u32, String);

/// inotify_init1(2), not blocking.
pub fn instance() -> Outcome<OwnedFd> {
    // SAFETY: integers; the descriptor is new.
    unsafe { Ok(OwnedFd::from_raw_fd(cvt(libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK))?)) }
}

/// inotify_add_watch(2).
pub fn watch(inotify: &OwnedFd, path: &Path, mask: u32) -> Outcome<i32> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap_or_default();
    // SAFETY: the path ends with NUL.
    Ok(unsafe { cvt(libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), mask))? })
}

/// inotify_rm_watch(2).
pub fn unwatch(inotify: &OwnedFd, number: i32) -> Outcome {
    // SAFETY: integers.
    cvt(unsafe { libc::inotify_rm_watch(inotify.as_raw_fd(), number) })?;
    Ok(())
}

/// Takes all events that are queued.
pub fn events(inotify: &OwnedFd) -> Outcome<Vec<Event>> {
    let raw = match sys::read(inotify, 1 << 16) {
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Ok(Vec::new()),
        other => other?,
    };
    let word = |at: usize| u32::from_ne_bytes(raw[at..at + 4].try_into().unwrap_or_default());
    let (mut found, mut at) = (Vec::new(), 0);
    while at < raw.len() {
        let name = &raw[at + 16..at + 16 + word(at + 12) as usize];
        let text: Vec<u8> = name.iter().copied().take_while(|byte| *byte != 0).collect();
        found.push((word(at).cast_signed(), word(at + 4), String::from_utf8_lossy(&text).into_owned()));
        at += 16 + name.len();
    }
    Ok(found)
}

/// Numbers and masks, as fdinfo has them.
pub fn listed(inotify: &OwnedFd) -> Outcome<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", inotify.as_raw_fd()))?;
    let field = |line: &str, name: &str| {
        line.split(' ').find(|word| word.starts_with(name)).unwrap_or_default().to_owned()
    };
    let lines = text.lines().filter(|line| line.starts_with("inotify"));
    let mut found: Vec<String> =
        lines.map(|line| format!("{} {}", field(line, "wd:"), field(line, "mask:"))).collect();
    found.sort();
    Ok(found)
}

/// A name that no file has: a restored copy is asked where its original has left files.
pub fn fresh(directory: &Path) -> PathBuf {
    let names = (0..).map(|n| directory.join(format!("new{n}")));
    names.into_iter().find(|path| !path.exists()).unwrap_or_default()
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let directory = ctl.work("watched");
    fs::create_dir(&directory)?;
    let other = ctl.work("other");
    fs::create_dir(&other)?;
    let [open, mapped, once, before, after] =
        ["open", "mapped", "once", "before", "after"].map(|name| directory.join(name));
    fs::write(&open, "text")?;
    fs::write(&mapped, vec![7; sys::PAGE])?;
    fs::write(&once, "1")?;
    fs::write(&before, "1")?;
    std::os::unix::fs::symlink("once", directory.join("link"))?;
    let held = OpenOptions::new().read(true).write(true).open(&open)?;
    let inotify = instance()?;
    same("first", watch(&inotify, &other, libc::IN_ALL_EVENTS)?, 1)?;
    same("second", watch(&inotify, &directory, libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK)?, 2)?;
    same("one-shot", watch(&inotify, &once, libc::IN_MODIFY | libc::IN_ONESHOT)?, 3)?;
    same("gap", watch(&inotify, &before, libc::IN_MODIFY)?, 4)?;
    unwatch(&inotify, 4)?;
    same("renamed", watch(&inotify, &before, libc::IN_CLOSE_WRITE)?, 5)?;
    same("link", watch(&inotify, &directory.join("link"), libc::IN_DONT_FOLLOW | libc::IN_ATTRIB)?, 6)?;
    fs::rename(&before, &after)?;
    events(&inotify)?;
    let was = listed(&inotify)?;
    let shared = instance()?;
    watch(&shared, &other, libc::IN_CREATE)?;
    let empty = instance()?;
    let child = ctl.child("sharer", |ctl| {
        ctl.wait_as("sharer")?;
        fs::write(fresh(&other), "")?;
        Ok(())
    })?;
    ctl.await_ready("sharer")?;
    // Not in the child: it would close the file with its end.
    let file = OpenOptions::new().read(true).write(true).open(&mapped)?;
    let map = Map::new(sys::PAGE, sys::RW, libc::MAP_SHARED, file.as_raw_fd(), 0)?;
    drop(file);
    events(&inotify)?;

    if ctl.wait()? {
        unwatch(&inotify, 2)?;
    }

    child.join()?;
    let by_child = events(&shared)?;
    let name = by_child.first().map(|event| event.2.clone()).unwrap_or_default();
    same("from the child", by_child, vec![(1, libc::IN_CREATE, name.clone())])?;
    same("an instance without watches", errno_of(&sys::read(empty.as_fd(), 64)), libc::EAGAIN)?;
    let [create, opened, closed] = [libc::IN_CREATE, libc::IN_OPEN, libc::IN_CLOSE_WRITE];
    let by_child = [create, opened, closed].map(|mask| (1, mask, name.clone()));
    same("nothing but what the child did", events(&inotify)?, by_child.to_vec())?;
    same("numbers and masks", listed(&inotify)?, was)?;
    same("the mapping", map.get(0), 0x0707_0707_0707_0707)?;
    sys::write(&held, b"T")?;
    same("a write to the open file", events(&inotify)?, vec![(2, libc::IN_MODIFY, "open".into())])?;
    fs::write(&after, "2")?;
    same("the file renamed since", events(&inotify)?.last(), Some(&(5, closed, String::new())))?;
    fs::write(&once, "2")?;
    let of_once: Vec<u32> =
        events(&inotify)?.into_iter().filter(|event| event.0 == 3).map(|event| event.1).collect();
    same("one-shot", of_once, vec![libc::IN_MODIFY, libc::IN_IGNORED])?;
    same("next", watch(&inotify, &directory.join("link"), libc::IN_MODIFY)?, 7)
}
