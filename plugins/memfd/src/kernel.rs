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

/// A memory file that can be executed and sealed.
pub fn create(name: &CStr) -> io::Result<OwnedFd> {
    make(name, libc::MFD_ALLOW_SEALING | MFD_EXEC)
}

/// The devices of memory files: plain ones, and those of hugetlb pages, if there are any.
pub fn devices() -> &'static [u64] {
    static DEVICES: OnceLock<Vec<u64>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let device = |flags| File::from(make(c"stasis", flags).ok()?).metadata().ok().map(|meta| meta.dev());
        [0, libc::MFD_HUGETLB].into_iter().filter_map(device).collect()
    })
}

/// Whether a file is made of hugetlb pages.
pub fn is_hugetlb(file: BorrowedFd<'_>) -> io::Result<bool> {
    let mut statfs = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: room for a struct statfs.
    check(unsafe { libc::fstatfs(file.as_raw_fd(), statfs.as_mut_ptr()) })?;
    // SAFETY: fstatfs has filled it.
    Ok(unsafe { statfs.assume_init() }.f_type == libc::HUGETLBFS_MAGIC)
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
