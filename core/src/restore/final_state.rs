//! What the guardian needs to give every restored thread its last state.

use super::blob::tables::{TRAP, is_ignored, is_trap};
use super::{
    RestorerFailure,
    error::{RestoreError, Result},
    shared::Shared,
    world::{Plans, task_name},
};
use crate::{
    guardian::protocol::{ArmTimers, FinalTask, FinalThread, LateCall, Restart},
    image::records::{self, Task},
    restore::memory::PAGE,
};
use std::sync::atomic::Ordering;

/// Room that the guardian needs per thread to set up an interrupted system call, or a late one.
const SCRATCH: u64 = crate::guardian::SCRATCH_LEN;

/// All tasks that will run on. Every thread of theirs has arrived at its trap.
pub fn tasks(plans: &Plans, shared: Shared, leave_stopped: bool) -> Result<Vec<FinalTask>> {
    let live = (0..plans.tree.nodes.len()).filter_map(|node| Some((node, plans.task(node)?)));
    live.map(|(node, task)| final_task(plans, node, task, shared, leave_stopped)).collect()
}

fn final_task(
    plans: &Plans,
    node: usize,
    task: &Task,
    shared: Shared,
    leave_stopped: bool,
) -> Result<FinalTask> {
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
        arm: arm_timers(node, task, shared),
        group_stop: (stop != 0).then_some(stop),
        threads: task
            .threads
            .iter()
            .enumerate()
            .skip(task.dead_leader.into())
            .map(|(index, thread)| final_thread(plans, task, index, thread))
            .collect(),
    })
}

fn arm_timers(node: usize, task: &Task, shared: Shared) -> Option<ArmTimers> {
    let intervals = task.itimers.iter().any(|timer| *timer != records::IntervalTimer::default());
    let slot = shared.slot(node).filter(|_| intervals || !task.posix_timers.is_empty())?;
    let [entry, arguments, stack] = [0, 1, 2].map(|at: usize| slot.arming[at].load(Ordering::Acquire));
    Some(ArmTimers { entry, arguments, stack })
}

fn final_thread(plans: &Plans, task: &Task, index: usize, thread: &records::Thread) -> FinalThread {
    FinalThread {
        late: late_calls(plans, task, index, thread),
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

/// What would be lost at the restorer's end, or would make it lose something.
fn late_calls(plans: &Plans, task: &Task, index: usize, thread: &records::Thread) -> Vec<LateCall> {
    let mut calls = Vec::new();
    let mut call = |name: &str, number: i64, arguments: [u64; 6], data: Vec<u8>, pointer: usize| {
        calls.push(LateCall {
            name: name.into(),
            number: number as u64,
            arguments,
            data: data.into(),
            pointer,
        });
    };
    let parent = plans.image.task(task.ppid);
    if thread.parent_death_signal != 0 && parent.is_some_and(|parent| parent.dead_leader) {
        let arguments = [libc::PR_SET_PDEATHSIG as u64, thread.parent_death_signal.into(), 0, 0, 0, 0];
        call("prctl(PR_SET_PDEATHSIG)", libc::SYS_prctl, arguments, Vec::new(), 0);
    }
    let first = usize::from(task.dead_leader);
    if index == first
        && let Some(action) = task.actions.get(TRAP - 1).filter(|action| is_ignored(action))
    {
        let words = [action.handler, action.flags, action.restorer, action.mask];
        let data = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        call("rt_sigaction", libc::SYS_rt_sigaction, [TRAP as u64, 0, 0, 8, 0, 0], data, 1);
    }
    let (pid, tid, trap) = (task.pid as u64, thread.tid as u64, TRAP as u64);
    for info in task.pending.iter().filter(|info| index == first && is_trap(info)) {
        call("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, [pid, trap, 0, 0, 0, 0], info.clone(), 2);
    }
    for info in thread.pending.iter().filter(|info| is_trap(info)) {
        call("rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, [pid, tid, trap, 0, 0, 0], info.clone(), 3);
    }
    calls
}

/// What the restorer of some task says about its end.
pub fn restorer_failure(plans: &Plans, shared: Shared) -> Option<RestoreError> {
    (0..plans.tree.nodes.len()).find_map(|node| {
        let (slot, task) = (shared.slot(node)?, plans.task(node)?);
        let failure = RestorerFailure::of(&slot.status)?;
        Some(RestoreError::Died { pid: task.pid, name: task_name(task), how: failure.to_string() })
    })
}
