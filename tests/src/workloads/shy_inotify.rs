//! An inotify instance with a watch and an event in its queue.

use std::fs;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::ctl::{Ctl, Outcome, same};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let dir = ctl.work("watched");
    fs::create_dir_all(&dir)?;
    let instance = Inotify::init(InitFlags::IN_NONBLOCK)?;
    instance.add_watch(&dir, AddWatchFlags::IN_CREATE)?;
    fs::write(dir.join(format!("one.{}", std::process::id())), "")?;

    if ctl.wait()? {
        instance.read_events()?;
    }

    same("events", instance.read_events()?.len(), 1)?;
    fs::write(dir.join("two"), "")?;
    fs::remove_file(dir.join("two"))?;
    same("events", instance.read_events()?.len(), 1)
}
