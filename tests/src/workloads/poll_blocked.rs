//! Tasks in poll(2) without a timeout, and with one of an hour: dumped again and again, they wait for the same descriptors.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use crate::ctl::{Ctl, Outcome, pause, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut children = Vec::new();
    for timeout in [-1, 3_600_000] {
        let (end, go) = sys::pipe(libc::O_CLOEXEC)?;
        let child = ctl.child(&format!("poll{timeout}"), |_| {
            let fd = end.as_fd().as_raw_fd();
            let mut entries = [libc::pollfd { fd, events: libc::POLLIN, revents: 0 }; 3];
            // SAFETY: three valid entries.
            let ready = sys::cvt(unsafe { libc::poll(entries.as_mut_ptr(), 3, timeout) })?;
            same("number of descriptors that are ready", ready, 3)?;
            same("what came", sys::read(&end, 10)?, b"go".to_vec())
        })?;
        children.push((child, go));
    }
    pause(Duration::from_millis(50));

    let sabotage = ctl.wait()?;

    for (child, go) in children {
        sys::write(&go, if sabotage { b"no" } else { b"go" })?;
        child.join()?;
    }
    Ok(())
}
