//! Copying pages from outside: the way for small processes, for what a fork does not preserve, and the fallback for
//! tasks that cannot write themselves (RLIMIT_FSIZE, a full descriptor table).

use super::{
    MemoryError, PAGE,
    plan::{Run, ZeroRun},
};
use nix::errno::Errno;
use std::{fs::File, io::IoSlice, os::unix::fs::FileExt};

/// Bytes copied at once: large enough to amortise the calls, small enough to stay in the cache between reading and writing.
const BUFFER: usize = 1 << 20;
/// IOV_MAX.
const VECTORS: usize = 1024;

/// Where pages come from.
#[derive(Debug)]
pub enum Source<'a> {
    /// The memory of a frozen process.
    Process {
        /// The process.
        pid: i32,
        /// Its `/proc/PID/mem`, which reads inaccessible pages, too.
        memory: &'a File,
    },
    /// A shared memory segment, by the file behind it; addresses are offsets.
    Segment {
        /// For messages.
        pid: i32,
        /// The file.
        file: &'a File,
    },
}

impl Source<'_> {
    /// Fills `buffer` from the runs, which together are as long.
    fn read(&self, runs: &[(u64, usize)], buffer: &mut [u8]) -> Result<(), MemoryError> {
        match self {
            // Not process_vm_readv(2), although it is faster: it pins pages, for which the kernel gives the task a copy of its
            // own of every page that it shares since a fork (gup_must_unshare, mm/internal.h).
            Self::Process { pid, memory } => read_file(*pid, memory, runs, buffer),
            Self::Segment { pid, file } => read_file(*pid, file, runs, buffer),
        }
    }
}

fn read_file(pid: i32, file: &File, runs: &[(u64, usize)], buffer: &mut [u8]) -> Result<(), MemoryError> {
    let mut rest = buffer;
    for &(address, length) in runs {
        let (part, tail) = rest.split_at_mut(length);
        file.read_exact_at(part, address).map_err(|error| MemoryError::Task {
            operation: "read the memory",
            pid,
            address,
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
        })?;
        rest = tail;
    }
    Ok(())
}

/// Copies `runs` into page file `shard`. Pages of zeros are not written but reported, except huge ones. `progress` is
/// told the bytes of each step.
pub fn copy(
    source: &Source<'_>,
    runs: &[Run],
    shard: u32,
    file: &File,
    zeros: &mut Vec<ZeroRun>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(), MemoryError> {
    let mut buffer = vec![0_u8; BUFFER];
    let mut pending: Vec<Run> = Vec::new();
    let mut filled = 0;
    for run in runs {
        let mut run = *run;
        while run.length > 0 {
            let length = run.length.min((BUFFER - filled) as u64);
            pending.push(Run { length, ..run });
            filled += length as usize;
            run = Run {
                address: run.address + length,
                length: run.length - length,
                offset: run.offset + length,
                ..run
            };
            if filled == BUFFER {
                flush(source, &pending, &mut buffer, shard, file, zeros)?;
                progress(filled as u64);
                pending.clear();
                filled = 0;
            }
        }
    }
    flush(source, &pending, &mut buffer[..filled], shard, file, zeros)?;
    progress(filled as u64);
    Ok(())
}

fn flush(
    source: &Source<'_>,
    runs: &[Run],
    buffer: &mut [u8],
    shard: u32,
    file: &File,
    zeros: &mut Vec<ZeroRun>,
) -> Result<(), MemoryError> {
    let remote: Vec<(u64, usize)> = runs.iter().map(|run| (run.address, run.length as usize)).collect();
    source.read(&remote, buffer)?;
    // Neighbours in memory are mostly neighbours in the page file too: gather them into one write.
    let mut at = 0;
    let mut stretch: Vec<IoSlice<'_>> = Vec::new();
    let mut start = 0;
    let mut next = 0;
    for run in runs {
        let bytes = &buffer[at..at + run.length as usize];
        at += bytes.len();
        for (offset, part, zero) in parts(run, bytes) {
            if zero {
                add_zeros(zeros, ZeroRun { shard, offset, length: part.len() as u64 });
                continue;
            }
            if offset != next || stretch.len() == VECTORS {
                write(file, shard, &stretch, start)?;
                stretch.clear();
                start = offset;
            }
            stretch.push(IoSlice::new(part));
            next = offset + part.len() as u64;
        }
    }
    write(file, shard, &stretch, start)
}

/// Cuts a run into stretches of zero and other pages: (offset in the page file, bytes, whether zero).
fn parts<'a>(run: &Run, bytes: &'a [u8]) -> Vec<(u64, &'a [u8], bool)> {
    if run.huge {
        return vec![(run.offset, bytes, false)];
    }
    let mut parts: Vec<(u64, &[u8], bool)> = Vec::new();
    let mut start = 0;
    let mut kind = None;
    for (index, page) in bytes.chunks(PAGE as usize).enumerate() {
        let zero = is_zero(page);
        if kind.is_some_and(|kind| kind != zero) {
            parts.push((run.offset + start as u64, &bytes[start..index * PAGE as usize], !zero));
            start = index * PAGE as usize;
        }
        kind = Some(zero);
    }
    parts.extend(kind.map(|zero| (run.offset + start as u64, &bytes[start..], zero)));
    parts
}

/// Whether a page is all zeros; other pages are told by their first bytes as a rule.
fn is_zero(page: &[u8]) -> bool {
    page.chunks(64).all(|line| line.iter().fold(0, |sum, byte| sum | byte) == 0)
}

fn add_zeros(zeros: &mut Vec<ZeroRun>, run: ZeroRun) {
    match zeros.last_mut() {
        Some(last) if last.shard == run.shard && last.offset + last.length == run.offset => {
            last.length += run.length
        }
        _ => zeros.push(run),
    }
}

fn write(file: &File, shard: u32, stretch: &[IoSlice<'_>], offset: u64) -> Result<(), MemoryError> {
    let mut offset = offset;
    let total: usize = stretch.iter().map(|slice| slice.len()).sum();
    if total == 0 {
        return Ok(());
    }
    let written = nix::sys::uio::pwritev(file, stretch, offset as i64)
        .map_err(|errno| MemoryError::Write { shard, errno })?;
    // A short write: the rest piece by piece, which gives the errno if there is one.
    let mut skip = written;
    for slice in stretch {
        if skip >= slice.len() {
            skip -= slice.len();
            offset += slice.len() as u64;
            continue;
        }
        file.write_all_at(&slice[skip..], offset + skip as u64).map_err(|error| MemoryError::Write {
            shard,
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
        })?;
        offset += slice.len() as u64;
        skip = 0;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn copies_runs_and_leaves_zero_pages_out() {
        let mut source = tempfile::tempfile().unwrap();
        let mut contents = vec![0_u8; 8 * 4096];
        for page in [0, 1, 3, 7] {
            contents[page * 4096 + 4095] = page as u8 + 1;
        }
        source.write_all(&contents).unwrap();
        let target = tempfile::tempfile().unwrap();
        let runs = [
            Run { address: 0, length: 5 * 4096, offset: 4096, huge: false },
            Run { address: 6 * 4096, length: 2 * 4096, offset: 6 * 4096, huge: true },
        ];
        let mut zeros = Vec::new();
        copy(&Source::Segment { pid: 0, file: &source }, &runs, 3, &target, &mut zeros, &|_| ()).unwrap();
        let zero = |page: u64| ZeroRun { shard: 3, offset: page * 4096, length: 4096 };
        assert_eq!(zeros, [zero(3), zero(5)]);
        let mut copied = vec![0_u8; 8 * 4096];
        target.read_exact_at(&mut copied, 0).unwrap();
        assert_eq!(copied[4096..6 * 4096], contents[..5 * 4096]);
        assert_eq!(copied[6 * 4096..], contents[6 * 4096..]);
    }

    #[test]
    fn reads_inaccessible_pages_of_a_process() {
        let length = std::num::NonZeroUsize::new(3 * 4096).unwrap();
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect};
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping of three pages, written within its bounds before one page is made inaccessible.
        let base = unsafe {
            let base = mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE).unwrap();
            std::ptr::write_bytes(base.cast::<u8>().as_ptr(), 7, 3 * 4096);
            mprotect(base.byte_add(4096), 4096, ProtFlags::PROT_NONE).unwrap();
            base.as_ptr() as u64
        };
        let pid = std::process::id() as i32;
        let memory = File::open("/proc/self/mem").unwrap();
        let target = tempfile::tempfile().unwrap();
        let run = Run { address: base, length: 3 * 4096, offset: 0, huge: false };
        copy(&Source::Process { pid, memory: &memory }, &[run], 0, &target, &mut Vec::new(), &|_| ())
            .unwrap();
        let mut copied = vec![0_u8; 3 * 4096];
        target.read_exact_at(&mut copied, 0).unwrap();
        assert!(copied.iter().all(|&byte| byte == 7));
    }
}
