//! Checkpoints running Linux process trees into files and restores them.
//!
//! ARCHITECTURE.md is the map. Core knows processes, threads, memory, descriptor tables and path-backed files; every other
//! resource is known by exactly one plugin (see `stasis-plugin-api`).

pub mod action;
pub mod arch;
pub mod cli;
mod clocks;
pub mod criu;
pub mod dump;
pub mod files;
pub mod front;
pub mod guardian;
pub mod image;
pub mod inject;
pub mod machine;
pub mod memory;
pub mod parallel;
pub mod plugins;
pub mod proc;
pub mod ptrace;
pub mod restore;
pub mod task;
pub mod tree;
