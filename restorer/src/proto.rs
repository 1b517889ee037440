//! What core tells the restorer: plain `repr(C)` data in the blob's own memory.
//!
//! Shared by `#[path]` with core, so it uses `core` alone. Addresses are `u64`: they are addresses of the task that
//! is being restored, and tables are found by (address, length).

use core::marker::PhantomData;
use core::sync::atomic::AtomicU32;

/// Value of `rax` with which a thread arrives at its trap when all went well.
pub const ARRIVED: u64 = 0x57_A515;

/// A table in the blob's memory.
#[repr(C)]
#[derive(Debug)]
pub struct Table<T> {
    /// Address of the first entry.
    pub address: u64,
    /// Number of entries.
    pub len: u64,
    entry: PhantomData<T>,
}

// Core makes tables and reads steps; the restorer, which shares this file, does not.
#[allow(dead_code)]
impl<T> Table<T> {
    /// A table of `len` entries at `address`.
    pub const fn new(address: u64, len: u64) -> Self {
        Self { address, len, entry: PhantomData }
    }
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Table<T> {}

/// A range of addresses, page aligned.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// An anonymous mapping without contents, made at home.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    /// Where.
    pub span: Span,
    /// `PROT_*`.
    pub prot: u32,
    /// `MAP_*` besides `MAP_FIXED`.
    pub flags: u32,
}

/// A mapping that is moved from its arena to its home by mremap(2).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Address in the arena.
    pub from: u64,
    /// Address at home.
    pub to: u64,
    /// Bytes.
    pub len: u64,
}

/// Bytes for a mapping that is made at home.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Address at home.
    pub to: u64,
    /// Address of the bytes, in the blob's memory.
    pub from: u64,
    /// How many.
    pub len: u64,
}

/// One call of mprotect(2) (`value` is `PROT_*`), madvise(2) (`MADV_*`) or mlock2(2) (`MLOCK_*`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Where.
    pub span: Span,
    /// What to set.
    pub value: u32,
    /// `ENOMEM` is fine: mlock2(2) of a mapping without access marks it and then cannot populate it.
    pub tolerate: u32,
}

/// Name of an anonymous mapping (prctl(2), PR_SET_VMA_ANON_NAME).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Name {
    /// Where.
    pub span: Span,
    /// Address of the NUL-terminated name.
    pub name: u64,
}

/// `struct prctl_mm_map` of `linux/prctl.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Layout {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    pub auxv: u64,
    pub auxv_size: u32,
    pub exe_fd: u32,
}

/// The kernel's `struct sigaction` on x86_64.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Action {
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

/// `siginfo_t` as the kernel passes it.
pub type SignalInfo = [u64; 16];

/// `struct itimerval`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Interval {
    pub interval_sec: i64,
    pub interval_usec: i64,
    pub value_sec: i64,
    pub value_usec: i64,
}

/// `struct rlimit64`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Limit {
    pub soft: u64,
    pub hard: u64,
}

/// One seccomp filter; `program` counts instructions of 8 bytes, so it doubles as a `struct sock_fprog`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Filter {
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u64,
    /// Instructions.
    pub len: u64,
    /// Address of the program.
    pub program: u64,
}

/// Credentials of a thread (credentials(7), capabilities(7)).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Credentials {
    /// Real, effective, saved, file system user id.
    pub uid: [u32; 4],
    /// The same for groups.
    pub gid: [u32; 4],
    /// Supplementary groups.
    pub groups: Table<u32>,
    /// Capability sets.
    pub inheritable: u64,
    /// Permitted set.
    pub permitted: u64,
    /// Effective set.
    pub effective: u64,
    /// Bounding set.
    pub bounding: u64,
    /// Ambient set.
    pub ambient: u64,
    /// `SECBIT_*`.
    pub securebits: u32,
    /// PR_SET_KEEPCAPS.
    pub keep_caps: u32,
    /// PR_SET_NO_NEW_PRIVS.
    pub no_new_privs: u32,
    /// `SECCOMP_MODE_STRICT` (1) is entered last.
    pub seccomp_mode: u32,
}

/// One thread; the leader is the first of the table.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Thread {
    /// Thread id in the innermost pid namespace.
    pub tid: i32,
    /// `SCHED_*`, with `SCHED_RESET_ON_FORK` where it was set.
    pub policy: u32,
    /// Static priority of a real-time policy.
    pub priority: u32,
    /// Nice value.
    pub nice: i32,
    /// `ioprio_set(2)`; 0: none set.
    pub io_priority: u32,
    /// Signal that the death of the parent sends, or 0.
    pub parent_death_signal: u32,
    /// Timer slack; 0 for real-time policies, which have none.
    pub timer_slack: u64,
    /// Affinity mask.
    pub affinity: Table<u8>,
    /// Name, NUL padded.
    pub name: [u8; 16],
    /// `set_tid_address(2)`.
    pub clear_child_tid: u64,
    /// `set_robust_list(2)`.
    pub robust_list: u64,
    /// Its length; 0: none.
    pub robust_list_len: u64,
    /// rseq(2); 0: not registered.
    pub rseq: u64,
    /// Its size.
    pub rseq_size: u32,
    /// Its signature.
    pub rseq_signature: u32,
    /// `stack_t`.
    pub altstack_base: u64,
    /// Its flags.
    pub altstack_flags: u64,
    /// Its size.
    pub altstack_size: u64,
    /// Pending signals of this thread.
    pub pending: Table<SignalInfo>,
    /// Filters of this thread alone, outermost (first installed) first.
    pub filters: Table<Filter>,
    /// Credentials.
    pub credentials: Credentials,
    /// `SCHED_FLAG_*` besides the reset on fork.
    pub sched_flags: u64,
    /// SCHED_DEADLINE: runtime, deadline, period.
    pub deadline: [u64; 3],
    /// Utilization clamps.
    pub utilization: [u32; 2],
    /// PR_SET_TSC; 0: not known.
    pub tsc: u32,
    /// ARCH_SET_CPUID; 2: not known.
    pub cpuid: u32,
    /// PR_MCE_KILL_*.
    pub machine_check: u32,
    /// PR_SET_IO_FLUSHER.
    pub io_flusher: u32,
    /// PR_SET_SPECULATION_CTRL of store bypass, indirect branch, L1D flush.
    pub speculation: [u32; 3],
    /// set_mempolicy(2): mode with flags.
    pub memory_policy: u32,
    /// Its nodes, 64-bit words.
    pub memory_nodes: Table<u64>,
}

/// A POSIX timer (timer_create(2)).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PosixTimer {
    /// timer_t.
    pub id: i32,
    /// Clock.
    pub clock: i32,
    /// `struct sigevent`: value, signal and notification, thread.
    pub event: SignalEvent,
    /// Interval: seconds, nanoseconds.
    pub interval: [i64; 2],
    /// Until it fires: seconds, nanoseconds; 0: unarmed.
    pub value: [i64; 2],
    /// Not 0: its signal is pending, and is to be sent by the timer itself when it is armed.
    pub fire: u64,
}

/// `struct sigevent` (sigevent(3type)), 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SignalEvent {
    /// sigev_value.
    pub value: u64,
    /// sigev_signo.
    pub signal: i32,
    /// sigev_notify.
    pub notify: i32,
    /// sigev_notify_thread_id.
    pub tid: i32,
    /// Up to its size.
    pub rest: [i32; 11],
}

/// All that the restorer is told.
#[repr(C)]
#[derive(Debug)]
pub struct Arguments {
    /// Address of the [`Status`] of this task, in the blob's region.
    pub status: u64,
    /// Threads that have all but their trap behind them.
    pub ready: AtomicU32,
    /// Process id in the innermost pid namespace.
    pub pid: i32,
    /// Ranges to unmap before anything is moved home.
    pub unmap: Table<Span>,
    /// Where the first of vvar and vdso was; 0: there was none.
    pub vdso: u64,
    /// Mappings made at home.
    pub maps: Table<Map>,
    /// Mappings moved home.
    pub moves: Table<Move>,
    /// Contents of mappings made at home.
    pub copies: Table<Copied>,
    /// Ranges to unmap when all is home: gaps in what was mapped or moved as one.
    pub gaps: Table<Span>,
    /// Final protections.
    pub protects: Table<Setting>,
    /// Advice.
    pub advices: Table<Setting>,
    /// Names.
    pub names: Table<Name>,
    /// Locked memory.
    pub locks: Table<Setting>,
    /// `MCL_*` of mlockall(2) for mappings to come.
    pub lock_future: u64,
    /// Sealed memory (mseal(2)).
    pub seals: Table<Span>,
    /// Layout of the memory map.
    pub layout: Layout,
    /// Service descriptors that are closed at the end.
    pub close: Table<i32>,
    /// Signal actions, in order of signal number from 1.
    pub actions: Table<Action>,
    /// Pending signals of the process.
    pub pending: Table<SignalInfo>,
    /// ITIMER_REAL, VIRTUAL, PROF.
    pub timers: [Interval; 3],
    /// Limits in order of `RLIMIT_*`.
    pub limits: Table<Limit>,
    /// Filters that all threads have, outermost first: installed before the threads are made, so that they share them.
    pub filters: Table<Filter>,
    /// umask(2).
    pub umask: u32,
    /// PR_SET_DUMPABLE.
    pub dumpable: u32,
    /// personality(2).
    pub personality: u32,
    /// PR_SET_THP_DISABLE.
    pub thp_disable: u32,
    /// PR_SET_CHILD_SUBREAPER.
    pub child_subreaper: u32,
    /// PR_SET_MDWE.
    pub mdwe: u32,
    /// PR_SET_MEMORY_MERGE.
    pub memory_merge: u32,
    /// MEMBARRIER_CMD_GET_REGISTRATIONS.
    pub membarrier: u32,
    /// Not 0: the leader exits when it has made the others, with this status.
    pub leader_exits: u32,
    /// Its status, as in wait(2).
    pub leader_status: u32,
    /// POSIX timers, in the order in which they are to be made.
    pub posix_timers: Table<PosixTimer>,
    /// Those to arm, as indexes of that table, in this order.
    pub arm: Table<u64>,
    /// Threads, the leader first.
    pub threads: Table<Thread>,
    /// Stacks of the other threads.
    pub stacks: u64,
    /// Bytes of each.
    pub stack_size: u64,
}

/// Where a task says what failed. Zero while all is well.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Status {
    /// A [`Step`].
    pub step: AtomicU32,
    /// errno of the call.
    pub errno: AtomicU32,
    /// Entry of the table that the step works on, or the value it could not set.
    pub index: AtomicU32,
    /// Thread in whose name it failed.
    pub tid: AtomicU32,
}

macro_rules! steps {
    ($($name:ident = $number:literal, $text:literal;)*) => {
        /// What the restorer was doing.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Step { $(#[doc = $text] $name = $number,)* }

        #[allow(dead_code)]
        impl Step {
            /// The step of a number in a [`Status`].
            pub const fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }

            /// What it does, for messages.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

steps! {
    Unmap = 1, "unmapping the memory of the restoring process";
    Vdso = 2, "mapping the vdso at its old address";
    Map = 3, "mapping memory at home";
    Move = 4, "moving memory home";
    Protect = 5, "setting the protection of memory";
    Advise = 6, "setting the advice of memory";
    NameMemory = 7, "naming memory";
    Lock = 8, "locking memory";
    Layout = 9, "setting the layout of the memory map and the executable";
    Personality = 10, "setting the personality";
    ThpDisable = 11, "setting whether transparent huge pages are disabled";
    Subreaper = 12, "setting the child subreaper attribute";
    Action = 13, "setting a signal action";
    Seccomp = 14, "installing a seccomp filter";
    Clone = 15, "making a thread";
    Rseq = 16, "registering restartable sequences";
    RobustList = 17, "setting the robust futex list";
    AltStack = 18, "setting the alternate signal stack";
    ThreadName = 19, "setting the name of a thread";
    Scheduling = 20, "setting the scheduling policy";
    Nice = 21, "setting the nice value";
    Affinity = 22, "setting the CPU affinity";
    IoPriority = 23, "setting the I/O priority";
    TimerSlack = 24, "setting the timer slack";
    Pending = 25, "queueing a pending signal";
    Groups = 26, "setting the groups";
    UserIds = 27, "setting the user and group ids";
    Capabilities = 28, "setting the capabilities";
    Ambient = 29, "setting the ambient capabilities";
    Bounding = 30, "setting the capability bounding set";
    SecureBits = 31, "setting the securebits";
    NoNewPrivs = 32, "setting no_new_privs";
    ParentDeath = 33, "setting the parent death signal";
    Dumpable = 34, "setting whether the process is dumpable";
    Limit = 35, "setting a resource limit";
    Timer = 36, "arming an interval timer";
    Close = 37, "closing a service descriptor";
    Panic = 38, "an internal check of the restorer";
    CreateTimer = 39, "making a POSIX timer";
    ArmTimer = 40, "arming a POSIX timer";
    Mdwe = 41, "setting memory-deny-write-execute";
    MemoryMerge = 42, "setting whether memory is merged";
    Membarrier = 43, "registering for membarrier";
    TimeStamps = 44, "setting whether time stamps may be read (PR_SET_TSC)";
    CpuId = 45, "setting whether CPUID faults";
    MachineCheck = 46, "setting the machine check policy";
    IoFlusher = 47, "setting the I/O flusher attribute";
    Speculation = 48, "setting speculation control";
    MemoryPolicy = 49, "setting the NUMA memory policy";
    Seal = 50, "sealing memory (mseal)";
}
