//! Reading an image.

use super::{
    BLOBS_FILE, BlobReader, BlobStore, CORE_FILE, Damage, Fault, ImageError, Record, RecordKind, Result,
    blob::{self, BlobIndex},
    check,
    error::At,
    frame::{Frame, FrameReader, MAX_BLOB_RECORD, MAX_RECORD},
    manifest::Manifest,
    pages,
    records::{
        DescriptorTable, GhostFile, Handle, Header, MappedFile, MemoryMap, NamespaceObject, Object, PageMap,
        Shard, SharedSegment, Task, TaskRecord,
    },
    shard_file_name, shard_index,
};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::File,
    path::{Path, PathBuf},
};

/// An image that was read and found to be sound. Holds no descriptor. The pages are checked by
/// [`verify_pages`](Self::verify_pages) or as they are loaded, with [`check_chunk`](Self::check_chunk).
#[derive(Debug, Default)]
pub struct Image {
    /// The directory, as an absolute path.
    pub directory: PathBuf,
    /// What must be known first.
    pub header: Header,
    /// Processes, in the order in which they were written.
    pub tasks: Vec<Task>,
    /// Memory descriptors by id.
    pub memory_maps: BTreeMap<u32, MemoryMap>,
    /// Files that are mapped, by id.
    pub mapped_files: BTreeMap<u32, MappedFile>,
    /// Files without their names, by id.
    pub ghosts: BTreeMap<u32, GhostFile>,
    /// Shared anonymous segments by id.
    pub segments: BTreeMap<u32, SharedSegment>,
    /// Where the pages of memory maps are, by id of the memory map.
    pub page_maps: BTreeMap<u32, PageMap>,
    /// Where the pages of shared segments are, by id of the segment.
    pub segment_pages: BTreeMap<u32, PageMap>,
    /// Page files by index.
    pub shards: BTreeMap<u32, Shard>,
    /// Descriptor tables by id.
    pub tables: BTreeMap<u32, DescriptorTable>,
    /// Open file descriptions by id.
    pub handles: BTreeMap<u32, Handle>,
    /// Resources of plugins by id.
    pub objects: BTreeMap<u32, Object>,
    /// Namespaces by id.
    pub namespaces: BTreeMap<u32, NamespaceObject>,
    /// What Task hooks keep.
    pub task_records: Vec<TaskRecord>,
    /// Records of unknown kind or version ([`inspect`](Self::inspect) only).
    pub unknown: Vec<UnknownRecord>,
    /// What a restore would refuse ([`inspect`](Self::inspect) only).
    pub fault: Option<Fault>,
    pub(super) blobs: BlobIndex,
}

/// A record that this program does not know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownRecord {
    /// Number of its kind.
    pub kind: u16,
    /// Its version.
    pub version: u16,
    /// Its length in bytes.
    pub length: usize,
}

impl Frame<'_> {
    pub(super) fn unknown(&self, path: &Path) -> ImageError {
        ImageError::UnknownRecord {
            path: path.into(),
            offset: self.offset,
            kind: self.kind,
            version: self.version,
        }
    }

    fn get<R: Record>(&self, path: &Path) -> Result<R> {
        self.decode(R::KIND, path)
    }
}

impl Image {
    /// Reads and checks an image, all but its pages.
    pub fn open(directory: &Path) -> Result<Self> {
        let image = Self::read(directory, false)?;
        check::check(&image).map_err(|fault| image.inconsistent(fault))?;
        Ok(image)
    }

    /// Reads what can be read: records of unknown kind are listed, and contradictions are noted in `fault`.
    pub fn inspect(directory: &Path) -> Result<Self> {
        let mut image = Self::read(directory, true)?;
        if image.fault.is_none() {
            image.fault = check::check(&image).err();
        }
        Ok(image)
    }

    fn inconsistent(&self, fault: Fault) -> ImageError {
        ImageError::Inconsistent { directory: self.directory.clone(), fault: Box::new(fault) }
    }

    fn read(directory: &Path, lenient: bool) -> Result<Self> {
        let directory = directory.canonicalize().at("open", directory)?;
        let manifest = Manifest::read(&directory)?;
        for (name, entry) in &manifest.files {
            let known = [CORE_FILE, BLOBS_FILE].contains(&name.as_str()) || shard_index(name).is_some();
            let path = directory.join(name);
            if !known {
                return Err(Damage::Manifest.at(&path, 0));
            }
            let metadata = std::fs::metadata(&path).at("open", &path)?;
            let found = metadata.len();
            // A fifo, say, would block when it is opened.
            if !metadata.is_file() || found != entry.length {
                return Err(Damage::FileLength { found, expected: entry.length }.at(&path, 0));
            }
        }
        let mut image = Self { directory, ..Self::default() };
        let mut reader = image.framed(&manifest, CORE_FILE, MAX_RECORD)?;
        if let Some(reader) = &mut reader {
            image.read_records(reader, lenient)?;
        }
        image.check_end(&manifest, CORE_FILE, reader)?;
        if let Some(mut reader) = image.framed(&manifest, BLOBS_FILE, MAX_BLOB_RECORD)? {
            image.blobs = blob::index(&mut reader)?;
            image.check_end(&manifest, BLOBS_FILE, Some(reader))?;
        }
        image.check_shards(&manifest)?;
        Ok(image)
    }

    fn framed(&self, manifest: &Manifest, name: &str, limit: usize) -> Result<Option<FrameReader>> {
        let listed = manifest.files.contains_key(name);
        listed.then(|| FrameReader::open(&self.directory.join(name), limit)).transpose()
    }

    /// Whether the file ended as the manifest says.
    fn check_end(&self, manifest: &Manifest, name: &str, reader: Option<FrameReader>) -> Result<()> {
        let path = self.directory.join(name);
        let end = reader.and_then(|reader| reader.end()).ok_or_else(|| Damage::CutOff.at(&path, 0))?;
        match manifest.files.get(name).and_then(|entry| entry.checksum) {
            Some(expected) if expected == end.checksum => Ok(()),
            Some(expected) => Err(Damage::Checksum { found: end.checksum, expected }.at(&path, end.length)),
            None => Err(Damage::Manifest.at(&path, 0)),
        }
    }

    /// Page files: manifest and records say the same.
    fn check_shards(&self, manifest: &Manifest) -> Result<()> {
        for (name, entry) in &manifest.files {
            let Some(index) = shard_index(name) else { continue };
            let path = self.directory.join(name);
            let recorded = self.shards.get(&index).map_or(0, |shard| shard.length);
            if !self.shards.contains_key(&index) || recorded != entry.length {
                return Err(Damage::FileLength { found: entry.length, expected: recorded }.at(&path, 0));
            }
        }
        for shard in self.shards.values() {
            let path = self.shard_path(shard.index);
            if !manifest.files.contains_key(&shard_file_name(shard.index)) {
                return Err(Damage::FileLength { found: 0, expected: shard.length }.at(&path, 0));
            }
            let chunk = shard.chunk;
            if !chunk.is_power_of_two() || !(4096..=pages::MAX_CHUNK).contains(&chunk) {
                let (length, limit) = (u64::from(chunk), u64::from(pages::MAX_CHUNK));
                return Err(Damage::Length { length, available: shard.length, limit }.at(&path, 0));
            }
            let expected = shard.length.div_ceil(u64::from(chunk));
            let found = shard.checksums.len();
            if found as u64 != expected {
                return Err(Damage::ChunkCount { found, expected }.at(&path, 0));
            }
        }
        Ok(())
    }

    fn read_records(&mut self, reader: &mut FrameReader, lenient: bool) -> Result<()> {
        let path = reader.path().to_owned();
        let mut first = true;
        while let Some(frame) = reader.next()? {
            let known = RecordKind::from_number(frame.kind).filter(|k| frame.version <= k.version());
            let Some(kind) = known else {
                if !lenient {
                    return Err(frame.unknown(&path));
                }
                let UnknownRecord { kind, version, length } =
                    UnknownRecord { kind: frame.kind, version: frame.version, length: frame.payload.len() };
                self.unknown.push(UnknownRecord { kind, version, length });
                continue;
            };
            if first != (kind == RecordKind::Header) {
                return Err(Damage::Misplaced(kind).at(&path, frame.offset));
            }
            first = false;
            if let Err(fault) = self.take(kind, &frame, &path)? {
                if !lenient {
                    return Err(self.inconsistent(fault));
                }
                self.fault.get_or_insert(fault);
            }
        }
        if first {
            return Err(Damage::Misplaced(RecordKind::Trailer).at(&path, super::frame::FILE_HEADER));
        }
        Ok(())
    }

    /// Puts a record where it belongs.
    fn take(
        &mut self,
        kind: RecordKind,
        frame: &Frame<'_>,
        path: &Path,
    ) -> Result<std::result::Result<(), Fault>> {
        match kind {
            RecordKind::Header => self.header = frame.get(path)?,
            RecordKind::Task => self.tasks.push(frame.get(path)?),
            RecordKind::TaskRecord => self.task_records.push(frame.get(path)?),
            RecordKind::MemoryMap => return Ok(insert(&mut self.memory_maps, frame.get(path)?, |r| r.id)),
            RecordKind::MappedFile => return Ok(insert(&mut self.mapped_files, frame.get(path)?, |r| r.id)),
            RecordKind::GhostFile => return Ok(insert(&mut self.ghosts, frame.get(path)?, |r| r.id)),
            RecordKind::SharedSegment => return Ok(insert(&mut self.segments, frame.get(path)?, |r| r.id)),
            RecordKind::Shard => return Ok(insert(&mut self.shards, frame.get(path)?, |r| r.index)),
            RecordKind::DescriptorTable => return Ok(insert(&mut self.tables, frame.get(path)?, |r| r.id)),
            RecordKind::Handle => return Ok(insert(&mut self.handles, frame.get(path)?, |r| r.id)),
            RecordKind::Object => return Ok(insert(&mut self.objects, frame.get(path)?, |r| r.id)),
            RecordKind::Namespace => return Ok(insert(&mut self.namespaces, frame.get(path)?, |r| r.id)),
            RecordKind::PageMap => self.take_page_map(frame.get(path)?),
            RecordKind::Blob | RecordKind::Trailer => {
                return Err(Damage::Misplaced(kind).at(path, frame.offset));
            }
        }
        Ok(Ok(()))
    }

    /// Page maps of one owner continue each other.
    fn take_page_map(&mut self, map: PageMap) {
        let owners = if map.segment != 0 { &mut self.segment_pages } else { &mut self.page_maps };
        let id = if map.segment != 0 { map.segment } else { map.mm };
        match owners.entry(id) {
            Entry::Vacant(entry) => drop(entry.insert(map)),
            Entry::Occupied(mut entry) => {
                entry.get_mut().extents.extend(map.extents);
                entry.get_mut().guards.extend(map.guards);
            }
        }
    }

    /// Path of a page file.
    pub fn shard_path(&self, index: u32) -> PathBuf {
        self.directory.join(shard_file_name(index))
    }

    /// Opens a page file.
    pub fn shard_file(&self, index: u32) -> Result<File> {
        let path = self.shard_path(index);
        File::open(&path).at("open", &path)
    }

    /// Checks every chunk of every page file, with several threads.
    pub fn verify_pages(&self, threads: usize) -> Result<()> {
        pages::verify(self, threads)
    }

    /// Checks chunk `number` (of [`Shard::chunk`] bytes each) of a page file, which the caller has read.
    pub fn check_chunk(&self, shard: &Shard, number: usize, data: &[u8]) -> Result<()> {
        pages::check_chunk(shard, number, data, &self.shard_path(shard.index))
    }

    /// The blobs, for reading by position.
    pub fn blobs(&self) -> Result<BlobStore<'_>> {
        BlobStore::open(self)
    }

    /// One blob, from front to back; one that was never written is empty.
    pub fn blob_reader(&self, plugin: &str, name: &str) -> Result<BlobReader<'_>> {
        Ok(BlobReader { store: self.blobs()?, plugin: plugin.into(), name: name.into(), offset: 0 })
    }

    /// All blobs: plugin, name, bytes.
    pub fn blob_list(&self) -> Result<Vec<(&str, &str, u64)>> {
        let store = self.blobs()?;
        let names = self.blobs.iter().flat_map(|(plugin, blobs)| blobs.keys().map(move |n| (plugin, n)));
        Ok(names.map(|(plugin, name)| (plugin.as_str(), name.as_str(), store.length(plugin, name))).collect())
    }

    /// The task with this pid.
    pub fn task(&self, pid: i32) -> Option<&Task> {
        self.tasks.iter().find(|task| task.pid == pid)
    }
}

fn insert<R: Record>(
    map: &mut BTreeMap<u32, R>,
    record: R,
    id: impl Fn(&R) -> u32,
) -> std::result::Result<(), Fault> {
    match map.entry(id(&record)) {
        Entry::Vacant(entry) => {
            entry.insert(record);
            Ok(())
        }
        Entry::Occupied(entry) => Err(Fault::Duplicate { kind: R::KIND, id: u64::from(*entry.key()) }),
    }
}
