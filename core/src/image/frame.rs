//! Framing of `core.img` and `blobs.img`.
//!
//! The file starts with [`MAGIC`] (8 bytes) and the format version (u32). Then come frames: kind u16, version u16,
//! length u32, crc32 u32 (over the eight bytes before it and the payload), payload. All numbers are little-endian. The
//! last frame is a [`Trailer`] with the number of frames before it and the crc32 over their checksums.

use super::{
    Damage, FORMAT_VERSION, ImageError, RecordKind, Result,
    error::At,
    records::{BlobChunk, Trailer},
};
use prost::Message;
use std::{
    fs::File,
    io::{BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
};

/// First bytes of every framed file. Like PNG's, it does not survive a transfer as text.
pub const MAGIC: [u8; 8] = *b"\x89STASIS\n";
/// Bytes before the first frame.
pub const FILE_HEADER: u64 = 12;
/// Bytes of a frame before its payload.
pub const FRAME_HEADER: u64 = 12;
/// No record is longer: a task with 20,000 threads and their extended states fits.
pub const MAX_RECORD: usize = 256 << 20;
/// Data of one blob piece.
pub const MAX_BLOB_CHUNK: usize = 1 << 20;
/// A blob piece with its names.
pub(super) const MAX_BLOB_RECORD: usize = MAX_BLOB_CHUNK + 8192;

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(payload);
    hasher.finalize()
}

/// What ends a framed file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileEnd {
    /// Bytes of the file.
    pub length: u64,
    /// crc32 over the checksums of all frames but the trailer.
    pub checksum: u32,
    /// Frames but the trailer.
    pub records: u64,
}

/// Writes a framed file from front to back.
pub(super) struct FrameWriter {
    path: PathBuf,
    out: BufWriter<File>,
    length: u64,
    records: u64,
    checksums: crc32fast::Hasher,
    buffer: Vec<u8>,
}

impl FrameWriter {
    pub fn new(path: PathBuf, file: File) -> Result<Self> {
        let mut writer = Self {
            path,
            out: BufWriter::with_capacity(1 << 20, file),
            length: FILE_HEADER,
            records: 0,
            checksums: crc32fast::Hasher::new(),
            buffer: Vec::new(),
        };
        let mut header = MAGIC.to_vec();
        header.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        writer.out.write_all(&header).at("write", &writer.path)?;
        Ok(writer)
    }

    /// Appends a record.
    pub fn write(&mut self, kind: RecordKind, message: &impl Message) -> Result<()> {
        let length = message.encoded_len();
        if length > MAX_RECORD {
            return Err(ImageError::RecordTooLong { kind, length, limit: MAX_RECORD });
        }
        self.buffer.clear();
        self.buffer.reserve(length);
        // A Vec grows as needed, so this cannot fail; if it ever did, the record would be refused on restore.
        message.encode_raw(&mut self.buffer);
        let mut head = [0; 8];
        head[..2].copy_from_slice(&(kind as u16).to_le_bytes());
        head[2..4].copy_from_slice(&kind.version().to_le_bytes());
        head[4..].copy_from_slice(&(length as u32).to_le_bytes());
        let crc = checksum(&head, &self.buffer).to_le_bytes();
        self.out.write_all(&head).at("write", &self.path)?;
        self.out.write_all(&crc).at("write", &self.path)?;
        self.out.write_all(&self.buffer).at("write", &self.path)?;
        if kind != RecordKind::Trailer {
            self.checksums.update(&crc);
            self.records += 1;
        }
        self.length += FRAME_HEADER + length as u64;
        Ok(())
    }

    /// Writes the trailer and brings everything to disk.
    pub fn finish(&mut self) -> Result<FileEnd> {
        let checksum = self.checksums.clone().finalize();
        let records = self.records;
        self.write(RecordKind::Trailer, &Trailer { records, checksum })?;
        self.out.flush().at("write", &self.path)?;
        self.out.get_ref().sync_data().at("sync", &self.path)?;
        Ok(FileEnd { length: self.length, checksum, records })
    }
}

/// A frame as it stands in the file; its checksum was right.
#[derive(Debug)]
pub struct Frame<'a> {
    /// Number of the kind.
    pub kind: u16,
    /// Version of the record.
    pub version: u16,
    /// Where the frame begins.
    pub offset: u64,
    /// The encoded message.
    pub payload: &'a [u8],
}

impl Frame<'_> {
    /// Decodes the payload.
    pub(super) fn decode<M: Message + Default>(&self, kind: RecordKind, path: &Path) -> Result<M> {
        M::decode(self.payload).map_err(|source| Damage::Undecodable { kind, source }.at(path, self.offset))
    }
}

/// Reads a framed file from front to back, in memory of one record.
pub(super) struct FrameReader {
    path: PathBuf,
    input: BufReader<File>,
    /// Length of the file.
    length: u64,
    offset: u64,
    limit: usize,
    records: u64,
    checksums: crc32fast::Hasher,
    end: Option<FileEnd>,
    buffer: Vec<u8>,
}

impl FrameReader {
    /// `limit` is the longest record that is accepted.
    pub fn open(path: &Path, limit: usize) -> Result<Self> {
        let file = File::open(path).at("open", path)?;
        let length = file.metadata().at("stat", path)?.len();
        let mut input = BufReader::with_capacity(1 << 20, file);
        if length < FILE_HEADER {
            return Err(Damage::CutOff.at(path, length));
        }
        let mut header = [0; FILE_HEADER as usize];
        input.read_exact(&mut header).at("read", path)?;
        if header[..8] != MAGIC {
            return Err(ImageError::NotAnImage { path: path.into() });
        }
        let found = le32(&header[8..]);
        if found != FORMAT_VERSION {
            return Err(ImageError::Format { path: path.into(), found });
        }
        Ok(Self {
            path: path.into(),
            input,
            length,
            offset: FILE_HEADER,
            limit,
            records: 0,
            checksums: crc32fast::Hasher::new(),
            end: None,
            buffer: Vec::new(),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next frame, or `None` after the trailer.
    pub fn next(&mut self) -> Result<Option<Frame<'_>>> {
        if self.end.is_some() {
            return Ok(None);
        }
        let start = self.offset;
        let (kind, version, crc) =
            read_frame(&mut self.input, self.length.saturating_sub(start), self.limit, &mut self.buffer)
                .map_err(|error| error.at(&self.path, start))?;
        self.offset += FRAME_HEADER + self.buffer.len() as u64;
        let frame = Frame { kind, version, offset: start, payload: &self.buffer };
        if kind != RecordKind::Trailer as u16 {
            self.checksums.update(&crc.to_le_bytes());
            self.records += 1;
            return Ok(Some(frame));
        }
        let trailer: Trailer = frame.decode(RecordKind::Trailer, &self.path)?;
        let checksum = self.checksums.clone().finalize();
        let damage = if trailer.records != self.records {
            Damage::RecordCount { found: self.records, expected: trailer.records }
        } else if trailer.checksum != checksum {
            Damage::Checksum { found: checksum, expected: trailer.checksum }
        } else if self.offset != self.length {
            Damage::AfterTrailer
        } else {
            self.end = Some(FileEnd { length: self.length, checksum, records: self.records });
            return Ok(None);
        };
        Err(damage.at(&self.path, start))
    }

    /// The end, once the trailer was read.
    pub fn end(&self) -> Option<FileEnd> {
        self.end
    }
}

/// What went wrong while reading a frame; the caller knows where.
pub(super) enum FrameError {
    Io(std::io::Error),
    Damage(Damage),
}

impl FrameError {
    pub fn at(self, path: &Path, offset: u64) -> ImageError {
        match self {
            Self::Io(source) => ImageError::Io { operation: "read", path: path.into(), source },
            Self::Damage(damage) => damage.at(path, offset),
        }
    }
}

/// Reads one frame, of which `available` bytes can exist, into `buffer`, and checks its checksum.
pub(super) fn read_frame(
    input: &mut impl Read,
    available: u64,
    limit: usize,
    buffer: &mut Vec<u8>,
) -> std::result::Result<(u16, u16, u32), FrameError> {
    if available < FRAME_HEADER {
        return Err(FrameError::Damage(Damage::CutOff));
    }
    let mut header = [0; FRAME_HEADER as usize];
    input.read_exact(&mut header).map_err(FrameError::Io)?;
    let length = u64::from(le32(&header[4..]));
    let available = available - FRAME_HEADER;
    if length > available || length > limit as u64 {
        return Err(FrameError::Damage(Damage::Length { length, available, limit: limit as u64 }));
    }
    buffer.clear();
    buffer.resize(length as usize, 0);
    input.read_exact(buffer).map_err(FrameError::Io)?;
    let expected = le32(&header[8..]);
    let found = checksum(&header[..8], buffer);
    if found != expected {
        return Err(FrameError::Damage(Damage::Checksum { found, expected }));
    }
    let kind = u16::from_le_bytes([header[0], header[1]]);
    Ok((kind, u16::from_le_bytes([header[2], header[3]]), found))
}

fn le32(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// Longest name of a plugin and a blob together, so that a piece of 1 MiB fits its frame.
pub(super) fn blob_fits(chunk: &BlobChunk) -> bool {
    chunk.encoded_len() <= MAX_BLOB_RECORD
}
