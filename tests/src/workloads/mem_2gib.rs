//! 2 GiB of memory, half in 4K pages, half as the kernel likes.

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{Map, word};

const SIZE: usize = 1 << 30;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let maps = [Map::anon(SIZE)?, Map::anon(SIZE)?];
    maps[0].advise(libc::MADV_NOHUGEPAGE)?;
    for (seed, map) in maps.iter().enumerate() {
        for n in 0..map.pages() {
            map.page(n).put(0, word(seed as u64, n));
            map.page(n).put(2048, word(seed as u64, n + 1));
        }
    }
    if ctl.wait()? {
        maps[1].page(100).put(0, 0);
    }
    for (seed, map) in maps.iter().enumerate() {
        for n in 0..map.pages() {
            same("first word of a page", map.page(n).get(0), word(seed as u64, n))?;
            same("middle word of a page", map.page(n).get(2048), word(seed as u64, n + 1))?;
        }
    }
    Ok(())
}
