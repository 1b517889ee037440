//! What can go wrong inside a task.

use crate::ptrace;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// Code could not be brought into a task, or went wrong there. Sent between processes, hence errno as a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum InjectError {
    /// The task could not be handled.
    #[error(transparent)]
    Ptrace(#[from] ptrace::Error),
    /// A system call inside the task failed.
    #[error("{call} inside task {pid} ({name}) failed: {}", Errno::from_raw(*errno))]
    Syscall {
        /// The call.
        call: Cow<'static, str>,
        /// Process.
        pid: i32,
        /// Its name.
        name: String,
        /// Why.
        errno: i32,
    },
    /// The injected code faulted.
    #[error("code injected into task {pid} ({name}) stopped by signal {signal} at {at:#x}")]
    Crashed {
        /// Process.
        pid: i32,
        /// Its name.
        name: String,
        /// Signal.
        signal: i32,
        /// Instruction.
        at: u64,
    },
    /// The injected code did not come back.
    #[error("code injected into thread {tid} of task {pid} ({name}) did not come back in time")]
    Late {
        /// Process.
        pid: i32,
        /// Thread.
        tid: i32,
        /// Its name.
        name: String,
    },
    /// There is no way to make the task call the kernel.
    #[error("no executable mapping of task {pid} ({name}) holds a system call instruction")]
    NoSyscallInstruction {
        /// Process.
        pid: i32,
        /// Its name.
        name: String,
    },
    /// Its system calls are dispatched to itself.
    #[error(
        "task {pid} ({name}) has its system calls dispatched to a handler (PR_SET_SYSCALL_USER_DISPATCH), which is not supported"
    )]
    UserDispatch {
        /// The process.
        pid: i32,
        /// Its name.
        name: String,
    },
    /// A 32-bit task.
    #[error("task {pid} ({name}) runs 32-bit code, which is not supported")]
    Not64Bit {
        /// Process.
        pid: i32,
        /// Its name.
        name: String,
    },
    /// The task's memory cannot be reached.
    #[error("memory of task {pid} ({name}) at {address:#x}: {}", Errno::from_raw(*errno))]
    Memory {
        /// Process.
        pid: i32,
        /// Its name.
        name: String,
        /// Where.
        address: u64,
        /// Why.
        errno: i32,
    },
}
