//! Transparent huge pages stay huge, with their contents.

use crate::ctl::{Ctl, Fail, Outcome, ensure};
use crate::sys::{ANON, Map, RW};

const HUGE: usize = 2 << 20;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let room = Map::new(10 * HUGE, RW, ANON | libc::MAP_NORESERVE, -1, 0)?;
    let start = room.addr.next_multiple_of(HUGE) - room.addr;
    let map = room.part(start, 8 * HUGE);
    map.advise(libc::MADV_HUGEPAGE)?;
    map.part(0, 5 * HUGE).fill(11);
    let before = map.smaps("AnonHugePages:")?;
    if before.as_deref().is_none_or(|size| size.starts_with("0 ")) {
        return Err(Fail::Absent("the kernel gives no transparent huge pages".into()));
    }

    if ctl.wait()? {
        map.part(HUGE, HUGE).advise(libc::MADV_NOHUGEPAGE)?;
        map.part(HUGE, HUGE).advise(libc::MADV_DONTNEED)?;
        map.part(HUGE, HUGE).fill(11);
    }

    map.part(0, 5 * HUGE).check("huge pages", 11)?;
    let after = map.smaps("AnonHugePages:")?;
    ensure(after == before, &format!("AnonHugePages: is {after:?}, was {before:?}"))?;
    map.part(5 * HUGE, 3 * HUGE).check_zero("untouched huge pages")
}
