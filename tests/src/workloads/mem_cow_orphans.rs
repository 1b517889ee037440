//! Siblings share copy-on-write pages that they have from a parent that is dead; nobody else has them.

use std::fs;

use crate::ctl::{Ctl, Outcome, ensure, poll_until};
use crate::sys::{Map, PAGE};

const PAGES: usize = 32;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    // The grandchildren come to us.
    nix::sys::prctl::set_child_subreaper(true)?;
    let middle = ctl.child("middle", |ctl| {
        let map = Map::anon(PAGES * PAGE)?;
        map.advise(libc::MADV_NOHUGEPAGE)?;
        map.fill(61);
        for n in 0..2 {
            ctl.child(&format!("orphan{n}"), |ctl| orphan(ctl, &map, n))?;
        }
        Ok(())
    })?;
    middle.join()?;
    for n in 0..2 {
        ctl.await_ready(&format!("orphan{n}"))?;
    }

    ctl.wait()?;

    for n in 0..2 {
        let file = ctl.dir().join(format!("shown{n}"));
        poll_until("an orphan shows its frames", || file.exists())?;
    }
    let frames = |n| fs::read_to_string(ctl.dir().join(format!("shown{n}")));
    let (one, two) = (frames(0)?, frames(1)?);
    for n in 0..2 {
        let _ = fs::remove_file(ctl.dir().join(format!("shown{n}")));
    }
    ctl.announce("compared", b"")?;
    let statuses: Vec<_> = (0..2).map(|_| nix::sys::wait::wait()).collect();
    fs::remove_file(ctl.dir().join("compared"))?;
    for status in statuses {
        ensure(
            matches!(status?, nix::sys::wait::WaitStatus::Exited(_, 0)),
            "an orphan found its memory changed",
        )?;
    }
    ensure(one == two, "the siblings no longer share their pages")
}

fn orphan(ctl: &Ctl, map: &Map, n: usize) -> Outcome {
    if ctl.wait_as(&format!("orphan{n}"))? && n == 1 {
        map.put(8 * PAGE, 1);
    }
    let frames: Vec<String> = map.frames()?.iter().map(u64::to_string).collect();
    ctl.announce(&format!("shown{n}"), frames.join(" ").as_bytes())?;
    poll_until("the frames are compared", || ctl.dir().join("compared").exists())?;
    map.check("orphan's memory", 61)
}
