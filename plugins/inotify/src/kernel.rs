//! The system calls.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// `INOTIFY_IOC_SETNEXTWD` (include/uapi/linux/inotify.h): `_IOW('I', 0, __s32)`.
const INOTIFY_IOC_SETNEXTWD: libc::Ioctl = 0x4004_4900;

/// `MAX_HANDLE_SZ` (include/linux/exportfs.h).
pub const MAX_HANDLE: usize = 128;

/// `struct file_handle` with room for any handle.
#[repr(C)]
struct FileHandle {
    bytes: u32,
    kind: i32,
    data: [u8; MAX_HANDLE],
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(result: i32) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// inotify_init1(2).
pub fn create() -> io::Result<OwnedFd> {
    // SAFETY: an integer argument.
    owned(unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) })
}

/// The number that the next watch gets. Linux 4.18 and later with CONFIG_CHECKPOINT_RESTORE.
pub fn set_next(inotify: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    // SAFETY: the request takes the number itself, no pointer.
    check(unsafe { libc::ioctl(inotify.as_raw_fd(), INOTIFY_IOC_SETNEXTWD, number) }).map(drop)
}

/// inotify_add_watch(2): the watch's number.
pub fn add(inotify: BorrowedFd<'_>, path: &Path, mask: u32) -> io::Result<i32> {
    let path = c_path(path)?;
    // SAFETY: a path that ends with NUL.
    check(unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), mask) })
}

/// inotify_rm_watch(2).
pub fn remove(inotify: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::inotify_rm_watch(inotify.as_raw_fd(), number) }).map(drop)
}

/// Bytes of events in the queue.
pub fn queued(inotify: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes = 0_i32;
    // SAFETY: FIONREAD writes an int.
    check(unsafe { libc::ioctl(inotify.as_raw_fd(), libc::FIONREAD, &raw mut bytes) })?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// A descriptor of a path, or of a path below `at`, that opens nothing: O_PATH makes no events.
pub fn locate(at: Option<BorrowedFd<'_>>, path: &Path, follow: bool) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let flags = libc::O_PATH | libc::O_CLOEXEC | if follow { 0 } else { libc::O_NOFOLLOW };
    let at = at.map_or(libc::AT_FDCWD, |fd| fd.as_raw_fd());
    // SAFETY: a path that ends with NUL.
    owned(unsafe { libc::openat(at, path.as_ptr(), flags) })
}

/// fchdir(2).
pub fn change_directory(directory: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: an integer argument.
    check(unsafe { libc::fchdir(directory.as_raw_fd()) }).map(drop)
}

/// open_by_handle_at(2) on the file system of the working directory: a descriptor to name it by would have to be
/// opened, which is an event for whoever watches it.
pub fn open_handle(kind: i32, data: &[u8]) -> io::Result<OwnedFd> {
    let mut handle = FileHandle { bytes: data.len() as u32, kind, data: [0; MAX_HANDLE] };
    let room = handle.data.get_mut(..data.len()).ok_or(io::Error::from_raw_os_error(libc::EINVAL))?;
    room.copy_from_slice(data);
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: a struct file_handle with as many bytes as it says.
    let fd = unsafe { libc::syscall(libc::SYS_open_by_handle_at, libc::AT_FDCWD, &raw mut handle, flags) };
    owned(fd as i32)
}

/// Gives the calling thread a working directory of its own (unshare(2)).
pub fn own_directory() -> io::Result<()> {
    // SAFETY: an integer argument.
    check(unsafe { libc::unshare(libc::CLONE_FS) }).map(drop)
}

/// The magic link to a descriptor of this process.
pub fn magic_link(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// fstat(2).
pub fn stat(fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: room for a struct stat.
    check(unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: fstat has filled it.
    Ok(unsafe { stat.assume_init() })
}

/// fanotify_init(2).
pub fn create_group(flags: u32, event_flags: u32) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    owned(unsafe { libc::fanotify_init(flags, event_flags) })
}

/// fanotify_mark(2).
pub fn mark(group: BorrowedFd<'_>, flags: u32, mask: u64, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: a path that ends with NUL.
    check(unsafe { libc::fanotify_mark(group.as_raw_fd(), flags, mask, libc::AT_FDCWD, path.as_ptr()) })
        .map(drop)
}

/// A memory file, whose changes make events and concern nobody.
pub fn memory_file(name: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: a name that ends with NUL.
    owned(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) })
}

/// Makes one `IN_ATTRIB` (fchmod(2)).
pub fn touch_mode(file: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::fchmod(file.as_raw_fd(), 0o600) }).map(drop)
}

/// Makes one `IN_MODIFY` (futimens(3) of the time of modification alone; include/linux/fsnotify.h, fsnotify_change).
pub fn touch_time(file: BorrowedFd<'_>) -> io::Result<()> {
    let times =
        [libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT }, libc::timespec { tv_sec: 1, tv_nsec: 0 }];
    // SAFETY: two times.
    check(unsafe { libc::futimens(file.as_raw_fd(), times.as_ptr()) }).map(drop)
}
