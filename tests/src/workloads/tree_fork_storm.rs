//! Processes that fork, and whose children fork and end, all the time: no one may be missed, none may be lost.

use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::wait::{WaitStatus, wait};

use crate::ctl::{Ctl, Outcome, changed, ensure, poll_until};
use crate::sys::Map;

const STORMS: usize = 4;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let counters = Map::shared(4096)?;
    let counter = |n: usize| {
        // SAFETY: an aligned word of a mapping that stays.
        unsafe { AtomicU64::from_ptr((counters.addr + 64 * n) as *mut u64) }
    };
    let mut storms = Vec::new();
    for n in 0..STORMS {
        storms.push(ctl.child(&format!("storm{n}"), |ctl| {
            let request = ctl.dir().join("check-request");
            while !request.exists() {
                // Two generations at once; the child's own status tells whether both did their work.
                let child = ctl.child("gust", |ctl| {
                    let inner = ctl.child("breeze", |_| {
                        counter(n).fetch_add(1, Ordering::SeqCst);
                        Ok(())
                    })?;
                    inner.join()?;
                    counter(n).fetch_add(1, Ordering::SeqCst);
                    Ok(())
                })?;
                child.join()?;
                counter(n + 8).fetch_add(2, Ordering::SeqCst);
            }
            ensure(wait() == Err(nix::Error::ECHILD), "a child that nobody made")
        })?);
    }
    poll_until("all storms rage", || (0..STORMS).all(|n| counter(n).load(Ordering::SeqCst) > 10))?;

    if ctl.wait()? {
        counter(1).fetch_add(1, Ordering::SeqCst);
    }

    for _ in 0..STORMS {
        let status = wait()?;
        ensure(matches!(status, WaitStatus::Exited(_, 0)), &format!("a storm ended with {status:?}"))?;
    }
    drop(storms);
    for n in 0..STORMS {
        let (did, counted) = (counter(n).load(Ordering::SeqCst), counter(n + 8).load(Ordering::SeqCst));
        if did != counted {
            return Err(changed(format!("storm {n}: its children counted {did}, it counted {counted}")));
        }
    }
    Ok(())
}
