//! Ten pages, far apart, in a reserve of one TiB: the rest stays untouched.

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{ANON, Map, PAGE, RW};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let map = Map::new(1 << 40, RW, ANON | libc::MAP_NORESERVE, -1, 0)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    let places: Vec<usize> = (0..10).map(|n| n * 97 * 1013 * 256 * PAGE).collect();
    for &at in &places {
        map.part(at, PAGE).fill(at as u64);
    }
    let rss = map.smaps("Rss:")?;

    if ctl.wait()? {
        map.put(places[3] + 4 * PAGE, 1);
    }

    for at in places {
        map.part(at, PAGE).check("far page", at as u64)?;
    }
    same("resident size", map.smaps("Rss:")?, rss)
}
