//! The image format: writer, reader, checks. `core/proto/image.proto` has the records.
//!
//! An image is a directory (mode 0700, files 0600):
//!
//! | file | contents |
//! |---|---|
//! | `core.img` | [file header](frame), then framed records, the last one a [`records::Trailer`] |
//! | `blobs.img` | likewise, [`records::BlobChunk`]s of at most 1 MiB; absent if there is no blob |
//! | `pages-N.img` | raw pages, one file per worker of the dump; checksums in [`records::Shard`] |
//! | `manifest` | written last and renamed into place: without it the image is incomplete and is refused |
//!
//! The writer never seeks back. The reader believes nothing: lengths are compared with the file before memory is
//! taken, every frame has a checksum, and [`Image::open`] checks that every number names something that exists
//! ([`Fault`] lists what it refuses).

mod blob;
mod check;
mod error;
pub mod frame;
mod kind;
mod manifest;
mod pages;
mod reader;
mod writer;

pub use blob::{BlobReader, BlobStore};
pub use check::{Fault, Place, TASK_SIZE};
pub use error::{Damage, ImageError, Result};
pub use kind::{Record, RecordKind};
pub use pages::{CHUNK, ShardChecksums, checksum_shards};
pub use reader::{Image, UnknownRecord};
pub use writer::{ImageStats, ImageWriter};

/// Version of the whole format; grows when an older reader could misread a newer image.
pub const FORMAT_VERSION: u32 = 1;

/// Name of the file with the records.
pub const CORE_FILE: &str = "core.img";
/// Name of the file with the blobs.
pub const BLOBS_FILE: &str = "blobs.img";
/// Name of the file that makes an image complete.
pub const MANIFEST_FILE: &str = "manifest";
/// What the manifest is called until it is complete.
const MANIFEST_TEMPORARY: &str = "manifest.tmp";

/// Blobs of core itself are those of a plugin without a name.
pub const GHOST_PLUGIN: &str = "";

/// Name of the blob with the contents of a file without a name.
pub fn ghost_blob(id: u32) -> String {
    format!("ghost-{id}")
}

/// Name of a page file.
pub fn shard_file_name(index: u32) -> String {
    format!("pages-{index}.img")
}

/// The number of a page file, from its name.
fn shard_index(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("pages-")?.strip_suffix(".img")?;
    let index = digits.parse().ok()?;
    (shard_file_name(index) == name).then_some(index)
}

/// The records of core, generated from `core/proto/image.proto`.
#[allow(missing_docs)]
pub mod records {
    include!(concat!(env!("OUT_DIR"), "/stasis.image.v1.rs"));
}

/// Serialized `google.protobuf.FileDescriptorSet` of the records of core, for `inspect`.
pub const RECORD_DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/image.bin"));
