//! What the guardian collected, as the task records want it.

use super::DumpError;
use crate::{
    guardian::{
        Guardian,
        protocol::{CollectedTask, ProcessState, ThreadDetails, ThreadState},
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
    let leader = state.threads.iter().find(|thread| thread.tid == task.pid).or(state.threads.first());
    let filters = task.threads.first().map(|thread| thread.seccomp_filters.clone()).unwrap_or_default();
    ProcessContext {
        actions: actions.collect(),
        itimers: itimers.collect(),
        brk: state.brk,
        dumpable: answer(state.dumpable),
        thp_disable: answer(state.thp_disable),
        securebits: leader.map_or(0, |thread| answer(thread.securebits)),
        keep_caps: leader.is_some_and(|thread| thread.keep_capabilities == 1),
        child_subreaper: state.child_subreaper == 1,
        pending: task.shared_pending.into_iter().map(|info| info.0).collect(),
        seccomp_filters: filters
            .into_iter()
            .map(|filter| SeccompFilter { program: filter.instructions, flags: filter.flags as u32 })
            .collect(),
        threads: task
            .threads
            .into_iter()
            .map(|thread| {
                let details = state.threads.iter().find(|details| details.tid == thread.tid);
                self::thread(thread, details)
            })
            .collect(),
    }
}

fn thread(thread: ThreadState, details: Option<&ThreadDetails>) -> ThreadContext {
    ThreadContext {
        tid: thread.tid,
        registers: thread.registers.to_bytes(),
        xstate: thread.xstate.0,
        signal_mask: thread.signal_mask,
        altstack: details.map_or((0, libc::SS_DISABLE as u32, 0), |details| {
            (details.stack_pointer, answer(details.stack_flags), details.stack_size)
        }),
        clear_child_tid: details.map_or(0, |details| details.clear_child_tid),
        robust_list: thread.robust_list,
        rseq: thread.rseq.map(|rseq| (rseq.address, rseq.size, rseq.signature)),
        pending: thread.pending.into_iter().map(|info| info.0).collect(),
        parent_death_signal: details.map_or(0, |details| answer(details.parent_death_signal)),
        timer_slack_ns: details.map_or(0, |details| details.timer_slack_ns.max(0) as u64),
        restart: thread.restart.map(|restart| Restart {
            syscall: restart.syscall,
            clock: restart.clock,
            remaining_ns: restart.remaining_ns.unwrap_or(-1),
        }),
    }
}
