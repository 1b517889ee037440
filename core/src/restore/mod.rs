//! Restoring process trees from images.
//!
//! | step | where | in which process |
//! |---|---|---|
//! | 1 processes of our own; the root task is forked on request | [`front`] | the first one |
//! | 2 image, plugins, plans; whatever can be known to fail | [`command`], [`check`], [`pids`], [`tree_plan`], [`descriptor_plan`] | the command |
//! | 3 namespaces, files without names | [`root`], [`namespaces`], [`ghosts`] | the root task |
//! | 4 process tree, sessions, groups, zombies | [`node`] | every task |
//! | 5 descriptors: create, pull, link | [`descriptors`], [`host`] | every task |
//! | 6 memory; then descriptors: settle | [`memory`], [`descriptors`] | every task |
//! | 7 the restorer: memory goes home, threads, credentials | [`blob`] | every task |
//! | 8 all arrived, pages verified, registers, release | [`command`], [`final_state`] | the command, through the guardian |

pub mod blob;
mod check;
mod command;
pub mod descriptor_plan;
mod descriptors;
mod error;
mod final_state;
mod front;
mod ghosts;
mod host;
mod locks;
mod mapped;
pub mod memory;
mod namespaces;
mod news;
mod node;
mod options;
pub mod paths;
mod pids;
mod root;
mod shared;
mod sys;
pub mod tree_plan;
mod unlock;
mod vdso;
mod world;

pub use blob::RestorerFailure;
pub use error::{Failure, RestoreError};
pub use front::restore;
pub use options::{InheritFd, InheritFdError, RestoreOptions, RestoreReport};
pub use unlock::unlock;
