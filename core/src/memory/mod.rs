//! The memory engine, dump side: which pages have contents, which of them tasks share after fork, and getting them into
//! page files. The restore side is `restore::memory`.
//!
//! The way of a page: [`scan`] finds it (PAGEMAP_SCAN), [`sharing`] finds out whether another memory descriptor maps the
//! same page frame, [`plan`] gives it a place in a page file (once per frame), and [`copy`] puts it there: from inside
//! the task through the guardian and the parasite when there is much of it, from outside otherwise.

pub mod copy;
pub mod describe;
pub mod plan;
pub mod scan;
pub mod sharing;

use nix::errno::Errno;

/// Bytes of a page on x86_64.
pub const PAGE: u64 = 4096;

/// Reading a task's memory failed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// An operation on the memory of a task.
    #[error("cannot {operation} of task {pid} at {address:#x}: {errno}")]
    Task {
        /// What was done, e.g. "scan the page map".
        operation: &'static str,
        /// The process.
        pid: i32,
        /// Where.
        address: u64,
        /// Why.
        errno: Errno,
    },
    /// Writing a page file.
    #[error("cannot write page file {shard} of the image: {errno}{}", if *.errno == Errno::ENOSPC { " (make room, or dump to another file system with -D)" } else { "" })]
    Write {
        /// Number of the page file.
        shard: u32,
        /// Why.
        errno: Errno,
    },
    /// A task's pages could not be read through the guardian.
    #[error(transparent)]
    Proc(#[from] crate::proc::ProcError),
}
