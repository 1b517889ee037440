//! Turning the records of a task into the tables that the restorer reads.

use super::proto::{
    Action, Arguments, Copied, Credentials, Filter, Interval, Limit, Name, SignalInfo, Table, Thread,
};
use super::{BlobError, RestorerOptions, timers};
use crate::image::records::{self, SeccompFilter, Task};
use crate::restore::memory::RestorerMoves;
use std::sync::atomic::AtomicU32;

/// Bytes of a `siginfo_t`.
const SIGNAL_INFO: usize = 128;
/// Bytes of a `struct sock_filter`.
const INSTRUCTION: usize = 8;
/// The restorer's word for a setting that is to be left alone.
const UNKNOWN: u32 = 2;

/// Bytes that will lie at a fixed address in the task.
#[derive(Debug)]
pub struct Tables {
    base: u64,
    bytes: Vec<u8>,
}

impl Tables {
    /// Tables from the address `base` on.
    pub fn new(base: u64) -> Self {
        Self { base, bytes: Vec::new() }
    }

    /// Address of the next byte.
    pub fn end(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// Adds a table. `T` is plain data of the protocol.
    pub fn put<T>(&mut self, entries: &[T]) -> Table<T> {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = self.end();
        // SAFETY: the entries are initialised memory of that size; padding is copied as it is and never looked at.
        let bytes =
            unsafe { std::slice::from_raw_parts(entries.as_ptr().cast::<u8>(), size_of_val(entries)) };
        self.bytes.extend_from_slice(bytes);
        Table::new(address, entries.len() as u64)
    }

    /// Adds the argument block; gives all bytes and the block's address.
    pub fn finish(mut self, arguments: Arguments) -> (Vec<u8>, u64) {
        let address = self.put(&[arguments]).address;
        (self.bytes, address)
    }

    /// Everything about `task`, but for what depends on the size of the region.
    pub fn task(
        &mut self,
        moves: &RestorerMoves,
        task: &Task,
        options: &RestorerOptions,
    ) -> Result<Arguments, BlobError> {
        let names: Vec<_> = moves
            .names
            .iter()
            .map(|(span, name)| {
                let name = [name.as_slice(), &[0]].concat();
                Name { span: *span, name: self.put(&name).address }
            })
            .collect();
        let copies: Vec<_> = moves
            .copies
            .iter()
            .map(|(span, bytes)| {
                let bytes = &bytes[..bytes.len().min(span.len as usize)];
                Copied { to: span.start, from: self.put(bytes).address, len: bytes.len() as u64 }
            })
            .collect();
        let mut layout = moves.layout;
        layout.auxv = self.put(&moves.auxv).address;
        layout.auxv_size = moves.auxv.len() as u32;
        layout.exe_fd = options.exe as u32;
        let actions: Vec<_> = task
            .actions
            .iter()
            .enumerate()
            .map(|(index, action)| Action {
                handler: if index + 1 == TRAP && is_ignored(action) { 0 } else { action.handler },
                flags: action.flags,
                restorer: action.restorer,
                mask: action.mask,
            })
            .collect();
        let limits: Vec<_> =
            task.limits.iter().map(|limit| Limit { soft: limit.soft, hard: limit.hard }).collect();
        let mut timers = [Interval::default(); 3];
        for (timer, record) in timers.iter_mut().zip(&task.itimers) {
            *timer = interval(record);
        }
        // ITIMER_REAL stands still while its signal is pending, and goes on in its rhythm when that is taken: it fires again, and
        // the second signal of the number is dropped.
        if timers[0].value_sec == 0 && timers[0].value_usec == 0 && timers[0] != Interval::default() {
            timers[0].value_usec = 1;
        }
        let own = task.credentials.as_ref();
        let own = own.ok_or(BlobError::Incomplete { pid: task.pid, what: "credentials" })?;
        // Filters that all have are installed before there is a second thread, so that they are the very same ones.
        let live = task.threads.iter().skip(task.dead_leader.into());
        let all = live.map(|thread| &thread.credentials.as_ref().unwrap_or(own).seccomp_filters);
        let common = all.map(|other| same_outermost(other, &own.seccomp_filters)).min().unwrap_or(0);
        let (posix_timers, arm, pending) = timers::plan(task);
        let threads = task.threads.iter().enumerate().map(|(index, thread)| {
            let early = options.late_death_signals;
            self.thread(thread, own, common, early, pending.of_thread(index))
        });
        let threads: Vec<_> = threads.collect();
        if threads.is_empty() {
            return Err(BlobError::Incomplete { pid: task.pid, what: "threads" });
        }
        Ok(Arguments {
            status: 0,
            ready: AtomicU32::new(0),
            pid: task.pid,
            unmap: Table::new(0, 0),
            vdso: moves.vdso,
            maps: self.put(&moves.maps),
            moves: self.put(&moves.moves),
            copies: self.put(&copies),
            gaps: self.put(&moves.gaps),
            protects: self.put(&moves.protects),
            advices: self.put(&moves.advices),
            names: self.put(&names),
            locks: self.put(&moves.locks),
            seals: self.put(&moves.seals),
            lock_future: moves.lock_future.into(),
            layout,
            close: self.put(&options.close),
            actions: self.put(&actions),
            pending: self.pending(pending.of_process()),
            timers,
            limits: self.put(&limits),
            filters: self.filters(&own.seccomp_filters[own.seccomp_filters.len() - common..]),
            umask: task.umask,
            dumpable: task.dumpable,
            personality: task.personality,
            thp_disable: task.thp_disable,
            child_subreaper: task.child_subreaper.into(),
            mdwe: task.mdwe,
            memory_merge: task.memory_merge.into(),
            membarrier: task.membarrier,
            leader_exits: task.dead_leader.into(),
            leader_status: task.exit_status as u32,
            posix_timers: self.put(&posix_timers),
            arm: self.put(&arm),
            threads: self.put(&threads),
            stacks: 0,
            stack_size: 0,
        })
    }

    fn thread(
        &mut self,
        thread: &records::Thread,
        own: &records::Credentials,
        common: usize,
        late_death_signal: bool,
        pending: &[Vec<u8>],
    ) -> Thread {
        let credentials = thread.credentials.as_ref().unwrap_or(own);
        let filters = &credentials.seccomp_filters;
        let mut name = [0; 16];
        // The kernel keeps 15 bytes and a NUL.
        for (to, from) in name.iter_mut().take(15).zip(&thread.name) {
            *to = *from;
        }
        let words = thread.memory_nodes.as_chunks::<8>().0;
        let nodes: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        Thread {
            tid: thread.tid,
            policy: thread.sched_policy,
            priority: thread.sched_priority,
            nice: thread.nice,
            io_priority: thread.io_priority,
            parent_death_signal: if late_death_signal { 0 } else { thread.parent_death_signal },
            timer_slack: thread.timer_slack_ns,
            affinity: self.put(&thread.affinity),
            name,
            clear_child_tid: thread.clear_child_tid,
            robust_list: thread.robust_list,
            robust_list_len: thread.robust_list_len,
            rseq: thread.rseq_address,
            rseq_size: thread.rseq_size,
            rseq_signature: thread.rseq_signature,
            altstack_base: thread.altstack_base,
            altstack_flags: thread.altstack_flags.into(),
            altstack_size: thread.altstack_size,
            pending: self.pending(pending),
            filters: self.filters(&filters[..filters.len().saturating_sub(common)]),
            credentials: self.credentials(credentials),
            sched_flags: thread.sched_flags,
            deadline: [thread.deadline_runtime_ns, thread.deadline_ns, thread.deadline_period_ns],
            utilization: [thread.utilization_min, thread.utilization_max],
            tsc: thread.tsc,
            cpuid: thread.cpuid.map_or(UNKNOWN, u32::from),
            machine_check: thread.machine_check,
            io_flusher: thread.io_flusher.into(),
            speculation: std::array::from_fn(|at| thread.speculation.get(at).copied().unwrap_or(0)),
            memory_policy: thread.memory_policy,
            memory_nodes: self.put(&nodes),
        }
    }

    fn credentials(&mut self, record: &records::Credentials) -> Credentials {
        // Absent ids are not restored as root: the kernel takes u32::MAX for "leave it".
        let four = |ids: &[u32]| std::array::from_fn(|at| ids.get(at).copied().unwrap_or(u32::MAX));
        Credentials {
            uid: four(&record.uid),
            gid: four(&record.gid),
            groups: self.put(&record.groups),
            inheritable: record.cap_inheritable,
            permitted: record.cap_permitted,
            effective: record.cap_effective,
            bounding: record.cap_bounding,
            ambient: record.cap_ambient,
            securebits: record.securebits,
            keep_caps: record.keep_caps.into(),
            no_new_privs: record.no_new_privs.into(),
            seccomp_mode: record.seccomp_mode,
        }
    }

    /// The record has the innermost first, the restorer installs the outermost first.
    fn filters(&mut self, filters: &[SeccompFilter]) -> Table<Filter> {
        let filters: Vec<_> = filters
            .iter()
            .rev()
            .map(|filter| Filter {
                flags: filter.flags.into(),
                len: (filter.program.len() / INSTRUCTION) as u64,
                program: self.put(&filter.program).address,
            })
            .collect();
        self.put(&filters)
    }

    fn pending(&mut self, signals: &[Vec<u8>]) -> Table<SignalInfo> {
        let signals: Vec<_> =
            signals.iter().filter(|info| !is_trap(info)).map(|bytes| signal(bytes)).collect();
        self.put(&signals)
    }
}

/// The restorer's end is an int3, for which the kernel resets the action of SIGTRAP if it is to be ignored, and before which the
/// signal is let in: what the image has of it comes later.
pub const TRAP: usize = libc::SIGTRAP as usize;

/// Whether a signal is ignored.
pub fn is_ignored(action: &records::SignalAction) -> bool {
    action.handler == libc::SIG_IGN as u64
}

/// Whether a pending signal is a SIGTRAP.
pub fn is_trap(info: &[u8]) -> bool {
    info.first().is_some_and(|&number| usize::from(number) == TRAP)
}

/// How many filters two threads have in common, from the outermost on.
fn same_outermost(one: &[SeccompFilter], other: &[SeccompFilter]) -> usize {
    one.iter().rev().zip(other.iter().rev()).take_while(|(one, other)| one == other).count()
}

/// A `siginfo_t` of a record, padded.
fn signal(bytes: &[u8]) -> SignalInfo {
    let mut info = SignalInfo::default();
    for (at, byte) in bytes.iter().take(SIGNAL_INFO).enumerate() {
        info[at / 8] |= u64::from(*byte) << (at % 8 * 8);
    }
    info
}

fn interval(record: &records::IntervalTimer) -> Interval {
    const SECOND: u64 = 1_000_000;
    Interval {
        interval_sec: (record.interval_us / SECOND) as i64,
        interval_usec: (record.interval_us % SECOND) as i64,
        value_sec: (record.value_us / SECOND) as i64,
        value_usec: (record.value_us % SECOND) as i64,
    }
}
