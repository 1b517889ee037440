//! The image format: see `core/proto/image.proto` for the records.

/// The records of core, generated from `core/proto/image.proto`.
#[allow(missing_docs)]
pub mod records {
    include!(concat!(env!("OUT_DIR"), "/stasis.image.v1.rs"));
}
