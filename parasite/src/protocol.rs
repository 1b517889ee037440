//! What the guardian writes for the parasite, and reads back: plain C layout, shared by both as one file.

/// The command word of a call, at the start of every argument block.
pub mod command {
    /// Fill a [`super::ProcessQuery`].
    pub const PROCESS: u64 = 1;
    /// Fill a [`super::ThreadQuery`].
    pub const THREAD: u64 = 2;
    /// Fork a copy-on-write child that drops every descriptor and stops; a [`super::Simple`].
    pub const SNAPSHOT: u64 = 3;
    /// Make a socket pair; its ends are in `values`; a [`super::Simple`].
    pub const CHANNEL: u64 = 4;
    /// Take a descriptor from the channel, then close the channel; a [`super::Simple`].
    pub const RECEIVE: u64 = 5;
    /// Write pages to a file; a [`super::WritePages`].
    pub const WRITE_PAGES: u64 = 6;
    /// Read POSIX timers; a [`super::Timers`].
    pub const TIMERS: u64 = 7;
}

/// The stack a call needs; generous, since a probe below the mapping would kill the task.
pub const STACK: u64 = 16384;
/// Room for one thread's argument block and stack.
pub const THREAD_SLOT: u64 = 8192;

/// The number of the system call (there is none) that ends a call whose process ignores SIGTRAP.
pub const DONE: u64 = 0x7fff_5741;

/// What the parasite leaves in rax if it panicked.
pub const PANICKED: u64 = 0x5741_5349_5344_4541;

/// A call with up to four numbers in and out.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Simple {
    /// One of [`command`].
    pub command: u64,
    /// The result, or a negative errno.
    pub result: i64,
    /// Arguments and results.
    pub values: [i64; 4],
}

/// struct kernel_sigaction (rt_sigaction(2), arch/x86/include/uapi/asm/signal.h).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SignalAction {
    /// Address of the handler, or SIG_DFL (0) or SIG_IGN (1).
    pub handler: u64,
    /// `SA_*`.
    pub flags: u64,
    /// Where the handler returns to.
    pub restorer: u64,
    /// Signals blocked meanwhile.
    pub mask: u64,
}

/// struct itimerval (getitimer(2)).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IntervalTimer {
    /// Seconds of the interval.
    pub interval_seconds: i64,
    /// Microseconds of the interval.
    pub interval_microseconds: i64,
    /// Seconds until it fires.
    pub value_seconds: i64,
    /// Microseconds until it fires.
    pub value_microseconds: i64,
}

/// What only a process itself can be asked. Every `prctl` value is the answer or a negative errno.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ProcessQuery {
    /// [`command::PROCESS`].
    pub command: u64,
    /// 0, or the first negative errno that makes the answer useless.
    pub result: i64,
    /// For signals 1 to 64.
    pub actions: [SignalAction; 64],
    /// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
    pub timers: [IntervalTimer; 3],
    /// brk(0).
    pub brk: u64,
    /// PR_GET_DUMPABLE.
    pub dumpable: i64,
    /// PR_GET_CHILD_SUBREAPER.
    pub child_subreaper: i64,
    /// PR_GET_THP_DISABLE.
    pub thp_disable: i64,
    /// PR_GET_MDWE.
    pub mdwe: i64,
    /// PR_GET_MEMORY_MERGE.
    pub memory_merge: i64,
    /// MEMBARRIER_CMD_GET_REGISTRATIONS.
    pub membarrier: i64,
    /// `MCL_*` of mlockall(2) for mappings to come, or a negative errno.
    pub lock_future: i64,
}

/// What only a thread itself can be asked. Every `prctl` value is the answer or a negative errno.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ThreadQuery {
    /// [`command::THREAD`].
    pub command: u64,
    /// 0 or a negative errno.
    pub result: i64,
    /// sigaltstack(2): ss_sp.
    pub stack_pointer: u64,
    /// ss_flags.
    pub stack_flags: i64,
    /// ss_size.
    pub stack_size: u64,
    /// PR_GET_TID_ADDRESS: the clear_child_tid pointer.
    pub clear_child_tid: u64,
    /// PR_GET_PDEATHSIG.
    pub parent_death_signal: i64,
    /// PR_GET_TIMERSLACK, nanoseconds.
    pub timer_slack: i64,
    /// PR_GET_SECUREBITS.
    pub securebits: i64,
    /// PR_GET_KEEPCAPS.
    pub keep_capabilities: i64,
    /// PR_GET_NO_NEW_PRIVS.
    pub no_new_privileges: i64,
    /// PR_GET_TSC.
    pub tsc: i64,
    /// ARCH_GET_CPUID: 1 if the instruction is allowed.
    pub cpuid: i64,
    /// PR_MCE_KILL_GET.
    pub machine_check_policy: i64,
    /// PR_GET_IO_FLUSHER.
    pub io_flusher: i64,
    /// PR_GET_SPECULATION_CTRL of PR_SPEC_STORE_BYPASS, PR_SPEC_INDIRECT_BRANCH, PR_SPEC_L1D_FLUSH.
    pub speculation: [i64; 3],
    /// get_mempolicy(2): the mode with its flags, or a negative errno.
    pub memory_policy: i64,
    /// The nodes of the policy.
    pub memory_nodes: [u64; 16],
    /// KEYCTL_GET_KEYRING_ID of the thread's and the process' keyring, or a negative errno.
    pub keyrings: [i64; 2],
}

/// How many POSIX timers one call reads.
pub const TIMERS_AT_ONCE: usize = 64;

/// One timer: its number in, the rest out (timer_gettime(2), timer_getoverrun(2)).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Timer {
    /// timer_t.
    pub id: i64,
    /// 0 or a negative errno.
    pub result: i64,
    /// it_interval: seconds, nanoseconds.
    pub interval: [i64; 2],
    /// it_value: seconds, nanoseconds.
    pub value: [i64; 2],
    /// Expirations that the last signal stands for besides its own.
    pub overrun: i64,
}

/// Several timers.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Timers {
    /// [`command::TIMERS`].
    pub command: u64,
    /// 0.
    pub result: i64,
    /// How many of `timers` count.
    pub count: u64,
    /// Numbers in, values out.
    pub timers: [Timer; TIMERS_AT_ONCE],
}

/// Pages to write: whole pages, unless the flag says otherwise searched for zeros.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Range {
    /// First address; a multiple of the page size.
    pub address: u64,
    /// Bytes; a multiple of the page size.
    pub len: u64,
    /// Bit 0 ([`RAW`]): write without looking for zero pages.
    pub flags: u64,
}

/// [`Range::flags`]: no search for zero pages (huge pages).
pub const RAW: u64 = 1;

/// A run of zero pages that was not written.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ZeroRun {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// How many ranges one call takes.
pub const RANGES_AT_ONCE: usize = 1024;
/// How many zero runs one call reports before it returns early.
pub const ZEROS_AT_ONCE: usize = 2048;
/// Bytes per call, so that a call never runs for long.
pub const BYTES_AT_ONCE: u64 = 64 << 20;

/// A write of pages. On return `position` tells where to go on: the range and the address in it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct WritePages {
    /// [`command::WRITE_PAGES`].
    pub command: u64,
    /// 0, or the negative errno that ended it; the other answers hold in any case.
    pub result: i64,
    /// The file, as a descriptor of the task.
    pub fd: i64,
    /// Where in the file to go on. Every page of the ranges has its place there; zero pages leave holes.
    pub offset: u64,
    /// Out: bytes from `offset` on that hold what precedes `next_range` and `next_offset`.
    pub written: u64,
    /// Number of ranges.
    pub ranges: u64,
    /// In and out: the first range that is not finished; `ranges` if all are.
    pub next_range: u64,
    /// In and out: bytes of that range which are done with.
    pub next_offset: u64,
    /// Out: how many `zero` entries count.
    pub zeros: u64,
    /// The ranges.
    pub range: [Range; RANGES_AT_ONCE],
    /// The runs of zero pages found.
    pub zero: [ZeroRun; ZEROS_AT_ONCE],
    /// Scratch: the vectors given to pwritev(2).
    pub vector: [ZeroRun; 1024],
}
