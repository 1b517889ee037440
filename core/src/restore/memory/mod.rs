//! Memory of restored tasks: what goes where ([`plan`]), and doing it in the tasks ([`task`]).
//!
//! Every mapping with contents is first made in an *arena*, an address that is no home of anybody (see [`arena`]), and
//! filled there; the restorer blob moves it home when the memory of the restoring process is gone. Pages that several
//! tasks share after fork are filled in their lowest common ancestor before it forks (see [`families`]).

pub mod arena;
pub mod families;
pub mod fill;
pub mod moves;
pub mod plan;
pub mod region;
pub mod task;

pub use fill::PageFiles;
pub use moves::RestorerMoves;
pub use plan::{MemoryPlan, Parent, Records};
pub use task::{OpenMapped, TaskMemory};

use std::{io, ops::Range, path::PathBuf};
use thiserror::Error;

/// Bytes of a page, in images and on x86_64.
pub const PAGE: u64 = 4096;

/// What is wrong with the memory of an image, or fails while it is restored.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A record names another that the image lacks.
    #[error("the image has no {what} {id}, which memory map {map} needs")]
    Missing {
        /// Kind of record.
        what: &'static str,
        /// Its id.
        id: u32,
        /// Who names it.
        map: u32,
    },
    /// A record says what cannot be.
    #[error("memory map {map} of the image is damaged: {what} at {address:#x}")]
    Damaged {
        /// Id of the memory map, 0 for a shared segment.
        map: u32,
        /// What is wrong.
        what: &'static str,
        /// Where.
        address: u64,
    },
    /// The process tree of the image is none.
    #[error("task {pid} of the image has no place in the process tree")]
    Tree {
        /// The task.
        pid: i32,
    },
    /// No room for an arena.
    #[error("no room in the address space to prepare {size:#x} bytes that belong at {home:#x}")]
    NoRoom {
        /// Home of the memory.
        home: u64,
        /// Its size.
        size: u64,
    },
    /// A mapped file cannot be opened.
    #[error("opening the mapped file {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A system call on memory fails.
    #[error("{operation} {:#x}-{:#x} of task {pid}: {source}", range.start, range.end)]
    System {
        /// What was tried.
        operation: &'static str,
        /// Home addresses.
        range: Range<u64>,
        /// The task.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// A page file is too short or cannot be mapped.
    #[error("page file {shard}: {source}")]
    PageFile {
        /// Its index.
        shard: u32,
        /// Why.
        source: io::Error,
    },
}

impl MemoryError {
    /// The error of the system call that has just failed.
    fn last(operation: &'static str, range: &Range<u64>, pid: i32) -> Self {
        Self::System { operation, range: range.clone(), pid, source: io::Error::last_os_error() }
    }
}
