//! Page files: checksums of their chunks.

use super::{Damage, Image, ImageError, Result, error::At, records::Shard, shard_file_name};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

/// Bytes per checksum that this program writes.
pub const CHUNK: u32 = 1 << 20;
/// A reader takes memory for one chunk, so chunks have a limit.
pub(super) const MAX_CHUNK: u32 = 4 << 20;

/// Checksum of the chunk at `offset`, which has `length` bytes.
fn chunk_checksum(file: &File, offset: u64, length: usize, buffer: &mut Vec<u8>) -> std::io::Result<u32> {
    buffer.resize(length, 0);
    file.read_exact_at(buffer, offset)?;
    Ok(crc32fast::hash(buffer))
}

/// Length of chunk `number` of a file of `total` bytes.
fn chunk_length(number: usize, chunk: u32, total: u64) -> usize {
    total.saturating_sub(number as u64 * u64::from(chunk)).min(u64::from(chunk)) as usize
}

/// Computes the checksums of a page file in a thread of its own while the file is being written: it follows what
/// [`written`](Self::written) says. The pages are in the page cache, so no disk is read.
pub struct ShardChecksums {
    index: u32,
    shared: Arc<Progress>,
    thread: Option<JoinHandle<std::io::Result<Vec<u32>>>>,
}

#[derive(Default)]
struct Progress {
    /// Bytes written so far, and whether that is all.
    state: Mutex<(u64, bool)>,
    changed: Condvar,
    abandoned: AtomicBool,
}

impl Progress {
    /// Waits until `wanted` bytes are there or no more will come; how many there are then.
    fn wait_for(&self, wanted: u64) -> (u64, bool) {
        let guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *self
            .changed
            .wait_while(guard, |(written, all)| *written < wanted && !*all)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, written: u64, all: bool) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = (written, all);
        self.changed.notify_one();
    }
}

impl ShardChecksums {
    /// Starts following `file`, page file `index`.
    pub fn start(index: u32, file: File) -> Result<Self> {
        let shared = Arc::new(Progress::default());
        let progress = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(format!("checksum-{index}"))
            .spawn(move || follow(&file, &progress))
            .at("start a checksum thread for", Path::new(&shard_file_name(index)))?;
        Ok(Self { index, shared, thread: Some(thread) })
    }

    /// The first `length` bytes of the file are as they will stay.
    pub fn written(&self, length: u64) {
        self.shared.set(length, false);
    }

    /// The file is complete with `length` bytes: waits for the checksums.
    pub fn finish(mut self, length: u64) -> Result<Shard> {
        self.shared.set(length, true);
        let name = shard_file_name(self.index);
        let path = Path::new(&name);
        let checksums = match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result.at("read", path)?,
            _ => return Err(ImageError::Thread { path: path.into() }),
        };
        Ok(Shard { index: self.index, length, chunk: CHUNK, checksums })
    }
}

impl Drop for ShardChecksums {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.shared.abandoned.store(true, Ordering::Relaxed);
            self.shared.set(0, true);
            // What it would say does not matter any more.
            let _ = thread.join();
        }
    }
}

fn follow(file: &File, progress: &Progress) -> std::io::Result<Vec<u32>> {
    let mut buffer = Vec::new();
    let mut checksums = Vec::new();
    loop {
        let end = (checksums.len() as u64 + 1) * u64::from(CHUNK);
        let (written, all) = progress.wait_for(end);
        if progress.abandoned.load(Ordering::Relaxed) {
            return Ok(checksums);
        }
        let length = chunk_length(checksums.len(), CHUNK, written);
        if length == 0 && all {
            return Ok(checksums);
        }
        checksums.push(chunk_checksum(file, end - u64::from(CHUNK), length, &mut buffer)?);
    }
}

/// The same for complete files, with several threads: (index, file, length) of each.
pub fn checksum_shards(files: &[(u32, &File, u64)], threads: usize) -> Result<Vec<Shard>> {
    let chunks: Vec<(usize, usize)> = files
        .iter()
        .enumerate()
        .flat_map(|(n, (_, _, length))| {
            (0..length.div_ceil(u64::from(CHUNK)) as usize).map(move |chunk| (n, chunk))
        })
        .collect();
    let checksums = in_parallel(threads, chunks.len(), |i, buffer| {
        let (n, chunk) = chunks[i];
        let (index, file, total) = files[n];
        let offset = chunk as u64 * u64::from(CHUNK);
        chunk_checksum(file, offset, chunk_length(chunk, CHUNK, total), buffer)
            .at("read", Path::new(&shard_file_name(index)))
    })?;
    let mut shards: Vec<Shard> = files
        .iter()
        .map(|(index, _, length)| Shard {
            index: *index,
            length: *length,
            chunk: CHUNK,
            checksums: Vec::new(),
        })
        .collect();
    for ((n, _), checksum) in chunks.iter().zip(checksums) {
        shards[*n].checksums.push(checksum);
    }
    Ok(shards)
}

/// Runs `work(0..count)` in `threads` threads, each with a buffer of its own; results in order, or the first error.
fn in_parallel<T: Send>(
    threads: usize,
    count: usize,
    work: impl Fn(usize, &mut Vec<u8>) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let run = || {
        let mut buffer = Vec::new();
        let mut done = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return Ok(done);
            }
            match work(i, &mut buffer) {
                Ok(value) => done.push((i, value)),
                Err(error) => {
                    // The others need not go on.
                    next.store(count, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    };
    let threads = threads.clamp(1, count.max(1));
    let mut all: Vec<(usize, T)> = if threads == 1 {
        run()?
    } else {
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
            workers.into_iter().try_fold(Vec::new(), |mut all, worker| {
                let part = worker.join().map_err(|_| ImageError::Thread { path: "page files".into() })?;
                all.extend(part?);
                Ok(all)
            })
        })?
    };
    all.sort_unstable_by_key(|(i, _)| *i);
    Ok(all.into_iter().map(|(_, value)| value).collect())
}

/// Checks one chunk that a reader has in memory.
pub(super) fn check_chunk(shard: &Shard, number: usize, data: &[u8], path: &Path) -> Result<()> {
    let found = crc32fast::hash(data);
    let offset = number as u64 * u64::from(shard.chunk);
    match shard.checksums.get(number) {
        Some(&expected) if expected == found => Ok(()),
        Some(&expected) => Err(Damage::Checksum { found, expected }.at(path, offset)),
        None => Err(Damage::CutOff.at(path, offset)),
    }
}

/// Checks all chunks of all page files.
pub(super) fn verify(image: &Image, threads: usize) -> Result<()> {
    let mut files = Vec::new();
    let mut chunks = Vec::new();
    for shard in image.shards.values() {
        let path = image.shard_path(shard.index);
        files.push((shard, File::open(&path).at("open", &path)?, path));
        chunks.extend((0..shard.checksums.len()).map(|chunk| (files.len() - 1, chunk)));
    }
    in_parallel(threads, chunks.len(), |i, buffer| {
        let (n, number) = chunks[i];
        let (shard, file, path) = &files[n];
        let length = chunk_length(number, shard.chunk, shard.length);
        buffer.resize(length, 0);
        let offset = number as u64 * u64::from(shard.chunk);
        match file.read_exact_at(buffer, offset) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Err(Damage::CutOff.at(path, offset));
            }
            other => other.at("read", path)?,
        }
        check_chunk(shard, number, buffer, path)
    })?;
    Ok(())
}
