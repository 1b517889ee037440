//! stasis core.
