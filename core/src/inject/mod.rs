//! Getting code into a stopped task, and calling it.

pub mod blob;
#[path = "../../../parasite/src/protocol.rs"]
pub mod parasite;
