//! What the guardian reports.

use crate::{inject::InjectError, ptrace};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::{borrow::Cow, path::PathBuf};

/// Why a task did not stop in time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NotStopping {
    /// It waits for a vfork(2) child that has not yet called execve(2) or _exit(2).
    Vfork,
    /// It is inside the kernel and cannot be interrupted.
    Uninterruptible {
        /// The system call, if one can be told.
        syscall: Option<u64>,
    },
    /// New threads or children appeared faster than they could be stopped, or something else.
    Busy {
        /// Its state letter (proc_pid_stat(5)).
        state: char,
    },
}

impl std::fmt::Display for NotStopping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vfork => f.write_str("it waits for a vfork child that has not yet executed a program"),
            Self::Uninterruptible { syscall: Some(number) } => {
                write!(f, "it is in an uninterruptible wait in system call {number}")
            }
            Self::Uninterruptible { syscall: None } => f.write_str("it is in an uninterruptible wait"),
            Self::Busy { state } => write!(f, "it is in state {state}"),
        }
    }
}

/// A request to the guardian failed. Sent between processes, hence errno as a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum GuardianError {
    /// A task could not be handled.
    #[error(transparent)]
    Ptrace(#[from] ptrace::Error),
    /// Code inside a task went wrong.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// The guardian could not be started or reached.
    #[error("guardian: {operation}: {}", Errno::from_raw(*errno))]
    Channel {
        /// What was tried.
        operation: Cow<'static, str>,
        /// Why.
        errno: i32,
    },
    /// The guardian has ended.
    #[error("the guardian process has ended unexpectedly")]
    Ended,
    /// A message that cannot be understood.
    #[error("the guardian and the command do not understand each other: unexpected {what}")]
    Malformed {
        /// What was read.
        what: Cow<'static, str>,
    },
    /// A task did not stop.
    #[error("thread {tid} of task {pid} ({name}) did not stop in time: {why}; try a longer --timeout")]
    NotStopping {
        /// Process.
        pid: i32,
        /// Thread.
        tid: i32,
        /// Its name.
        name: String,
        /// Why.
        why: NotStopping,
    },
    /// The command went away in the middle; nobody reads this.
    #[error("the command has ended")]
    CommandEnded,
    /// No such task in the tree.
    #[error("task {pid} does not belong to the tree that was seized")]
    Unknown {
        /// Process.
        pid: i32,
    },
    /// The cgroup could not be frozen or thawed.
    #[error("{operation} cgroup {}: {}", path.display(), Errno::from_raw(*errno))]
    Cgroup {
        /// "freezing", "thawing".
        operation: Cow<'static, str>,
        /// Directory.
        path: PathBuf,
        /// Why.
        errno: i32,
    },
    /// No hard link can be made for a file that is unlinked under one of its names.
    #[error("cannot make the hard link {name} for an unlinked file: {} (--link-remap needs a writable directory)", Errno::from_raw(*errno))]
    Link {
        /// The link.
        name: String,
        /// Why.
        errno: i32,
    },
    /// Tasks that were killed are still there.
    #[error("task {pid} ({name}) was killed but has not gone away")]
    NotGone {
        /// Process.
        pid: i32,
        /// Its name.
        name: String,
    },
    /// A restored task ended before its time.
    #[error("restored task {pid} ended before the restore was complete: {exit}")]
    RestoredTaskDied {
        /// Process, in the innermost pid namespace.
        pid: i32,
        /// How.
        exit: ptrace::Exit,
    },
    /// Not all restored threads have arrived in time.
    #[error("only {arrived} of {expected} restored threads were ready in time")]
    NotArrived {
        /// How many have.
        arrived: usize,
        /// How many should have.
        expected: usize,
    },
    /// A thread of the image is not among those that arrived.
    #[error("thread {tid} of restored task {pid} is not there, or its number is used by two of them")]
    NoSuchThread {
        /// Process, in the innermost pid namespace.
        pid: i32,
        /// Thread, in the innermost pid namespace.
        tid: i32,
    },
    /// The registers in the image are no registers.
    #[error("state of thread {tid} of restored task {pid} is malformed: {what}")]
    BadState {
        /// Process.
        pid: i32,
        /// Thread.
        tid: i32,
        /// What.
        what: Cow<'static, str>,
    },
}

impl GuardianError {
    /// A failed system call about the channel or the guardian itself.
    pub fn channel(operation: &'static str, errno: Errno) -> Self {
        Self::Channel { operation: Cow::Borrowed(operation), errno: errno as i32 }
    }

    /// Whether the kernel refused a system call that a task was made to make; the task itself is as it was.
    pub fn is_refused_call(&self) -> bool {
        matches!(self, Self::Inject(InjectError::Syscall { .. }))
    }
}
