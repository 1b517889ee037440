//! What the command and the guardian tell each other: serde + postcard, descriptors beside (see `channel`).

use super::GuardianError;
use crate::{
    arch::Registers,
    ptrace::{Exit, Rseq, SeccompFilter},
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Visitor};
use std::{fmt, ops::Deref, path::PathBuf};

/// Bytes that are copied whole, not element by element.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Copy;
        impl Visitor<'_> for Copy {
            type Value = Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }
        }
        deserializer.deserialize_bytes(Copy)
    }
}

/// A process that was seized.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeizedTask {
    /// Process.
    pub pid: i32,
    /// Its live threads, the leader first unless it is dead.
    pub tids: Vec<i32>,
    /// The signal of the group stop in which it was.
    pub group_stop: Option<i32>,
    /// It is dead, not reaped: nothing was stopped.
    pub zombie: bool,
}

/// A system call that was sleeping with a relative timeout and must go on with what remains of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restart {
    /// Its number.
    pub syscall: u64,
    /// The clock that measures it.
    pub clock: i32,
    /// Nanoseconds that remained when it was looked at; `None` if that cannot be found out, and the call starts its whole timeout
    /// again.
    pub remaining_ns: Option<i64>,
}

/// What ptrace tells of a stopped thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadState {
    /// Process.
    pub pid: i32,
    /// Thread.
    pub tid: i32,
    /// General registers; a wait that our stop interrupted is rewound.
    pub registers: Registers,
    /// NT_X86_XSTATE, whole.
    pub xstate: Bytes,
    /// Blocked signals.
    pub signal_mask: u64,
    /// Registered rseq area.
    pub rseq: Option<Rseq>,
    /// Robust futex list: head, length.
    pub robust_list: (u64, u64),
    /// Pending signals of this thread, each a siginfo_t.
    pub pending: Vec<Bytes>,
    /// Seccomp filters, the one installed last first.
    pub seccomp_filters: Vec<SeccompFilter>,
    /// An interrupted sleep.
    pub restart: Option<Restart>,
}

/// What ptrace tells of a stopped process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectedTask {
    /// Process.
    pub pid: i32,
    /// Pending signals of the process, each a siginfo_t.
    pub shared_pending: Vec<Bytes>,
    /// Its threads, the leader first unless it is dead.
    pub threads: Vec<ThreadState>,
}

/// rt_sigaction(2) of one signal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalAction {
    /// Handler, SIG_DFL (0) or SIG_IGN (1).
    pub handler: u64,
    /// SA_*.
    pub flags: u64,
    /// sa_restorer.
    pub restorer: u64,
    /// Signals blocked meanwhile.
    pub mask: u64,
}

/// An interval timer of getitimer(2), in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntervalTimer {
    /// Interval.
    pub interval_us: i64,
    /// Until it fires; 0: off.
    pub value_us: i64,
}

/// A POSIX timer of timer_gettime(2), in nanoseconds. What it does when it fires is in /proc/PID/timers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// timer_t.
    pub id: i64,
    /// Interval.
    pub interval_ns: i64,
    /// Until it fires; 0: off.
    pub value_ns: i64,
    /// timer_getoverrun(2).
    pub overrun: i64,
    /// Whose CPU time it measures, if that is the time of one of several threads and can be found out.
    pub owner: Option<i32>,
}

/// Pending signals, each a siginfo_t.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingSignals {
    /// Of the process.
    pub shared: Vec<Bytes>,
    /// Of each thread.
    pub threads: Vec<(i32, Vec<Bytes>)>,
}

/// What only a process itself can tell. `prctl` values are the answer or a negative errno.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessState {
    /// Process.
    pub pid: i32,
    /// Signals 1 to 64.
    pub actions: Vec<SignalAction>,
    /// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
    pub itimers: [IntervalTimer; 3],
    /// POSIX timers.
    pub posix_timers: Vec<PosixTimer>,
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
    /// `MCL_*` of mlockall(2) for mappings to come.
    pub lock_future: i64,
    /// Pending signals of the moment when the timers were read; none if there is no timer.
    pub pending: Option<PendingSignals>,
    /// Its threads.
    pub threads: Vec<ThreadDetails>,
}

/// What only a thread itself can tell. `prctl` values are the answer or a negative errno.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadDetails {
    /// Thread.
    pub tid: i32,
    /// sigaltstack(2): ss_sp.
    pub stack_pointer: u64,
    /// ss_flags.
    pub stack_flags: i64,
    /// ss_size.
    pub stack_size: u64,
    /// set_tid_address(2).
    pub clear_child_tid: u64,
    /// PR_GET_PDEATHSIG.
    pub parent_death_signal: i64,
    /// PR_GET_TIMERSLACK.
    pub timer_slack_ns: i64,
    /// PR_GET_SECUREBITS.
    pub securebits: i64,
    /// PR_GET_KEEPCAPS.
    pub keep_capabilities: i64,
    /// PR_GET_NO_NEW_PRIVS.
    pub no_new_privileges: i64,
    /// PR_GET_TSC.
    pub tsc: i64,
    /// ARCH_GET_CPUID.
    pub cpuid: i64,
    /// PR_MCE_KILL_GET.
    pub machine_check_policy: i64,
    /// PR_GET_IO_FLUSHER.
    pub io_flusher: i64,
    /// PR_GET_SPECULATION_CTRL: store bypass, indirect branch, L1D flush.
    pub speculation: [i64; 3],
    /// get_mempolicy(2): mode with flags.
    pub memory_policy: i64,
    /// Its nodes.
    pub memory_nodes: [u64; 16],
    /// Serial numbers of the thread's and the process' keyring (keyctl(2)).
    pub keyrings: [i64; 2],
}

/// Pages of a task to write to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRange {
    /// First address; a multiple of the page size.
    pub address: u64,
    /// Bytes; a multiple of the page size.
    pub len: u64,
    /// Write all without a search for zero pages (huge pages).
    pub raw: bool,
}

/// A write of pages; its shard travels beside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteOrder {
    /// A task of the tree, or a snapshot's child.
    pub pid: i32,
    /// Where in the shard to begin.
    pub offset: u64,
    /// What to write, in this order.
    pub ranges: Vec<PageRange>,
}

/// What a write of pages did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// As in the order.
    pub pid: i32,
    /// Bytes of the shard from the order's offset on that are accounted for. Every page of the ranges has its place there; zero
    /// pages leave holes, and those at the very end are not there at all.
    pub bytes: u64,
    /// Runs of zero pages that were not written: address, length; ascending within each range.
    pub zeros: Vec<(u64, u64)>,
    /// Why it ended early; what was done before is good: all up to `stopped_at`.
    pub error: Option<GuardianError>,
    /// Range and offset in it up to which everything is written or in `zeros`; (number of ranges, 0) if all is done.
    pub stopped_at: (usize, u64),
}

/// Something to do with a descriptor before the tree runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum UndoStep {
    /// setsockopt(2).
    SetOption {
        /// Level.
        level: i32,
        /// Number.
        name: i32,
        /// Value.
        value: Bytes,
    },
    /// write(2).
    Write(Bytes),
    /// unlinkat(2) with AT_REMOVEDIR, tried again while it is busy.
    RemoveDirectory(String),
    /// write(2), when the tree was killed.
    WriteWhenKilled(Bytes),
    /// A system call that takes numbers only.
    Syscall {
        /// Number.
        number: i64,
        /// Arguments.
        arguments: [u64; 6],
    },
}

impl From<&stasis_plugin_api::UndoStep> for UndoStep {
    fn from(step: &stasis_plugin_api::UndoStep) -> Self {
        use stasis_plugin_api::UndoStep as Wanted;
        match step {
            Wanted::SetOption { level, name, value } => {
                Self::SetOption { level: *level, name: *name, value: Bytes(value.to_vec()) }
            }
            Wanted::Write(data) => Self::Write(Bytes(data.to_vec())),
            Wanted::RemoveDirectory(name) => Self::RemoveDirectory(name.to_string()),
            Wanted::WriteWhenKilled(data) => Self::WriteWhenKilled(Bytes(data.to_vec())),
            Wanted::Syscall { number, arguments } => Self::Syscall { number: *number, arguments: *arguments },
        }
    }
}

/// How a dump ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The tree runs on as if nothing had been.
    Run,
    /// The tree is left in a group stop by SIGSTOP.
    Stopped,
    /// The tree is killed, and gone.
    Kill,
}

/// A thread of a restored task, ready to run. Numbers are those of the innermost pid namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinalThread {
    /// Thread.
    pub tid: i32,
    /// General registers, as [`Registers::to_bytes`] writes them.
    pub registers: Bytes,
    /// NT_X86_XSTATE.
    pub xstate: Bytes,
    /// Blocked signals.
    pub signal_mask: u64,
    /// An interrupted sleep.
    pub restart: Option<Restart>,
    /// System calls that the thread makes when its restorer is gone.
    pub late: Vec<LateCall>,
}

/// A system call that cannot be made earlier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LateCall {
    /// For messages.
    pub name: String,
    /// Number.
    pub number: u64,
    /// Arguments.
    pub arguments: [u64; 6],
    /// What one argument points to, if any: at most 128 bytes.
    pub data: Bytes,
    /// Which.
    pub pointer: usize,
}

/// Code of the restorer to run last: it arms the timers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArmTimers {
    /// Its entry.
    pub entry: u64,
    /// Its arguments.
    pub arguments: u64,
    /// Top of its stack.
    pub stack: u64,
}

/// A restored task, ready to run. Numbers are those of the innermost pid namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinalTask {
    /// Process.
    pub pid: i32,
    /// Address and length of what must be unmapped last (the restorer); the first must be writable somewhere if a thread has a `restart`.
    pub unmap: Vec<(u64, u64)>,
    /// Timers to arm, as late as can be.
    pub arm: Option<ArmTimers>,
    /// 128 writable bytes per thread that outlive the restorer's int3 and lie in `unmap`: needed for `restart` and `late` only.
    pub scratch: u64,
    /// The signal of the group stop in which it is to be.
    pub group_stop: Option<i32>,
    /// Its threads.
    pub threads: Vec<FinalThread>,
}

/// Something that happened in a tree that is being restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskDied {
    /// Thread, in our pid namespace.
    pub tid: i32,
    /// Thread, in the innermost pid namespace.
    pub inner_tid: i32,
    /// How.
    pub exit: Exit,
}

/// From the command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// See [`super::Guardian::seize`].
    Seize {
        /// Root of the tree.
        root: i32,
        /// Milliseconds.
        timeout_ms: u64,
        /// Directory of the cgroup to freeze meanwhile.
        freeze_cgroup: Option<PathBuf>,
        /// The command's pid.
        command: i32,
    },
    /// See [`super::Guardian::collect`].
    Collect,
    /// See [`super::Guardian::inspect`].
    Inspect(Vec<i32>),
    /// See [`super::Guardian::syscall`].
    Syscall {
        /// Process.
        pid: i32,
        /// Number.
        number: u64,
        /// Arguments.
        arguments: [u64; 6],
    },
    /// See [`super::Guardian::undo`]; the descriptor travels beside.
    Undo(Vec<UndoStep>),
    /// See [`super::Guardian::start_write`].
    StartWrite(Vec<WriteOrder>),
    /// See [`super::Guardian::finish_write`].
    FinishWrite,
    /// See [`super::Guardian::snapshot`].
    Snapshot(Vec<i32>),
    /// See [`super::Guardian::resume_originals`].
    ResumeOriginals,
    /// See [`super::Guardian::reap_snapshots`].
    ReapSnapshots,
    /// See [`super::Guardian::link`]; the file and the directory come along.
    Link {
        /// Name of the link.
        name: String,
    },
    /// See [`super::Guardian::keep_links`].
    KeepLinks,
    /// See [`super::Guardian::finish`].
    Finish(Outcome),
    /// See [`super::Guardian::adopt`].
    Adopt {
        /// Root of the tree.
        root: i32,
        /// The command's pid.
        command: i32,
    },
    /// See [`super::Guardian::wait_arrived`].
    WaitArrived {
        /// Threads.
        expected: usize,
        /// Milliseconds.
        timeout_ms: u64,
    },
    /// See [`super::Guardian::finalize`].
    Finalize(Vec<FinalTask>),
    /// See [`super::Guardian::release`].
    Release,
    /// See [`super::Guardian::abort`].
    Abort,
}

/// Answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// Nothing to tell.
    Done,
    /// To `Seize`.
    Seized(Vec<SeizedTask>),
    /// To `Collect`.
    Collected(Vec<CollectedTask>),
    /// To `Inspect`.
    Inspected(Vec<ProcessState>),
    /// To `Syscall`.
    Result(i64),
    /// To `FinishWrite`.
    Written(Vec<Written>),
    /// To `Snapshot`: original and copy.
    Snapshots(Vec<(i32, i32)>),
}

/// To the command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToCommand {
    /// The answer to the request.
    Reply(Result<Reply, GuardianError>),
    /// Something happened on its own.
    Died(TaskDied),
}
