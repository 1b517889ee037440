//! What the guardian collected, as the task records want it.

use super::DumpError;
use crate::{
    guardian::{
        Guardian,
        protocol::{Bytes, CollectedTask, ProcessState, ThreadDetails, ThreadState},
    },
    image::records::{IntervalTimer, Restart, SeccompFilter, SignalAction},
    task::{ProcessContext, ThreadContext},
};
use std::collections::HashMap;

/// Step 5: asks the stopped tasks, from outside by ptrace and from inside by injected code.
pub(super) fn inspect(
    guardian: &mut Guardian,
    pids: &[i32],
) -> Result<HashMap<i32, ProcessContext>, DumpError> {
    let collected = guardian.collect()?;
    let inspected = guardian.inspect(pids)?;
    let mut states: HashMap<i32, ProcessState> =
        inspected.into_iter().map(|state| (state.pid, state)).collect();
    let contexts = collected.into_iter().filter_map(|task| {
        let state = states.remove(&task.pid)?;
        Some((task.pid, process(task, state)))
    });
    Ok(contexts.collect())
}

/// prctl answers are negative where the kernel does not know the question: then the state cannot be set either.
fn answer(value: i64) -> u32 {
    u32::try_from(value).unwrap_or_default()
}

fn process(task: CollectedTask, state: ProcessState) -> ProcessContext {
    let actions = state.actions.iter().map(|action| SignalAction {
        handler: action.handler,
        flags: action.flags,
        restorer: action.restorer,
        mask: action.mask,
    });
    let itimers = state.itimers.iter().map(|timer| IntervalTimer {
        interval_us: timer.interval_us.max(0) as u64,
        value_us: timer.value_us.max(0) as u64,
    });
    let bytes = |signals: Vec<Bytes>| signals.into_iter().map(|info| info.0).collect::<Vec<_>>();
    let (shared, mut pending) = match state.pending {
        Some(found) => (found.shared, found.threads.into_iter().collect()),
        None => (task.shared_pending, HashMap::new()),
    };
    ProcessContext {
        actions: actions.collect(),
        itimers: itimers.collect(),
        posix_timers: state.posix_timers,
        brk: state.brk,
        dumpable: answer(state.dumpable),
        thp_disable: answer(state.thp_disable),
        mdwe: answer(state.mdwe),
        memory_merge: state.memory_merge == 1,
        membarrier: answer(state.membarrier),
        lock_future: answer(state.lock_future),
        child_subreaper: state.child_subreaper == 1,
        pending: bytes(shared),
        threads: task
            .threads
            .into_iter()
            .map(|mut thread| {
                let details = state.threads.iter().find(|details| details.tid == thread.tid);
                if let Some(found) = pending.remove(&thread.tid) {
                    thread.pending = found;
                }
                self::thread(thread, details)
            })
            .collect(),
    }
}

fn thread(thread: ThreadState, details: Option<&ThreadDetails>) -> ThreadContext {
    let filters = thread.seccomp_filters.into_iter();
    ThreadContext {
        tid: thread.tid,
        registers: thread.registers.to_bytes(),
        xstate: thread.xstate.0,
        signal_mask: thread.signal_mask,
        rseq: thread.rseq.map(|rseq| (rseq.address, rseq.size, rseq.signature)),
        robust_list: thread.robust_list,
        pending: thread.pending.into_iter().map(|info| info.0).collect(),
        restart: thread.restart.map(|restart| Restart {
            syscall: restart.syscall,
            clock: restart.clock,
            remaining_ns: restart.remaining_ns.unwrap_or(-1),
        }),
        seccomp_filters: filters
            .map(|filter| SeccompFilter { program: filter.instructions, flags: filter.flags as u32 })
            .collect(),
        details: details.cloned(),
    }
}
