//! What is particular to a machine. x86_64 is the only one so far.

mod x86_64;

pub use x86_64::*;
