//! Restoring process trees from images.

pub mod blob;
pub mod memory;
