//! The vdso is where the auxiliary vector says, and tells the time.

use std::time::{Duration, Instant};

use crate::ctl::{Ctl, Outcome, ensure, pause, same};
use crate::sys::Map;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    // SAFETY: reads the auxiliary vector.
    let address = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as usize;
    let vdso = Map { addr: address, len: 4096 };
    let head = vdso.get(0);
    let mut last = Instant::now();

    let sabotage = ctl.wait()?;

    same("first word of the vdso", vdso.get(0), head ^ u64::from(sabotage))?;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).unwrap_or_default();
    ensure(line.starts_with(&format!("{address:x}-")), &format!("the vdso is at {line}"))?;
    for _ in 0..100 {
        pause(Duration::from_micros(50));
        let now = Instant::now();
        ensure(now > last, "monotonic time stands still or goes back")?;
        last = now;
    }
    Ok(())
}
