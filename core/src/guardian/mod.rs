//! The guardian: a small process without plugins that alone traces, and that undoes everything when the command goes away.
//!
//! [`Guardian::spawn`] forks it; the command talks to it over one framed stream. Its requests are whole steps: seize this tree,
//! collect all registers, run these queries inside. A channel that closes before [`Guardian::finish`] makes it put every task back as
//! it was (dump) or kill every task it adopted (restore), and leave.

mod channel;
mod client;
mod collect;
mod error;
mod inspect;
mod journal;
mod pages;
pub mod protocol;
mod restart;
mod restore;
mod seize;
mod server;
mod snapshot;
mod survey;
mod timers;
mod tree;
mod undo;
mod wait;
mod waits;

pub use client::{Guardian, WriteJob};
pub use error::{GuardianError, NotStopping};
pub use restore::SCRATCH_LEN;
