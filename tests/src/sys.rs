//! Thin safe faces on the system calls that workloads use and that `nix` has not.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::ctl::{Outcome, changed};

/// The page size of x86_64.
pub const PAGE: usize = 4096;
/// Readable and writable.
pub const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Private and anonymous.
pub const ANON: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// The n-th word of the pattern that grows from `seed` (SplitMix64).
pub fn word(seed: u64, n: usize) -> u64 {
    let mut z = seed.wrapping_add((n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `len` bytes of the pattern of `seed`.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    (0..len.div_ceil(8)).flat_map(|n| word(seed, n).to_le_bytes()).take(len).collect()
}

/// Turns -1 into errno.
pub fn cvt(result: i32) -> io::Result<i32> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The same for calls that return a long.
pub fn cvt_long(result: i64) -> io::Result<i64> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// fcntl(2) with an integer argument.
pub fn fcntl(fd: impl AsFd, cmd: i32, arg: i32) -> io::Result<i32> {
    // SAFETY: only commands with an integer argument or none are used with this face.
    cvt(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), cmd, arg) })
}

/// dup2(2) to a number that the caller has chosen.
pub fn dup_to(fd: impl AsFd, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: dup3 takes numbers; what it returns is owned by nobody else, for workloads choose free numbers.
    unsafe {
        cvt(libc::dup3(fd.as_fd().as_raw_fd(), number, 0))?;
        Ok(OwnedFd::from_raw_fd(number))
    }
}

/// pipe2(2): (reader, writer).
pub fn pipe(flags: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for two, and both are new.
    unsafe {
        cvt(libc::pipe2(fds.as_mut_ptr(), flags))?;
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

/// One read(2).
pub fn read(fd: impl AsFd, len: usize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; len];
    // SAFETY: the buffer has `len` bytes.
    let got =
        cvt_long(unsafe { libc::read(fd.as_fd().as_raw_fd(), buffer.as_mut_ptr().cast(), len) } as i64)?;
    buffer.truncate(got as usize);
    Ok(buffer)
}

/// One write(2).
pub fn write(fd: impl AsFd, data: &[u8]) -> io::Result<usize> {
    // SAFETY: the slice is readable for its length.
    cvt_long(unsafe { libc::write(fd.as_fd().as_raw_fd(), data.as_ptr().cast(), data.len()) } as i64)
        .map(|n| n as usize)
}

/// lseek(2) by nothing: the position.
pub fn position(fd: impl AsFd) -> io::Result<i64> {
    // SAFETY: takes numbers.
    cvt_long(unsafe { libc::lseek(fd.as_fd().as_raw_fd(), 0, libc::SEEK_CUR) })
}

/// What poll(2) says about a descriptor at this moment.
pub fn readiness(fd: impl AsFd, events: i16) -> io::Result<i16> {
    let mut entry = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events, revents: 0 };
    // SAFETY: one entry, which lives through the call.
    cvt(unsafe { libc::poll(&mut entry, 1, 0) })?;
    Ok(entry.revents)
}

/// The thread id of the caller.
pub fn gettid() -> i32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

/// The raw errno of a failed call, or 0.
pub fn errno_of<T>(result: &io::Result<T>) -> i32 {
    result.as_ref().err().and_then(io::Error::raw_os_error).unwrap_or(0)
}

/// A mapping that stays until the process ends (dropping it does nothing).
#[derive(Debug, Clone, Copy)]
pub struct Map {
    /// Its first address.
    pub addr: usize,
    /// Its length in bytes.
    pub len: usize,
}

impl Map {
    /// mmap(2) where the kernel likes.
    pub fn new(len: usize, prot: i32, flags: i32, fd: RawFd, offset: i64) -> io::Result<Map> {
        // SAFETY: no MAP_FIXED: nothing that exists is touched.
        let addr =
            unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags & !libc::MAP_FIXED, fd, offset) };
        if addr == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Map { addr: addr as usize, len })
        }
    }

    /// Private anonymous memory.
    pub fn anon(len: usize) -> io::Result<Map> {
        Map::new(len, RW, ANON, -1, 0)
    }

    /// Shared anonymous memory.
    pub fn shared(len: usize) -> io::Result<Map> {
        Map::new(len, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0)
    }

    /// A part of this mapping.
    pub fn part(&self, offset: usize, len: usize) -> Map {
        assert!(offset + len <= self.len);
        Map { addr: self.addr + offset, len }
    }

    /// One page of it.
    pub fn page(&self, n: usize) -> Map {
        self.part(n * PAGE, PAGE)
    }

    /// The number of pages.
    pub fn pages(&self) -> usize {
        self.len / PAGE
    }

    /// Reads the word at a byte offset.
    pub fn get(&self, offset: usize) -> u64 {
        assert!(offset + 8 <= self.len && offset.is_multiple_of(8));
        // SAFETY: inside the mapping, which is never unmapped but by `unmap`; at worst SIGSEGV ends the workload.
        unsafe { ((self.addr + offset) as *const u64).read_volatile() }
    }

    /// Writes the word at a byte offset.
    pub fn put(&self, offset: usize, value: u64) {
        assert!(offset + 8 <= self.len && offset.is_multiple_of(8));
        // SAFETY: as in `get`; no Rust object lives in a `Map`.
        unsafe { ((self.addr + offset) as *mut u64).write_volatile(value) }
    }

    /// Fills it with the pattern of `seed`.
    pub fn fill(&self, seed: u64) {
        (0..self.len / 8).for_each(|n| self.put(n * 8, word(seed, n)));
    }

    /// Compares it with the pattern of `seed`.
    #[track_caller]
    pub fn check(&self, what: &str, seed: u64) -> Outcome {
        match (0..self.len / 8).find(|&n| self.get(n * 8) != word(seed, n)) {
            None => Ok(()),
            Some(n) => Err(changed(format!(
                "{what}: byte {:#x} of {:#x} at {:#x} is {:#x}, was {:#x}",
                n * 8,
                self.len,
                self.addr,
                self.get(n * 8),
                word(seed, n)
            ))),
        }
    }

    /// Checks that it reads as zeroes.
    #[track_caller]
    pub fn check_zero(&self, what: &str) -> Outcome {
        match (0..self.len / 8).find(|&n| self.get(n * 8) != 0) {
            None => Ok(()),
            Some(n) => Err(changed(format!("{what}: byte {:#x} is {:#x}, was 0", n * 8, self.get(n * 8)))),
        }
    }

    /// mprotect(2) of all of it.
    pub fn protect(&self, prot: i32) -> io::Result<()> {
        // SAFETY: no Rust object lives in a `Map`.
        cvt(unsafe { libc::mprotect(self.addr as *mut _, self.len, prot) }).map(drop)
    }

    /// madvise(2) of all of it.
    pub fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: no Rust object lives in a `Map`.
        cvt(unsafe { libc::madvise(self.addr as *mut _, self.len, advice) }).map(drop)
    }

    /// munmap(2) of all of it.
    pub fn unmap(&self) -> io::Result<()> {
        // SAFETY: no Rust object lives in a `Map`, and the caller has no further use for this part.
        cvt(unsafe { libc::munmap(self.addr as *mut _, self.len) }).map(drop)
    }

    /// How many of its pages are resident, by mincore(2).
    pub fn resident(&self) -> io::Result<usize> {
        let mut map = vec![0u8; self.pages()];
        // SAFETY: one byte for each page.
        cvt(unsafe { libc::mincore(self.addr as *mut _, self.len, map.as_mut_ptr()) })?;
        Ok(map.iter().filter(|&&byte| byte & 1 == 1).count())
    }

    /// The page frame numbers, 0 where nothing is present or the reader lacks CAP_SYS_ADMIN
    /// (Documentation/admin-guide/mm/pagemap.rst).
    pub fn frames(&self) -> io::Result<Vec<u64>> {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::open("/proc/self/pagemap")?;
        let mut raw = vec![0u8; self.pages() * 8];
        file.read_exact_at(&mut raw, (self.addr / PAGE * 8) as u64)?;
        Ok(raw
            .chunks_exact(8)
            .map(|entry| u64::from_le_bytes(entry.try_into().unwrap_or_default()) & ((1 << 55) - 1))
            .collect())
    }

    /// The value of a `VmFlags`-style or size line of /proc/self/smaps for the mapping that starts at this address.
    pub fn smaps(&self, field: &str) -> io::Result<Option<String>> {
        let smaps = std::fs::read_to_string("/proc/self/smaps")?;
        let start = format!("{:08x}-", self.addr);
        Ok(smaps
            .lines()
            .skip_while(|line| !line.starts_with(&start))
            .skip(1)
            .take_while(|line| line.split(' ').next().is_some_and(|name| name.ends_with(':')))
            .find_map(|line| line.strip_prefix(field).map(|value| value.trim().to_owned())))
    }
}
