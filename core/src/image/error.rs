//! What can be wrong with an image.

use super::{FORMAT_VERSION, Fault, RecordKind};
use std::{io, path::PathBuf};

/// The result of an operation on an image.
pub type Result<T> = std::result::Result<T, ImageError>;

/// Why an image could not be written or is refused.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A system call failed.
    #[error("cannot {operation} {}: {source}{}", path.display(), remedy(source))]
    Io {
        /// What was tried, e.g. "create".
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The directory holds an image already.
    #[error("{} already holds a complete image (choose another directory with -D, or remove that image)", directory.display())]
    AlreadyComplete {
        /// The directory.
        directory: PathBuf,
    },
    /// The dump that wrote this directory never ended.
    #[error("{} holds no complete image: it has no manifest (the dump failed or was interrupted; dump again)", directory.display())]
    Incomplete {
        /// The directory.
        directory: PathBuf,
    },
    /// The file is no part of an image.
    #[error("{} is not a file of a stasis image: its first bytes are wrong", path.display())]
    NotAnImage {
        /// The file.
        path: PathBuf,
    },
    /// Written by another format version.
    #[error("{}: image format {found}, but this stasis reads format {FORMAT_VERSION} (use the stasis that wrote it)", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The file was changed or cut off since it was written.
    #[error("{} is damaged at offset {offset}: {damage} (dump again, or take another copy)", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong there.
        damage: Damage,
    },
    /// A record of a kind or version that this program does not know.
    #[error("{}: record kind {kind} version {version} at offset {offset} is not known (use a newer stasis)", path.display())]
    UnknownRecord {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// Number of the kind.
        kind: u16,
        /// Its version.
        version: u16,
    },
    /// The records contradict each other.
    #[error("{}: the image contradicts itself: {fault}", directory.display())]
    Inconsistent {
        /// The image.
        directory: PathBuf,
        /// How.
        fault: Box<Fault>,
    },
    /// A record is longer than a reader would accept.
    #[error("a {} record of {length} bytes is longer than the {limit} bytes an image may have", kind.name())]
    RecordTooLong {
        /// Its kind.
        kind: RecordKind,
        /// Its length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// A worker of the dump or of a check panicked.
    #[error("the thread that computes checksums of {} panicked", path.display())]
    Thread {
        /// The file it worked on.
        path: PathBuf,
    },
}

/// How a file is damaged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// The file ends too early.
    #[error("the file is cut off")]
    CutOff,
    /// A length that cannot be.
    #[error("a record of {length} bytes, where {available} are left and {limit} are allowed")]
    Length {
        /// What the frame says.
        length: u64,
        /// What the file has.
        available: u64,
        /// What a record may have.
        limit: u64,
    },
    /// The checksum is another one.
    #[error("checksum {found:08x} instead of {expected:08x}")]
    Checksum {
        /// As computed.
        found: u32,
        /// As written.
        expected: u32,
    },
    /// The checksum is right, but the bytes are no such message.
    #[error("the {} record cannot be decoded: {source}", kind.name())]
    Undecodable {
        /// Kind of the record.
        kind: RecordKind,
        /// Why not.
        source: prost::DecodeError,
    },
    /// Records before the trailer are missing or too many.
    #[error("the trailer counts {expected} records, but there are {found}")]
    RecordCount {
        /// Number of records.
        found: u64,
        /// What the trailer says.
        expected: u64,
    },
    /// Something after the trailer.
    #[error("there are bytes after the trailer")]
    AfterTrailer,
    /// A record in the wrong place.
    #[error("a {} record has no place here", .0.name())]
    Misplaced(RecordKind),
    /// The manifest does not read as one.
    #[error("the manifest is not as stasis writes it")]
    Manifest,
    /// The manifest gives another length.
    #[error("the file has {found} bytes instead of {expected}")]
    FileLength {
        /// Length of the file.
        found: u64,
        /// What the manifest or the page file's record says.
        expected: u64,
    },
    /// A page file's number of checksums does not fit its length.
    #[error("{found} chunk checksums for {expected} chunks")]
    ChunkCount {
        /// Number of checksums.
        found: usize,
        /// Number of chunks.
        expected: u64,
    },
    /// Pieces of a blob do not follow each other.
    #[error("a piece of blob {name} of plugin {plugin} is at {found} instead of {expected}")]
    BlobOffset {
        /// Plugin.
        plugin: String,
        /// Blob.
        name: String,
        /// Offset of the piece.
        found: u64,
        /// Where the last one ended.
        expected: u64,
    },
}

/// What the user can do about an errno.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            " (free some space, or choose another directory with -D)"
        }
        io::ErrorKind::PermissionDenied => " (run as a user who may, or choose another directory with -D)",
        io::ErrorKind::ReadOnlyFilesystem => " (choose another directory with -D)",
        io::ErrorKind::NotFound => " (check -D)",
        io::ErrorKind::NotADirectory => " (-D takes a directory)",
        _ => "",
    }
}

/// Adds operation and path to an [`io::Error`].
pub(super) trait At<T> {
    fn at(self, operation: &'static str, path: &std::path::Path) -> Result<T>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, operation: &'static str, path: &std::path::Path) -> Result<T> {
        self.map_err(|source| ImageError::Io { operation, path: path.into(), source })
    }
}

impl Damage {
    /// As an error about a place in a file.
    pub(super) fn at(self, path: &std::path::Path, offset: u64) -> ImageError {
        ImageError::Damaged { path: path.into(), offset, damage: self }
    }
}
