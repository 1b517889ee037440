//! 60,000 mappings, nearly as many as a process may have (vm.max_map_count): one page each, protections alternating so that none merges.

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{Map, PAGE, RW, word};

const COUNT: usize = 60_000;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let map = Map::anon(COUNT * PAGE)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    for n in 0..COUNT {
        map.page(n).put(8, word(71, n));
        if n % 2 == 0 {
            map.page(n).protect(libc::PROT_READ)?;
        }
    }
    if ctl.wait()? {
        map.page(COUNT - 1).put(8, 0);
    }
    for n in 0..COUNT {
        same("one of many pages", map.page(n).get(8), word(71, n))?;
    }
    map.protect(RW).map_err(Into::into)
}
