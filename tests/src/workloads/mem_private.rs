//! Private memory of every protection, with contents, and with holes punched into it.

use crate::ctl::{Ctl, Outcome, ensure};
use crate::sys::{Map, PAGE, RW, errno_of};

const PROTECTIONS: [i32; 5] =
    [libc::PROT_NONE, libc::PROT_READ, libc::PROT_READ | libc::PROT_EXEC, RW, RW | libc::PROT_EXEC];

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let map = Map::anon(512 * PAGE)?;
    map.fill(1);
    for (n, prot) in PROTECTIONS.into_iter().enumerate() {
        map.part(n * 64 * PAGE, 16 * PAGE).protect(prot)?;
    }
    // Every other page away, so that no two pages of this piece are neighbours.
    let comb = map.part(400 * PAGE, 64 * PAGE);
    for n in (0..64).step_by(2) {
        comb.page(n).unmap()?;
    }

    if ctl.wait()? {
        map.page(3).protect(RW)?;
        map.put(3 * PAGE + 8, 77);
    }

    for n in 0..PROTECTIONS.len() {
        map.part(n * 64 * PAGE, 16 * PAGE).protect(RW)?;
    }
    map.part(0, 400 * PAGE).check("whole part", 1)?;
    for n in 0..64 {
        if n % 2 == 0 {
            let gone = comb.page(n).resident();
            ensure(errno_of(&gone) == libc::ENOMEM, "a hole is mapped")?;
        } else {
            ensure(comb.page(n).get(8) == map_word(400 + n), "a page between holes has changed")?;
        }
    }
    ensure(map.get(470 * PAGE + 8) == map_word(470), "the end has changed")
}

/// The second word of a page of the pattern.
fn map_word(page: usize) -> u64 {
    crate::sys::word(1, page * PAGE / 8 + 1)
}
