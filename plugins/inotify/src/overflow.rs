//! One `IN_Q_OVERFLOW` in the queue of an instance that has no watches yet.
//!
//! Only a full queue makes the kernel say so. The queue is filled by a watch on a memory file of our own; then the watch is
//! removed, whose `IN_IGNORED` finds no room; then all events are read but the last, which is the overflow.

use crate::kernel;
use stasis_plugin_api::{HookError, Result};
use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd},
};

/// `sizeof(struct inotify_event)`: none of these events has a name.
const EVENT: usize = 16;

/// Longer queues are not filled (`fs.inotify.max_queued_events` is 16384 as a rule).
const MOST: usize = 1 << 24;

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}

/// Leaves the overflow event as the only one.
pub fn queue(inotify: BorrowedFd<'_>) -> Result<()> {
    let file = kernel::memory_file(c"inotify-overflow").map_err(failed("memfd_create"))?;
    let mask = libc::IN_ATTRIB | libc::IN_MODIFY;
    let watch = kernel::add(inotify, &kernel::magic_link(file.as_fd()), mask);
    let watch = watch.map_err(failed("inotify_add_watch of a memory file"))?;
    let queued = fill(inotify, file.as_fd())?;
    kernel::remove(inotify, watch).map_err(failed("inotify_rm_watch"))?;
    drain(inotify, queued.saturating_sub(EVENT))
}

/// Makes events until there is no room for more; gives the bytes in the queue.
fn fill(inotify: BorrowedFd<'_>, file: BorrowedFd<'_>) -> Result<usize> {
    let mut queued = 0;
    while queued < MOST * EVENT {
        // Equal events in a row would be merged: two kinds take turns.
        kernel::touch_mode(file).map_err(failed("fchmod of a memory file"))?;
        kernel::touch_time(file).map_err(failed("futimens of a memory file"))?;
        let now = kernel::queued(inotify).map_err(failed("FIONREAD"))?;
        if now == queued {
            return Ok(now);
        }
        queued = now;
    }
    let remedy = "lower fs.inotify.max_queued_events";
    Err(HookError::invalid(format!("a queue of {MOST} inotify events is too long")).remedy(remedy))
}

/// Reads `left` bytes of events.
fn drain(inotify: BorrowedFd<'_>, mut left: usize) -> Result<()> {
    let mut inotify = inotify.try_clone_to_owned().map(File::from).map_err(failed("duplicate"))?;
    let mut buffer = vec![0; (4096 * EVENT).min(left)];
    while left > 0 {
        let part = left.min(buffer.len());
        match inotify.read(&mut buffer[..part]) {
            Ok(0) => return Err(HookError::invalid("an inotify queue ended early")),
            Ok(n) => left = left.saturating_sub(n),
            Err(error) => return Err(failed("read of inotify events")(error)),
        }
    }
    Ok(())
}
