//! Getting code into a stopped task, and calling it.
//!
//! The parasite is mapped readable and executable and written through /proc/PID/mem, so a task under memory-deny-write-execute takes
//! it too. After each call the thread has its own registers back; two mappings are all that a stopped task keeps.

pub mod blob;
mod error;
#[path = "../../../parasite/src/protocol.rs"]
pub mod parasite;
pub mod run;
pub mod space;

pub use error::InjectError;
