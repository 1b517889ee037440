//! 10,000 watches, each on a file of its own.

use std::fs;

use super::inotify::{events, instance, listed, unwatch, watch};
use crate::ctl::{Ctl, Outcome, same};

const COUNT: i32 = 10_000;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let inotify = instance()?;
    let path = |n: i32| ctl.work(&format!("f{n}"));
    for n in 1..=COUNT {
        fs::write(path(n), "")?;
        same("number", watch(&inotify, &path(n), libc::IN_ATTRIB | libc::IN_MODIFY)?, n)?;
    }

    if ctl.wait()? {
        unwatch(&inotify, 77)?;
    }

    same("watches", listed(&inotify)?.len(), COUNT as usize)?;
    same("nothing yet", events(&inotify)?, vec![])?;
    for n in [1, 77, 5000, COUNT] {
        fs::write(path(n), "x")?;
        same("a write", events(&inotify)?, vec![(n, libc::IN_MODIFY, String::new())])?;
    }
    Ok(())
}
