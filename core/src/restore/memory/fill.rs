//! Getting pages from the page files into arenas.
//!
//! Measured (KERNEL.md, and `fill_speed` in the tests): UFFDIO_COPY is the fastest way to fill 4 KiB pages, and puts
//! such pages even where transparent huge pages are wanted; pread(2) is the fastest for huge ones, and works everywhere.

use super::{MemoryError, PAGE};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

/// Most bytes that one call fills.
const CHUNK: u64 = 4 << 20;
/// From how many bytes on a mapping is worth a registration with userfaultfd(2).
const WORTH_COPYING: u64 = 128 << 10;

/// From how many bytes on a piece is worth a UFFDIO_COPY of its own.
const LARGE: u64 = 32 << 10;
/// Most pieces that one call reads (IOV_MAX).
const VECTORS: usize = 1024;

/// The page files of an image, open and mapped; shard numbers are indexes.
#[derive(Debug)]
pub struct PageFiles {
    files: Vec<PageFile>,
}

#[derive(Debug)]
struct PageFile {
    file: File,
    address: u64,
    len: u64,
}

impl PageFiles {
    /// Maps the page files, given in order of their shard numbers.
    pub fn new(files: Vec<File>) -> Result<Self, MemoryError> {
        let map = |(index, file): (usize, File)| {
            let failed = |source| MemoryError::PageFile { shard: index as u32, source };
            let len = file.metadata().map_err(failed)?.len();
            let size = usize::try_from(len).unwrap_or(usize::MAX);
            if size == 0 {
                return Ok(PageFile { file, address: 0, len });
            }
            // SAFETY: a new mapping at an address of the kernel's choice.
            let address = unsafe {
                libc::mmap(ptr::null_mut(), size, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
            };
            if address == libc::MAP_FAILED {
                return Err(failed(io::Error::last_os_error()));
            }
            Ok(PageFile { file, address: address as u64, len })
        };
        Ok(Self { files: files.into_iter().enumerate().map(map).collect::<Result<_, _>>()? })
    }

    fn get(&self, shard: u32, end: u64) -> Result<&PageFile, MemoryError> {
        let short = || MemoryError::PageFile { shard, source: io::ErrorKind::UnexpectedEof.into() };
        self.files.get(shard as usize).filter(|file| end <= file.len).ok_or_else(short)
    }
}

impl Drop for PageFiles {
    fn drop(&mut self) {
        for file in self.files.iter().filter(|file| file.len > 0) {
            // SAFETY: the mapping that `new` made; nobody has a reference into it.
            unsafe { libc::munmap(file.address as *mut _, file.len as usize) };
        }
    }
}

/// A piece of an arena to fill.
#[derive(Debug, Clone)]
pub struct Job {
    /// Home addresses, for messages.
    pub home: Range<u64>,
    /// Where it is filled.
    pub arena: u64,
    /// Page file.
    pub shard: u32,
    /// Offset in it.
    pub offset: u64,
    /// Fresh 4 KiB pages of anonymous memory: UFFDIO_COPY may be used.
    pub fresh: bool,
}

impl Job {
    fn len(&self) -> u64 {
        self.home.end - self.home.start
    }
}

/// Joins jobs that continue one another.
pub fn join(jobs: Vec<Job>) -> Vec<Job> {
    let mut joined: Vec<Job> = Vec::with_capacity(jobs.len());
    for job in jobs {
        match joined.last_mut() {
            Some(last)
                if last.home.end == job.home.start
                    && last.arena + last.len() == job.arena
                    && last.shard == job.shard
                    && last.offset + last.len() == job.offset
                    && last.fresh == job.fresh =>
            {
                last.home.end = job.home.end;
            }
            _ => joined.push(job),
        }
    }
    joined
}

/// Cuts a job at the bounds of mappings; what is in none of them can't be copied.
fn cut(mut job: Job, mappings: &[Range<u64>]) -> Vec<Job> {
    let mut pieces = Vec::new();
    while job.len() > 0 {
        let mapping = mappings.get(mappings.partition_point(|mapping| mapping.end <= job.arena));
        let (end, fresh) = match mapping {
            Some(mapping) if mapping.start <= job.arena => (mapping.end, job.fresh),
            Some(mapping) => (mapping.start, false),
            None => (u64::MAX, false),
        };
        let len = job.len().min(end - job.arena);
        let home = job.home.start..job.home.start + len;
        pieces.push(Job { home: home.clone(), fresh, ..job.clone() });
        job = Job { home: home.end..job.home.end, arena: job.arena + len, offset: job.offset + len, ..job };
    }
    pieces
}

/// Does the jobs, which are ascending. `mappings` are the arenas of fresh anonymous memory.
pub fn fill(jobs: Vec<Job>, mappings: &[Range<u64>], pages: &PageFiles, pid: i32) -> Result<(), MemoryError> {
    let pieces = join(jobs).into_iter().flat_map(|job| cut(job, mappings));
    let (fresh, others): (Vec<Job>, Vec<Job>) = pieces.partition(|job| job.fresh);
    let mut reads: Vec<&Job> = others.iter().collect();
    let mut copied: Vec<&Job> = Vec::new();
    let mut registered: Vec<&Range<u64>> = Vec::new();
    // Pieces that may be copied lie in mappings, all of them.
    let mut rest = fresh.as_slice();
    for mapping in mappings {
        let (inside, after) = rest.split_at(rest.partition_point(|job| job.arena < mapping.end));
        rest = after;
        // Small pieces go by the thousand into one preadv(2).
        let (large, small): (Vec<&Job>, Vec<&Job>) = inside.iter().partition(|job| job.len() >= LARGE);
        reads.extend(small);
        if large.iter().map(|job| job.len()).sum::<u64>() >= WORTH_COPYING {
            registered.push(mapping);
            copied.extend(large);
        } else {
            reads.extend(large);
        }
    }
    reads.sort_by_key(|job| (job.shard, job.offset));
    // Those first: a page that is missing in a registered mapping can't be faulted in by preadv(2).
    for batch in reads.chunk_by(|one, two| one.shard == two.shard && one.offset + one.len() == two.offset) {
        for batch in batch.chunks(VECTORS) {
            read_batch(batch, pages, pid)?;
        }
    }
    if copied.is_empty() {
        return Ok(());
    }
    match Userfault::new(&registered) {
        Ok(userfault) => copied.into_iter().try_for_each(|job| userfault.copy(job, pages, pid)),
        // Not permitted, or not built into the kernel.
        Err(_) => copied.into_iter().try_for_each(|job| {
            populate(job);
            read(job, pages, pid)
        }),
    }
}

/// Faults pages in, many at a time. Only makes [`read`] faster, so that its failure is none.
fn populate(job: &Job) {
    // SAFETY: the job's arena is a mapping of ours.
    unsafe { libc::madvise(job.arena as *mut _, job.len() as usize, libc::MADV_POPULATE_WRITE) };
}

/// Reads adjoining parts of a page file to several places with one call.
fn read_batch(jobs: &[&Job], pages: &PageFiles, pid: i32) -> Result<(), MemoryError> {
    if let [first, _, ..] = jobs {
        let len: u64 = jobs.iter().map(|job| job.len()).sum();
        let file = pages.get(first.shard, first.offset.saturating_add(len))?;
        let places: Vec<_> = jobs
            .iter()
            .map(|job| libc::iovec { iov_base: job.arena as *mut _, iov_len: job.len() as usize })
            .collect();
        let (fd, count) = (file.file.as_raw_fd(), places.len() as i32);
        // SAFETY: the kernel writes to the jobs' arenas, mappings of ours that no reference points into.
        let got = unsafe { libc::preadv(fd, places.as_ptr(), count, first.offset as i64) };
        if got as u64 == len {
            return Ok(());
        }
    }
    // One by one, as after an interruption; this also tells which of them fails.
    jobs.iter().try_for_each(|job| read(job, pages, pid))
}

fn read(job: &Job, pages: &PageFiles, pid: i32) -> Result<(), MemoryError> {
    let file = pages.get(job.shard, job.offset.saturating_add(job.len()))?;
    let mut done = 0;
    while done < job.len() {
        // SAFETY: the kernel writes to the job's arena, a mapping of ours that no reference points into.
        let got = unsafe {
            libc::pread(
                file.file.as_raw_fd(),
                (job.arena + done) as *mut _,
                (job.len() - done) as usize,
                (job.offset + done) as i64,
            )
        };
        match got {
            0 => {
                return Err(MemoryError::PageFile {
                    shard: job.shard,
                    source: io::ErrorKind::UnexpectedEof.into(),
                });
            }
            got if got > 0 => done += got as u64,
            _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            _ => return Err(MemoryError::last("filling the memory", &job.home, pid)),
        }
    }
    Ok(())
}

// linux/userfaultfd.h; the libc crate has none of it.
const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: i32 = 1;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_COPY: u64 = 0xc028_aa03;

/// A userfaultfd(2). Closing it takes the registrations back.
struct Userfault(OwnedFd);

impl Userfault {
    fn new(mappings: &[&Range<u64>]) -> io::Result<Self> {
        // No fault is ever handled, so the mode that needs no privilege is enough.
        // SAFETY: makes a descriptor.
        let raw = unsafe {
            libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY)
        };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, ours alone.
        let made = Self(unsafe { OwnedFd::from_raw_fd(raw as i32) });
        made.control(UFFDIO_API, &mut [UFFD_API, 0, 0])?;
        for mapping in mappings {
            let len = mapping.end - mapping.start;
            made.control(UFFDIO_REGISTER, &mut [mapping.start, len, UFFDIO_REGISTER_MODE_MISSING, 0])?;
        }
        Ok(made)
    }

    fn control<const N: usize>(&self, request: u64, argument: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: every request of this file has N words, which the kernel reads and writes.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn copy(&self, job: &Job, pages: &PageFiles, pid: i32) -> Result<(), MemoryError> {
        let file = pages.get(job.shard, job.offset.saturating_add(job.len()))?;
        let mut done = 0;
        while done < job.len() {
            let len = CHUNK.min(job.len() - done);
            let from = file.address + job.offset + done;
            // Page tables of the source in one go: a fault in the middle of the copy costs a retry.
            // SAFETY: reads the mapping of the page file.
            unsafe {
                libc::madvise((from & !(PAGE - 1)) as *mut _, len as usize, libc::MADV_POPULATE_READ);
            }
            let mut argument = [job.arena + done, from, len, 0, 0];
            match self.control(UFFDIO_COPY, &mut argument) {
                Ok(()) => done += len,
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    done += u64::try_from(argument[4] as i64).unwrap_or(0);
                }
                Err(source) => {
                    let range = job.home.clone();
                    return Err(MemoryError::System { operation: "filling the memory", range, pid, source });
                }
            }
        }
        Ok(())
    }
}
