//! A thread that has left the descriptor table of its process (unshare(2), CLONE_FILES): refused by name.

use std::sync::mpsc::channel;

use nix::sched::{CloneFlags, unshare};

use crate::ctl::{Ctl, Outcome, changed, ensure};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (ready, is_ready) = channel();
    let (end, ends) = channel::<()>();
    let thread = std::thread::spawn(move || {
        let left = unshare(CloneFlags::CLONE_FILES);
        let _ = ready.send(left);
        let _ = ends.recv();
    });
    is_ready.recv().map_err(|_| changed("the thread has ended".into()))??;

    let sabotage = ctl.wait()?;

    drop(end);
    ensure(thread.join().is_ok() && !sabotage, "the thread has failed")
}
