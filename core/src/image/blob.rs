//! Reading blobs: piece by piece, each checked as it is read.

use super::{
    BLOBS_FILE, Damage, Image, RecordKind, Result,
    error::At,
    frame::{FRAME_HEADER, Frame, FrameReader, MAX_BLOB_RECORD, read_frame},
    records::BlobChunk,
};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// Where a piece of a blob is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    /// Offset of its first byte in the blob.
    start: u64,
    /// Bytes of data.
    length: u64,
    /// Its frame in the file.
    frame: u64,
    /// Bytes of the frame.
    frame_length: u64,
}

/// All pieces of all blobs: plugin, name, pieces in order.
pub(super) type BlobIndex = BTreeMap<String, BTreeMap<String, Vec<Piece>>>;

/// Reads a blob file once from front to back and notes where everything is.
pub(super) fn index(reader: &mut FrameReader) -> Result<BlobIndex> {
    let mut index = BlobIndex::new();
    let path = reader.path().to_owned();
    while let Some(frame) = reader.next()? {
        if frame.kind != RecordKind::Blob as u16 || frame.version > RecordKind::Blob.version() {
            return Err(frame.unknown(&path));
        }
        let chunk: BlobChunk = frame.decode(RecordKind::Blob, &path)?;
        let piece = Piece {
            start: chunk.offset,
            length: chunk.data.len() as u64,
            frame: frame.offset,
            frame_length: FRAME_HEADER + frame.payload.len() as u64,
        };
        let blobs = index.entry(chunk.plugin.clone()).or_default();
        let pieces = blobs.entry(chunk.name.clone()).or_default();
        let expected = pieces.last().map_or(0, |last| last.start + last.length);
        if piece.start != expected || piece.start.checked_add(piece.length).is_none() {
            let BlobChunk { plugin, name, offset: found, .. } = chunk;
            return Err(Damage::BlobOffset { plugin, name, found, expected }.at(&path, frame.offset));
        }
        pieces.push(piece);
    }
    Ok(index)
}

/// The blobs of an open image, read by position. Holds at most one descriptor, and one piece in memory.
pub struct BlobStore<'a> {
    index: &'a BlobIndex,
    path: PathBuf,
    file: Option<File>,
    /// The piece read last and the position of its frame.
    cache: Option<(u64, Vec<u8>)>,
}

impl<'a> BlobStore<'a> {
    pub(super) fn open(image: &'a Image) -> Result<Self> {
        let path = image.directory.join(BLOBS_FILE);
        let file = if image.blobs.is_empty() { None } else { Some(File::open(&path).at("open", &path)?) };
        Ok(Self { index: &image.blobs, path, file, cache: None })
    }

    /// The descriptor, so that a restored task can move it out of the way.
    pub fn file_mut(&mut self) -> Option<&mut File> {
        self.file.as_mut()
    }

    /// Length of a blob; 0 if it was never written.
    pub fn length(&self, plugin: &str, name: &str) -> u64 {
        self.pieces(plugin, name).last().map_or(0, |last| last.start + last.length)
    }

    fn pieces(&self, plugin: &str, name: &str) -> &'a [Piece] {
        self.index.get(plugin).and_then(|blobs| blobs.get(name)).map_or(&[], Vec::as_slice)
    }

    /// Reads from `offset` of a blob; 0 bytes at and beyond its end.
    pub fn read_at(&mut self, plugin: &str, name: &str, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let pieces = self.pieces(plugin, name);
        let at = pieces.partition_point(|piece| piece.start + piece.length <= offset);
        let Some(piece) = pieces.get(at) else { return Ok(0) };
        let data = self.piece(piece)?;
        let rest = data.get((offset - piece.start) as usize..).unwrap_or_default();
        let n = rest.len().min(buffer.len());
        buffer[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }

    fn piece(&mut self, piece: &Piece) -> Result<&[u8]> {
        let data = match self.cache.take() {
            Some((frame, data)) if frame == piece.frame => data,
            _ => self.load(piece)?,
        };
        Ok(&self.cache.insert((piece.frame, data)).1)
    }

    /// Reads a piece again; the file may have changed since it was opened, so all is checked again.
    fn load(&self, piece: &Piece) -> Result<Vec<u8>> {
        let path: &Path = &self.path;
        let file = self.file.as_ref().ok_or_else(|| Damage::CutOff.at(path, piece.frame))?;
        let mut input = At0 { file, offset: piece.frame };
        let mut payload = Vec::new();
        let (kind, version, _) = read_frame(&mut input, piece.frame_length, MAX_BLOB_RECORD, &mut payload)
            .map_err(|error| error.at(path, piece.frame))?;
        let frame = Frame { kind, version, offset: piece.frame, payload: &payload };
        let chunk: BlobChunk = frame.decode(RecordKind::Blob, path)?;
        if chunk.data.len() as u64 != piece.length {
            return Err(Damage::CutOff.at(path, piece.frame));
        }
        Ok(chunk.data)
    }
}

/// `Read` from a position, without moving the file's own.
struct At0<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for At0<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
}

/// Reads one blob from front to back.
pub struct BlobReader<'a> {
    pub(super) store: BlobStore<'a>,
    pub(super) plugin: String,
    pub(super) name: String,
    pub(super) offset: u64,
}

impl Read for BlobReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n =
            self.store.read_at(&self.plugin, &self.name, self.offset, buffer).map_err(io::Error::other)?;
        self.offset += n as u64;
        Ok(n)
    }
}
