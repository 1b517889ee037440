//! The system calls.

use std::{
    ffi::CStr,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::PathBuf,
    sync::OnceLock,
};

/// What the link of a memory file begins and ends with (mm/memfd.c, fs/d_path.c).
pub const PREFIX: &str = "/memfd:";
pub const DELETED: &str = " (deleted)";

/// Since Linux 6.3 (include/uapi/linux/memfd.h).
const MFD_EXEC: u32 = 0x10;

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn make(name: &CStr, flags: u32) -> io::Result<OwnedFd> {
    // SAFETY: a name that ends with NUL.
    let fd = check(unsafe { libc::memfd_create(name.as_ptr(), flags | libc::MFD_CLOEXEC) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The flag that asks for hugetlb pages of 2^shift bytes; none for 0.
fn huge_flag(shift: u32) -> u32 {
    if shift == 0 { 0 } else { libc::MFD_HUGETLB | ((shift & 63) << libc::MFD_HUGE_SHIFT) }
}

/// A memory file that can be executed and sealed, of hugetlb pages of 2^`huge_shift` bytes unless that is 0.
pub fn create(name: &CStr, huge_shift: u32) -> io::Result<OwnedFd> {
    make(name, libc::MFD_ALLOW_SEALING | MFD_EXEC | huge_flag(huge_shift))
}

/// The devices of memory files: plain ones, and those of hugetlb pages of 2 MiB and 1 GiB, if there are any.
pub fn devices() -> &'static [u64] {
    static DEVICES: OnceLock<Vec<u64>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let device = |shift| {
            File::from(make(c"stasis", huge_flag(shift)).ok()?).metadata().ok().map(|meta| meta.dev())
        };
        [0, 21, 30].into_iter().filter_map(device).collect()
    })
}

/// log2 of the size of the hugetlb pages that a file is made of; 0 if it is not.
pub fn huge_shift(file: BorrowedFd<'_>) -> io::Result<u32> {
    let mut statfs = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: room for a struct statfs.
    check(unsafe { libc::fstatfs(file.as_raw_fd(), statfs.as_mut_ptr()) })?;
    // SAFETY: fstatfs has filled it.
    let statfs = unsafe { statfs.assume_init() };
    // Of hugetlbfs, a block is a page (hugetlbfs_statfs in fs/hugetlbfs/inode.c).
    Ok(if statfs.f_type == libc::HUGETLBFS_MAGIC { statfs.f_bsize.trailing_zeros() } else { 0 })
}

/// Writes to a file by mapping it: those of hugetlb pages cannot be written otherwise. `size` of a page; `data` lies in one.
pub fn write_mapped(file: &File, data: &[u8], offset: u64, size: u64) -> io::Result<()> {
    let start = offset / size * size;
    let length = usize::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    if offset - start + data.len() as u64 > size {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let (access, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
    // SAFETY: a new mapping at an address of the kernel's choice.
    let page = unsafe {
        libc::mmap(std::ptr::null_mut(), length, access, libc::MAP_SHARED, fd, start.cast_signed())
    };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // By a system call, to which a page that cannot be had is an error; a store of ours would be killed by SIGBUS.
    let result = copy_by_kernel(data, page as u64 + (offset - start));
    // SAFETY: the mapping made above, into which nobody has a reference.
    unsafe { libc::munmap(page, length) };
    result
}

/// Copies `data` to an address of this process (process_vm_writev(2)).
fn copy_by_kernel(data: &[u8], to: u64) -> io::Result<()> {
    let from = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    let to = libc::iovec { iov_base: to as *mut _, iov_len: data.len() };
    // SAFETY: the kernel checks the target; nothing but a mapping of the caller's lies there.
    let copied = unsafe { libc::process_vm_writev(libc::getpid(), &raw const from, 1, &raw const to, 1, 0) };
    match usize::try_from(copied) {
        Ok(copied) if copied == data.len() => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// The magic link to a descriptor of this process.
pub fn magic_link(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Another open file description of the same file; `flags` as in open(2).
pub fn reopen(file: BorrowedFd<'_>, flags: i32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    match flags & libc::O_ACCMODE {
        libc::O_WRONLY => options.write(true),
        libc::O_RDWR => options.read(true).write(true),
        _ => options.read(true),
    };
    options.custom_flags(flags & libc::O_PATH).open(magic_link(file))
}

/// `F_GET_SEALS`.
pub fn seals(file: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: no argument.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) }).map(i32::cast_unsigned)
}

/// `F_ADD_SEALS`.
pub fn add_seals(file: BorrowedFd<'_>, seals: u32) -> io::Result<()> {
    // SAFETY: an integer argument.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }).map(drop)
}

/// The first run of data at or after `offset` (lseek(2), SEEK_DATA), in bytes; none if there are only holes.
pub fn data_after(file: &File, offset: u64) -> io::Result<Option<(u64, u64)>> {
    let seek = |offset: u64, whence| {
        let offset = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        // SAFETY: integers only.
        match unsafe { libc::lseek(file.as_raw_fd(), offset, whence) } {
            -1 => Err(io::Error::last_os_error()),
            at => Ok(at.cast_unsigned()),
        }
    };
    match seek(offset, libc::SEEK_DATA) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
        Ok(start) => Ok(Some((start, seek(start, libc::SEEK_HOLE)?))),
    }
}

/// futimens(3): time of access and of modification, as (seconds, nanoseconds).
pub fn set_times(file: BorrowedFd<'_>, times: [(i64, i64); 2]) -> io::Result<()> {
    let times = times.map(|(tv_sec, tv_nsec)| libc::timespec { tv_sec, tv_nsec });
    // SAFETY: two times.
    check(unsafe { libc::futimens(file.as_raw_fd(), times.as_ptr()) }).map(drop)
}
