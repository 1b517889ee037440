//! Pages that read as zero: never touched, only read (the kernel's zero page), and written with zeroes.

use crate::ctl::{Ctl, Outcome, ensure};
use crate::sys::{Map, PAGE};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let map = Map::anon(96 * PAGE)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    for n in 32..64 {
        map.page(n).get(0);
    }
    for n in 64..96 {
        map.page(n).put(16, 0);
    }

    if ctl.wait()? {
        map.page(40).put(8, 5);
    }

    ensure(map.part(0, 32 * PAGE).frames()?.iter().all(|&frame| frame == 0), "untouched pages are there")?;
    map.check_zero("zero pages")
}
