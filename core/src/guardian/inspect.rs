//! What tasks themselves must be asked: one call per process, and one per thread, many at a time.

use super::{
    GuardianError,
    protocol::{ProcessState, SignalAction, ThreadDetails},
    timers,
    tree::{Plan, Ran, Tree, answer},
    wait::Waiter,
};
use crate::inject::{
    InjectError,
    parasite::{self, ProcessQuery, ThreadQuery, Timers, command},
    run::Way,
    space::{Space, THREAD_SLOTS},
};
use std::collections::HashMap;

/// Reads a plain block of the task's memory.
pub(super) fn read_block<T: Plain>(space: &Space, address: u64) -> Result<T, GuardianError> {
    let mut bytes = vec![0u8; size_of::<T>()];
    space.read(&mut bytes, address)?;
    // SAFETY: `Plain` types are valid for any bytes; the read is unaligned.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Integers only, in C layout.
///
/// # Safety
/// Every bit pattern must be valid, and there must be no padding.
pub(super) unsafe trait Plain {}
// SAFETY: repr(C), 64-bit integers only.
unsafe impl Plain for ProcessQuery {}
// SAFETY: as above.
unsafe impl Plain for ThreadQuery {}
// SAFETY: as above.
unsafe impl Plain for Timers {}
// SAFETY: as above.
unsafe impl Plain for parasite::Simple {}

/// The registers with which a thread calls the parasite.
pub fn plan(tree: &Tree, pid: i32, tid: i32, slot: (u64, u64)) -> Result<Plan, GuardianError> {
    let space = tree.process(pid)?.space.as_ref().ok_or(GuardianError::Unknown { pid })?;
    Ok(plan_in(space, &tree.saved(pid, tid)?.registers, slot))
}

/// The same, of a thread of a snapshot too.
pub fn plan_in(space: &Space, own: &crate::arch::Registers, (block, stack): (u64, u64)) -> Plan {
    let mut registers = own.for_call(space.entry(), block, stack);
    registers.rsi = u64::from(space.ignores_trap);
    Plan { registers, way: if space.ignores_trap { Way::WatchedCall } else { Way::Call } }
}

/// The answer, and a task that was forked.
pub type SimpleAnswer = (Result<parasite::Simple, GuardianError>, Option<i32>);

/// Runs a [`parasite::Simple`] command in the main thread of each process, with the same arguments.
pub fn simple(
    tree: &mut Tree,
    pids: &[i32],
    command: u64,
    values: [i64; 4],
    waiter: &mut Waiter,
) -> Result<HashMap<i32, SimpleAnswer>, GuardianError> {
    let (mut plans, mut mains) = (HashMap::new(), HashMap::new());
    for &pid in pids {
        let main = tree.process(pid)?.main(pid)?;
        let space = tree.space(pid).ok_or(GuardianError::Unknown { pid })?;
        let slot = space.main_slot();
        let words: Vec<u8> =
            [command as i64, 0].iter().chain(&values).flat_map(|w| w.to_ne_bytes()).collect();
        space.write(&words, slot.0)?;
        plans.insert(main, plan(tree, pid, main, slot)?);
        mains.insert(main, pid);
    }
    let mut answers = HashMap::with_capacity(pids.len());
    for (tid, Ran { outcome, forked }) in tree.run(&plans, waiter) {
        let Some(&pid) = mains.get(&tid) else { continue };
        let space = tree.space(pid).ok_or(GuardianError::Unknown { pid })?;
        let answer = match outcome {
            Ok(_) => read_block(space, space.main_slot().0),
            Err(error) => Err(error.into()),
        };
        answers.insert(pid, (answer, forked));
    }
    Ok(answers)
}

/// Asks these processes and all their threads.
pub fn inspect(
    tree: &mut Tree,
    pids: &[i32],
    waiter: &mut Waiter,
) -> Result<Vec<ProcessState>, GuardianError> {
    tree.inject(pids, waiter)?;
    let mut states = Vec::with_capacity(pids.len());
    for (pid, (outcome, _)) in simple(tree, pids, command::PROCESS, [0; 4], waiter)? {
        outcome?;
        let space = tree.space(pid).ok_or(GuardianError::Unknown { pid })?;
        let query: ProcessQuery = read_block(space, space.main_slot().0)?;
        answer("asking the process", pid, query.result)?;
        states.push(describe(pid, &query));
    }
    states.sort_by_key(|state| pids.iter().position(|&pid| pid == state.pid));
    for state in &mut states {
        timers::read(tree, state, waiter)?;
    }
    threads(tree, &mut states, waiter)?;
    Ok(states)
}

fn describe(pid: i32, query: &ProcessQuery) -> ProcessState {
    let action = |a: &parasite::SignalAction| SignalAction {
        handler: a.handler,
        flags: a.flags,
        restorer: a.restorer,
        mask: a.mask,
    };
    ProcessState {
        pid,
        actions: query.actions.iter().map(action).collect(),
        itimers: query.timers.map(timers::interval),
        posix_timers: Vec::new(),
        pending: None,
        membarrier: query.membarrier,
        lock_future: query.lock_future,
        brk: query.brk,
        dumpable: query.dumpable,
        child_subreaper: query.child_subreaper,
        thp_disable: query.thp_disable,
        mdwe: query.mdwe,
        memory_merge: query.memory_merge,
        threads: Vec::new(),
    }
}

/// The threads of all processes, in waves of as many per process as there are slots.
fn threads(tree: &mut Tree, states: &mut [ProcessState], waiter: &mut Waiter) -> Result<(), GuardianError> {
    let mut lists: Vec<(i32, Vec<i32>)> = Vec::with_capacity(states.len());
    for state in states.iter() {
        lists.push((state.pid, tree.process(state.pid)?.threads.keys().copied().collect()));
    }
    let longest = lists.iter().map(|(_, tids)| tids.len()).max().unwrap_or(0);
    let mut details: HashMap<i32, ThreadQuery> = HashMap::new();
    for wave in 0..longest.div_ceil(THREAD_SLOTS) {
        let (mut plans, mut slots) = (HashMap::new(), HashMap::new());
        for (pid, tids) in &lists {
            let space = tree.space(*pid).ok_or(GuardianError::Unknown { pid: *pid })?;
            for (index, &tid) in tids.iter().skip(wave * THREAD_SLOTS).take(THREAD_SLOTS).enumerate() {
                let slot = space.thread_slot(index);
                space.write(&command::THREAD.to_ne_bytes(), slot.0)?;
                plans.insert(tid, plan(tree, *pid, tid, slot)?);
                slots.insert(tid, (*pid, slot.0));
            }
        }
        for (tid, ran) in tree.run(&plans, waiter) {
            ran.outcome?;
            if let Some(&(pid, block)) = slots.get(&tid) {
                let space = tree.space(pid).ok_or(GuardianError::Unknown { pid })?;
                details.insert(tid, read_block(space, block)?);
            }
        }
    }
    for (state, (pid, mut tids)) in states.iter_mut().zip(lists) {
        tids.sort_by_key(|&tid| (tid != pid, tid));
        for tid in tids {
            let lost = || InjectError::Late { pid, tid, name: String::new() };
            let query = details.get(&tid).ok_or_else(lost)?;
            answer("sigaltstack", pid, query.result)?;
            state.threads.push(detail(tid, query));
        }
    }
    Ok(())
}

fn detail(tid: i32, query: &ThreadQuery) -> ThreadDetails {
    ThreadDetails {
        tid,
        stack_pointer: query.stack_pointer,
        stack_flags: query.stack_flags,
        stack_size: query.stack_size,
        clear_child_tid: query.clear_child_tid,
        parent_death_signal: query.parent_death_signal,
        timer_slack_ns: query.timer_slack,
        securebits: query.securebits,
        keep_capabilities: query.keep_capabilities,
        no_new_privileges: query.no_new_privileges,
        tsc: query.tsc,
        cpuid: query.cpuid,
        machine_check_policy: query.machine_check_policy,
        io_flusher: query.io_flusher,
        speculation: query.speculation,
        memory_policy: query.memory_policy,
        memory_nodes: query.memory_nodes,
        keyrings: query.keyrings,
    }
}
