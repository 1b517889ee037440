//! Writing an image.

use super::{
    BLOBS_FILE, CORE_FILE, ImageError, MANIFEST_FILE, MANIFEST_TEMPORARY, Record, RecordKind, Result,
    error::At,
    frame::{FrameWriter, MAX_BLOB_CHUNK, blob_fits},
    manifest::{Entry, Manifest},
    records::{BlobChunk, PageMap, Shard},
    shard_file_name, shard_index,
};
use prost::Message;
use std::{
    collections::BTreeMap,
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// Extents per [`PageMap`] record: a process with millions of separate extents has several records.
const EXTENTS_PER_RECORD: usize = 1 << 18;

/// Writes an image. Records and blobs can be written from several threads. If it is dropped before
/// [`finish`](Self::finish), everything it wrote is removed again.
pub struct ImageWriter {
    directory: PathBuf,
    created_directory: bool,
    core: Mutex<FrameWriter>,
    blobs: Mutex<Blobs>,
    complete: AtomicBool,
}

/// How much was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ImageStats {
    /// Records in `core.img`.
    pub records: u64,
    /// Bytes of `core.img`.
    pub core_bytes: u64,
    /// Bytes of `blobs.img`.
    pub blob_bytes: u64,
    /// Bytes of all page files.
    pub page_bytes: u64,
}

/// Blobs come in pieces of any size; small ones are joined as long as they are for the same blob.
#[derive(Default)]
struct Blobs {
    file: Option<FrameWriter>,
    pending: Option<BlobChunk>,
    /// Bytes so far of (plugin, name).
    lengths: BTreeMap<(String, String), u64>,
}

impl Blobs {
    fn flush(&mut self, directory: &Path) -> Result<()> {
        let Some(chunk) = self.pending.take() else { return Ok(()) };
        if !blob_fits(&chunk) {
            let length = chunk.encoded_len();
            return Err(ImageError::RecordTooLong { kind: RecordKind::Blob, length, limit: MAX_BLOB_CHUNK });
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(FrameWriter::new(
                directory.join(BLOBS_FILE),
                create_file(&directory.join(BLOBS_FILE))?,
            )?),
        };
        file.write(RecordKind::Blob, &chunk)
    }

    fn append(&mut self, directory: &Path, plugin: &str, name: &str, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            if self.pending.as_ref().is_none_or(|chunk| {
                chunk.plugin != plugin || chunk.name != name || chunk.data.len() >= MAX_BLOB_CHUNK
            }) {
                self.flush(directory)?;
            }
            let length = self.lengths.entry((plugin.into(), name.into())).or_default();
            let chunk = self.pending.get_or_insert_with(|| BlobChunk {
                name: name.into(),
                plugin: plugin.into(),
                data: Vec::new(),
                offset: *length,
            });
            let (now, later) = data.split_at(data.len().min(MAX_BLOB_CHUNK - chunk.data.len()));
            chunk.data.extend_from_slice(now);
            *length += now.len() as u64;
            data = later;
        }
        Ok(())
    }
}

impl ImageWriter {
    /// Starts an image in `directory`, which is made if it does not exist. What an interrupted dump left there is
    /// replaced, a complete image is refused, and other files are left alone.
    pub fn create(directory: &Path) -> Result<Self> {
        let created_directory = match DirBuilder::new().mode(0o700).create(directory) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(source) => {
                return Err(ImageError::Io { operation: "create", path: directory.into(), source });
            }
        };
        // Absolute, so that a later chdir does not matter.
        let directory = directory.canonicalize().at("open", directory)?;
        if directory.join(MANIFEST_FILE).symlink_metadata().is_ok() {
            return Err(ImageError::AlreadyComplete { directory });
        }
        remove_leftovers(&directory)?;
        let path = directory.join(CORE_FILE);
        let core = create_file(&path).and_then(|file| FrameWriter::new(path, file));
        let core = match core {
            Ok(core) => Mutex::new(core),
            Err(error) => {
                discard(&directory, created_directory);
                return Err(error);
            }
        };
        Ok(Self {
            directory,
            created_directory,
            core,
            blobs: Mutex::default(),
            complete: AtomicBool::new(false),
        })
    }

    /// The directory, as an absolute path.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Appends a record. The header must be the first one.
    pub fn write<R: Record>(&self, record: &R) -> Result<()> {
        lock(&self.core).write(R::KIND, record)
    }

    /// Appends a page map, in several records if it is long.
    pub fn write_page_map(&self, map: &PageMap) -> Result<()> {
        if map.extents.len() <= EXTENTS_PER_RECORD {
            return self.write(map);
        }
        map.extents.chunks(EXTENTS_PER_RECORD).enumerate().try_for_each(|(at, extents)| {
            let guards = if at == 0 { map.guards.clone() } else { Vec::new() };
            self.write(&PageMap { mm: map.mm, segment: map.segment, extents: extents.to_vec(), guards })
        })
    }

    /// Appends to the blob `name` of a plugin.
    pub fn append_blob(&self, plugin: &str, name: &str, data: &[u8]) -> Result<()> {
        lock(&self.blobs).append(&self.directory, plugin, name, data)
    }

    /// Makes page file `index`, empty, open for reading and writing.
    pub fn shard(&self, index: u32) -> Result<File> {
        create_file(&self.directory.join(shard_file_name(index)))
    }

    /// Writes the records of the page files, the trailers and, last, the manifest: the image is complete. With `sync`,
    /// the page files are brought to disk first; all others always are. Nothing may be written afterwards.
    pub fn finish(&self, shards: Vec<Shard>, sync: bool) -> Result<ImageStats> {
        let mut manifest = Manifest::new();
        let mut stats = ImageStats::default();
        for shard in &shards {
            self.write(shard)?;
            let name = shard_file_name(shard.index);
            if sync {
                let path = self.directory.join(&name);
                File::open(&path).and_then(|file| file.sync_data()).at("sync", &path)?;
            }
            stats.page_bytes += shard.length;
            manifest.files.insert(name, Entry { length: shard.length, checksum: None });
        }
        let mut blobs = std::mem::take(&mut *lock(&self.blobs));
        blobs.flush(&self.directory)?;
        if let Some(file) = &mut blobs.file {
            let end = file.finish()?;
            stats.blob_bytes = end.length;
            let entry = Entry { length: end.length, checksum: Some(end.checksum) };
            manifest.files.insert(BLOBS_FILE.into(), entry);
        }
        let end = lock(&self.core).finish()?;
        stats.records = end.records;
        stats.core_bytes = end.length;
        manifest.files.insert(CORE_FILE.into(), Entry { length: end.length, checksum: Some(end.checksum) });
        manifest.write(&self.directory)?;
        self.complete.store(true, Ordering::Relaxed);
        Ok(stats)
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        if !*self.complete.get_mut() {
            discard(&self.directory, self.created_directory);
        }
    }
}

/// A poisoned lock means that a writer panicked in another thread; the dump then fails and nothing is finished.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn create_file(path: &Path) -> Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path).at("create", path)
}

/// Whether a file of this name belongs to an image.
fn is_image_file(name: &str) -> bool {
    [CORE_FILE, BLOBS_FILE, MANIFEST_TEMPORARY].contains(&name) || shard_index(name).is_some()
}

/// Removes what an interrupted dump left in `directory`.
fn remove_leftovers(directory: &Path) -> Result<()> {
    // First, so that what is left after an interruption here is seen to be incomplete. There is one only if the last
    // sync of an otherwise complete image failed.
    match std::fs::remove_file(directory.join(MANIFEST_FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).at("remove", &directory.join(MANIFEST_FILE));
        }
        _ => {}
    }
    for entry in std::fs::read_dir(directory).at("open", directory)? {
        let entry = entry.at("read", directory)?;
        if entry.file_name().to_str().is_some_and(is_image_file) {
            std::fs::remove_file(entry.path()).at("remove", &entry.path())?;
        }
    }
    Ok(())
}

/// Removes an unfinished image; also for whoever survives the process that wrote it.
fn discard(directory: &Path, with_directory: bool) {
    if let Err(error) = remove_leftovers(directory) {
        tracing::warn!("an unfinished image stays behind: {error}");
    } else if with_directory {
        // Fails, as it should, if somebody else put something there.
        let _ = std::fs::remove_dir(directory);
    }
}
