//! What can go wrong with a traced task.

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// How a task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// exit(2) with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// Somebody else has reaped it, or it became another thread by exec.
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(signal) => write!(f, "{signal}"),
                Err(_) => write!(f, "signal {number}"),
            },
            Self::Unknown => f.write_str("unknown cause"),
        }
    }
}

/// A traced task could not be handled. Sent between processes, hence errno as a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Error {
    /// The kernel refused a request.
    #[error("cannot {operation} thread {tid} of task {pid} ({name}): {}", Errno::from_raw(*errno))]
    Call {
        /// What was tried.
        operation: Cow<'static, str>,
        /// Process.
        pid: i32,
        /// Thread.
        tid: i32,
        /// Its name.
        name: String,
        /// Why.
        errno: i32,
    },
    /// Another process traces it.
    #[error(
        "task {pid} ({name}) is already traced by process {tracer} ({tracer_name}); end that debugger or tracer first"
    )]
    AlreadyTraced {
        /// Process.
        pid: i32,
        /// Its name.
        name: String,
        /// The tracer.
        tracer: i32,
        /// The tracer's name.
        tracer_name: String,
    },
    /// Kernel threads have no state that could be dumped.
    #[error("task {pid} ({name}) is a kernel thread")]
    KernelThread {
        /// Process.
        pid: i32,
        /// Its name.
        name: String,
    },
    /// The tree contains stasis.
    #[error(
        "task {pid} ({name}) is stasis itself or one of its ancestors; start stasis from outside the tree"
    )]
    Ourselves {
        /// Process.
        pid: i32,
        /// Its name.
        name: String,
    },
    /// No such process.
    #[error("there is no task {pid}")]
    Absent {
        /// Process.
        pid: i32,
    },
    /// It is dead but not yet reaped.
    #[error("task {pid} ({name}) is a zombie: it has exited and waits for its parent to reap it")]
    Zombie {
        /// Process.
        pid: i32,
        /// Its name.
        name: String,
    },
    /// Not allowed to trace.
    #[error("no permission to trace task {pid} ({name}); run stasis as root, or with CAP_SYS_PTRACE")]
    NotPermitted {
        /// Process.
        pid: i32,
        /// Its name.
        name: String,
    },
    /// It ended while it was handled.
    #[error("thread {tid} of task {pid} ended meanwhile: {exit}")]
    Died {
        /// Process.
        pid: i32,
        /// Thread.
        tid: i32,
        /// How.
        exit: Exit,
    },
    /// The kernel still runs it.
    #[error("thread {tid} of task {pid} ({name}) is not stopped")]
    NotStopped {
        /// Process.
        pid: i32,
        /// Thread.
        tid: i32,
        /// Its name.
        name: String,
    },
}
