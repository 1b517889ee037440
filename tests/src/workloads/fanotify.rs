//! Marks on a file and on a directory with its children, with a mask of ignored events; what happens next is reported.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::ctl::{Ctl, Fail, Outcome, same};
use crate::sys::{self, cvt};

fn mark(group: &OwnedFd, flags: u32, mask: u64, path: &Path) -> Outcome {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap_or_default();
    let flags = libc::FAN_MARK_ADD | flags;
    // SAFETY: the path ends with NUL.
    cvt(unsafe { libc::fanotify_mark(group.as_raw_fd(), flags, mask, libc::AT_FDCWD, path.as_ptr()) })?;
    Ok(())
}

/// The masks of all events that are queued; the descriptors that come with them are closed.
fn events(group: &OwnedFd) -> Outcome<Vec<u64>> {
    let raw = match sys::read(group, 1 << 12) {
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    // struct fanotify_event_metadata: length, version and sizes, mask, descriptor, pid.
    for event in raw.chunks_exact(24) {
        found.push(u64::from_ne_bytes(event[8..16].try_into().unwrap_or_default()));
        let fd = i32::from_ne_bytes(event[16..20].try_into().unwrap_or_default());
        if fd >= 0 {
            // SAFETY: the descriptor came with the event and is ours.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Ok(found)
}

fn marks(group: &OwnedFd) -> Outcome<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", group.as_raw_fd()))?;
    let mut lines: Vec<String> =
        text.lines().filter(|line| line.starts_with("fanotify")).map(Into::into).collect();
    lines.sort();
    Ok(lines)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let directory = ctl.work("watched");
    fs::create_dir(&directory)?;
    let [file, child, quiet] = ["file", "child", "quiet"].map(|name| directory.join(name));
    for path in [&file, &child, &quiet] {
        fs::write(path, "text")?;
    }
    let held = fs::File::open(&child)?;
    let flags = libc::FAN_CLASS_NOTIF | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK;
    // SAFETY: integers; the descriptor is new.
    let group = match unsafe { cvt(libc::fanotify_init(flags, libc::O_RDONLY as u32)) } {
        // SAFETY: as above.
        Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
        Err(error) => return Err(Fail::Absent(format!("fanotify_init: {error}"))),
    };
    mark(&group, 0, libc::FAN_OPEN | libc::FAN_CLOSE_WRITE | libc::FAN_EVENT_ON_CHILD, &directory)?;
    mark(&group, 0, libc::FAN_MODIFY, &file)?;
    let ignored = libc::FAN_MARK_IGNORED_MASK | libc::FAN_MARK_IGNORED_SURV_MODIFY;
    mark(&group, ignored, libc::FAN_OPEN | libc::FAN_CLOSE_WRITE, &quiet)?;
    let was = marks(&group)?;

    if ctl.wait()? {
        // SAFETY: no path.
        unsafe { libc::fanotify_mark(group.as_raw_fd(), libc::FAN_MARK_FLUSH, 0, -1, std::ptr::null()) };
    }

    same("marks", marks(&group)?, was)?;
    same("nothing yet", events(&group)?, vec![])?;
    fs::write(&quiet, "x")?;
    same("ignored", events(&group)?, vec![])?;
    fs::OpenOptions::new().append(true).open(&child)?;
    let either = libc::FAN_OPEN | libc::FAN_CLOSE_WRITE;
    same("a child", events(&group)?.iter().fold(0, |all, one| all | one), either)?;
    fs::write(&file, "x")?;
    same("a file", events(&group)?.iter().fold(0, |all, one| all | one), either | libc::FAN_MODIFY)?;
    drop(held);
    Ok(())
}
