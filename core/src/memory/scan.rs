//! PAGEMAP_SCAN (Documentation/admin-guide/mm/pagemap.rst): which pages have contents, without looking at holes.

use super::MemoryError;
use crate::proc::ProcDir;
use nix::{errno::Errno, fcntl::OFlag};
use std::{
    fs::File,
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::atomic::{AtomicBool, Ordering},
};

/// Page categories (include/uapi/linux/fs.h).
pub mod category {
    /// The page is of a file or shared memory.
    pub const FILE: u64 = 1 << 2;
    /// Present in memory.
    pub const PRESENT: u64 = 1 << 3;
    /// Swapped out.
    pub const SWAPPED: u64 = 1 << 4;
    /// The kernel's zero page.
    pub const ZERO: u64 = 1 << 5;
    /// Part of a huge page mapped as a whole.
    pub const HUGE: u64 = 1 << 6;
    /// A guard region (MADV_GUARD_INSTALL); since Linux 6.15.
    pub const GUARD: u64 = 1 << 8;
}

/// A run of pages of the same categories.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// Bits of [`category`].
    pub categories: u64,
}

/// struct pm_scan_arg.
#[repr(C)]
#[derive(Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

mod ioctl {
    #![allow(missing_docs)]
    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, super::ScanArguments);
}

/// With more regions per call some kernels return a stale `walk_end` (seen on 6.18).
const REGIONS_PER_CALL: usize = 512;

/// Whether this kernel tells guard regions from swapped pages. One that has them but does not tell (6.13, 6.14) lets nobody read
/// them, so that the dump fails there.
static KNOWS_GUARDS: AtomicBool = AtomicBool::new(true);

/// An open `/proc/PID/pagemap`.
#[derive(Debug)]
pub struct PageMapFile {
    pid: i32,
    file: File,
}

impl PageMapFile {
    /// Opens the page map of a process.
    pub fn open(proc: &ProcDir) -> Result<Self, MemoryError> {
        Ok(Self { pid: proc.pid(), file: proc.open_file("pagemap", OFlag::O_RDONLY)? })
    }

    /// All pages with contents in `[start, end)`: present or swapped, and not the zero page; and guard regions. Ascending.
    pub fn populated(&self, start: u64, end: u64) -> Result<Vec<Region>, MemoryError> {
        let mut found = Vec::new();
        let mut buffer = [Region::default(); REGIONS_PER_CALL];
        let mut from = start;
        while from < end {
            let guards = if KNOWS_GUARDS.load(Ordering::Relaxed) { category::GUARD } else { 0 };
            let mut arguments = ScanArguments {
                size: size_of::<ScanArguments>() as u64,
                start: from,
                end,
                vec: buffer.as_mut_ptr() as u64,
                vec_len: buffer.len() as u64,
                category_inverted: category::ZERO,
                category_mask: category::ZERO,
                category_anyof_mask: category::PRESENT | category::SWAPPED,
                return_mask: category::FILE | category::HUGE | category::SWAPPED | guards,
                ..ScanArguments::default()
            };
            // SAFETY: `vec` and `vec_len` describe `buffer`, which outlives the call.
            let count = match unsafe { ioctl::pagemap_scan(self.file.as_raw_fd(), &mut arguments) } {
                Ok(count) => count,
                Err(Errno::EINVAL) if guards != 0 => {
                    KNOWS_GUARDS.store(false, Ordering::Relaxed);
                    continue;
                }
                Err(errno) => {
                    let operation = "scan the page map";
                    return Err(MemoryError::Task { operation, pid: self.pid, address: from, errno });
                }
            };
            found.extend_from_slice(&buffer[..count as usize]);
            if arguments.walk_end <= from {
                break;
            }
            from = arguments.walk_end;
        }
        Ok(found)
    }

    /// The raw pagemap entries of `[start, start + 4096 * entries.len())`.
    pub fn entries(&self, start: u64, entries: &mut [u64]) -> Result<(), MemoryError> {
        // SAFETY: any bytes are a valid u64, and the slice covers exactly this memory.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(entries.as_mut_ptr().cast::<u8>(), std::mem::size_of_val(entries))
        };
        self.file.read_exact_at(bytes, start / super::PAGE * 8).map_err(|error| MemoryError::Task {
            operation: "read the page map",
            pid: self.pid,
            address: start,
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroUsize;

    #[test]
    fn finds_touched_pages_only_and_no_zero_page() {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
        let length = NonZeroUsize::new(1 << 30).unwrap();
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe { mmap_anonymous(None, length, protection, flags) }.unwrap().cast::<u8>();
        // SAFETY: all three offsets are inside the mapping; the read touches a page without writing it.
        unsafe {
            base.add(4096).write_volatile(1);
            base.add(4096 * 2).write_volatile(1);
            base.add(1 << 29).write_volatile(1);
            base.add(1 << 28).read_volatile();
        }
        let map = PageMapFile::open(&ProcDir::open(std::process::id() as i32).unwrap()).unwrap();
        let start = base.as_ptr() as u64;
        let found = map.populated(start, start + (1 << 30)).unwrap();
        let found: Vec<_> = found.iter().map(|r| (r.start - start, r.end - start)).collect();
        assert_eq!(found, [(4096, 4096 * 3), (1 << 29, (1 << 29) + 4096)]);
    }
}
