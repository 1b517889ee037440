//! Typed tracees: what needs a stopped task takes a [`Stopped`], and continuing consumes it (ptrace(2)).

mod error;
mod info;
mod raw;
mod state;
pub mod who;

pub use error::{Error, Exit};
pub use info::{Rseq, SeccompFilter};
pub use state::{Options, Running, Stop, Stopped, TaskId, Tracee, Waited};
