//! Descriptor tables, open file descriptions and path-backed files: what core keeps for every kind of descriptor.

pub mod identity;
pub mod locks;
pub mod names;
pub mod table;

pub use names::{Ghost, Names, Refusal};
