//! What the guardian needs to give every restored thread its last state.

use super::{
    RestorerFailure,
    error::{RestoreError, Result},
    shared::Shared,
    world::{Plans, task_name},
};
use crate::{
    guardian::protocol::{FinalTask, FinalThread, Restart},
    image::records::{self, Task},
    restore::memory::PAGE,
};
use std::sync::atomic::Ordering;

/// Room that the guardian needs per thread to set up an interrupted system call.
const SCRATCH: u64 = 64;

/// All tasks that will run on. Every thread of theirs has arrived at its trap.
pub fn tasks(plans: &Plans, shared: Shared, leave_stopped: bool) -> Result<Vec<FinalTask>> {
    let live = (0..plans.tree.nodes.len()).filter_map(|node| Some((node, plans.task(node)?)));
    live.map(|(node, task)| final_task(node, task, shared, leave_stopped)).collect()
}

fn final_task(node: usize, task: &Task, shared: Shared, leave_stopped: bool) -> Result<FinalTask> {
    let slot = shared
        .slot(node)
        .map(|slot| (slot.region_start.load(Ordering::Acquire), slot.region_end.load(Ordering::Acquire)));
    let Some((start, end)) = slot.filter(|(start, end)| start < end) else {
        let how = "it never entered the restorer".into();
        return Err(RestoreError::Died { pid: task.pid, name: task_name(task), how });
    };
    // The stacks lie below the last page; all of their threads are at their traps and need them no more.
    let room = (task.threads.len() as u64 * SCRATCH).next_multiple_of(PAGE);
    let stop = if leave_stopped { libc::SIGSTOP } else { task.group_stop };
    Ok(FinalTask {
        pid: task.pid,
        unmap: vec![(start, end - start)],
        scratch: end - PAGE - room,
        group_stop: (stop != 0).then_some(stop),
        threads: task.threads.iter().map(final_thread).collect(),
    })
}

fn final_thread(thread: &records::Thread) -> FinalThread {
    FinalThread {
        tid: thread.tid,
        registers: thread.registers.clone().into(),
        xstate: thread.xstate.clone().into(),
        signal_mask: thread.signal_mask,
        restart: thread.restart.map(|restart| Restart {
            syscall: restart.syscall,
            clock: restart.clock,
            remaining_ns: (restart.remaining_ns >= 0).then_some(restart.remaining_ns),
        }),
    }
}

/// What the restorer of some task says about its end.
pub fn restorer_failure(plans: &Plans, shared: Shared) -> Option<RestoreError> {
    (0..plans.tree.nodes.len()).find_map(|node| {
        let (slot, task) = (shared.slot(node)?, plans.task(node)?);
        let failure = RestorerFailure::of(&slot.status)?;
        Some(RestoreError::Died { pid: task.pid, name: task_name(task), how: failure.to_string() })
    })
}
