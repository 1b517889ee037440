//! 300 children, each with a MiB of its own.

use crate::ctl::{Ctl, Outcome};
use crate::sys::Map;

const COUNT: usize = 300;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut children = Vec::new();
    for n in 0..COUNT {
        let name = format!("c{n}");
        children.push(ctl.child(&name, |ctl| {
            let map = Map::anon(1 << 20)?;
            map.fill(n as u64);
            if ctl.wait_as(&name)? && n == 150 {
                map.put(4096, 0);
            }
            map.check("child's memory", n as u64)
        })?);
    }
    for n in 0..COUNT {
        ctl.await_ready(&format!("c{n}"))?;
    }
    ctl.wait()?;
    children.into_iter().try_for_each(|child| child.join())
}
