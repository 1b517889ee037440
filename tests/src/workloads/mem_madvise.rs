//! Settings made by madvise(2), one on each mapping: the kernel shows them as VmFlags.

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{Map, PAGE};

const ADVICE: [i32; 8] = [
    libc::MADV_DONTFORK,
    libc::MADV_WIPEONFORK,
    libc::MADV_DONTDUMP,
    libc::MADV_HUGEPAGE,
    libc::MADV_NOHUGEPAGE,
    libc::MADV_SEQUENTIAL,
    libc::MADV_RANDOM,
    libc::MADV_MERGEABLE,
];

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut maps = Vec::new();
    for advice in ADVICE {
        // A page without access between them, so that none merges with its neighbour.
        let room = Map::anon(18 * PAGE)?;
        room.page(0).protect(libc::PROT_NONE)?;
        let map = room.part(PAGE, 17 * PAGE);
        map.fill(advice as u64);
        map.advise(advice)?;
        maps.push((advice, map, map.smaps("VmFlags:")?));
    }

    if ctl.wait()? {
        maps[0].1.advise(libc::MADV_DOFORK)?;
    }

    let plain = |flags: Option<String>| flags.map(|f| f.replace(" sd", ""));
    for (advice, map, flags) in maps {
        map.check("advised memory", advice as u64)?;
        same(&format!("VmFlags after advice {advice}"), plain(map.smaps("VmFlags:")?), plain(flags))?;
    }
    Ok(())
}
