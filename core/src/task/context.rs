//! What only ptrace and injected code can tell of tasks.

use crate::{
    guardian::protocol::{PosixTimer, ThreadDetails},
    image::records::{IntervalTimer, Restart, SeccompFilter, SignalAction},
};

/// Of a thread.
#[derive(Debug, Clone, Default)]
pub struct ThreadContext {
    /// Thread id, as stasis sees it.
    pub tid: i32,
    /// struct user_regs_struct.
    pub registers: Vec<u8>,
    /// NT_X86_XSTATE.
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub signal_mask: u64,
    /// Robust futex list: head, length.
    pub robust_list: (u64, u64),
    /// rseq registration: address, size, signature.
    pub rseq: Option<(u64, u32, u32)>,
    /// Private pending signals, as siginfo_t.
    pub pending: Vec<Vec<u8>>,
    /// A relative sleep to go on with.
    pub restart: Option<Restart>,
    /// Seccomp filters, innermost first.
    pub seccomp_filters: Vec<SeccompFilter>,
    /// What it said itself.
    pub details: Option<ThreadDetails>,
}

/// Of a process.
#[derive(Debug, Clone, Default)]
pub struct ProcessContext {
    /// rt_sigaction of signals 1 to 64.
    pub actions: Vec<SignalAction>,
    /// ITIMER_REAL, VIRTUAL, PROF.
    pub itimers: Vec<IntervalTimer>,
    /// Times of POSIX timers.
    pub posix_timers: Vec<PosixTimer>,
    /// brk(0).
    pub brk: u64,
    /// PR_GET_DUMPABLE.
    pub dumpable: u32,
    /// PR_GET_THP_DISABLE.
    pub thp_disable: u32,
    /// PR_GET_MDWE.
    pub mdwe: u32,
    /// PR_GET_MEMORY_MERGE.
    pub memory_merge: bool,
    /// MEMBARRIER_CMD_GET_REGISTRATIONS.
    pub membarrier: u32,
    /// `MCL_*` of mlockall(2) for mappings to come.
    pub lock_future: u32,
    /// PR_GET_CHILD_SUBREAPER.
    pub child_subreaper: bool,
    /// Shared pending signals, as siginfo_t.
    pub pending: Vec<Vec<u8>>,
    /// Threads, leader first unless it is dead.
    pub threads: Vec<ThreadContext>,
}
