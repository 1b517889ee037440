//! A process that may write small files only: it cannot write its own pages to the image.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{Map, PAGE};

/// Enough for the verdict.
const LIMIT: u64 = 64 << 10;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let map = Map::anon(4000 * PAGE)?;
    map.fill(91);
    setrlimit(Resource::RLIMIT_FSIZE, LIMIT, LIMIT)?;

    if ctl.wait()? {
        map.put(800, 3);
    }

    map.check("memory", 91)?;
    same("limit", getrlimit(Resource::RLIMIT_FSIZE)?, (LIMIT, LIMIT))
}
