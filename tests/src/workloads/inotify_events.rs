//! Events that nobody has read yet. A restored queue may have one `IN_Q_OVERFLOW` in their place, which inotify(7) tells
//! every program to expect, but never nothing.

use std::fs;

use super::inotify::{events, fresh, instance, watch};
use crate::ctl::{Ctl, Outcome, changed, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let directory = ctl.work("watched");
    fs::create_dir(&directory)?;
    let inotify = instance()?;
    same("number", watch(&inotify, &directory, libc::IN_CREATE | libc::IN_DELETE)?, 1)?;
    fs::write(directory.join("a"), "")?;
    fs::remove_file(directory.join("a"))?;
    let quiet = instance()?;
    same("number", watch(&quiet, &directory, libc::IN_CREATE)?, 1)?;

    if ctl.wait()? {
        events(&inotify)?;
    }

    same("readable", sys::readiness(&inotify, libc::POLLIN)?, libc::POLLIN)?;
    let event = |mask, name: &str| (1, mask, name.to_owned());
    let all = vec![event(libc::IN_CREATE, "a"), event(libc::IN_DELETE, "a")];
    match events(&inotify)? {
        found if found == all => {}
        found if found == [(-1, libc::IN_Q_OVERFLOW, String::new())] => {}
        found => return Err(changed(format!("queued: is {found:?}, was {all:?}"))),
    }
    same("no more", events(&inotify)?, vec![])?;
    let path = fresh(&directory);
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    fs::write(path, "")?;
    same("the next", events(&inotify)?, vec![event(libc::IN_CREATE, &name)])?;
    same("of the other instance", events(&quiet)?, vec![event(libc::IN_CREATE, &name)])
}
