//! The system calls.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// `PID_FS_MAGIC` (include/uapi/linux/magic.h).
pub const PID_FS_MAGIC: u64 = 0x5049_4446;

/// `PIDFD_THREAD` (include/uapi/linux/pidfd.h): one task, not its whole thread group.
pub const PIDFD_THREAD: u32 = libc::O_EXCL.cast_unsigned();

/// `PIDFD_GET_INFO` (include/uapi/linux/pidfd.h): `_IOWR(0xFF, 11, struct pidfd_info)`, in its first size.
const PIDFD_GET_INFO: libc::Ioctl = 0xc040_ff0b_u32 as libc::Ioctl;
const PIDFD_INFO_EXIT: u64 = 1 << 3;

/// `struct pidfd_info`.
#[repr(C)]
#[derive(Default)]
struct Info {
    mask: u64,
    cgroup: u64,
    ids: [u32; 11],
    exit_code: i32,
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// pidfd_open(2).
pub fn open(pid: i32, flags: u32) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether a pidfd's inode is that of its process (Linux 6.9).
pub fn has_own_inodes(pidfd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut statfs = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: room for a struct statfs.
    check(unsafe { libc::fstatfs(pidfd.as_raw_fd(), statfs.as_mut_ptr()) }.into())?;
    // SAFETY: fstatfs has filled it.
    Ok(unsafe { statfs.assume_init() }.f_type.cast_unsigned() == PID_FS_MAGIC)
}

/// The wait status of a process that is gone, if the kernel has kept it (Linux 6.15).
pub fn exit_status(pidfd: BorrowedFd<'_>) -> Option<i32> {
    let mut info = Info { mask: PIDFD_INFO_EXIT, ..Info::default() };
    // SAFETY: the request reads and fills a struct pidfd_info of the size that its number has.
    let result = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) };
    (result == 0 && info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code)
}

/// What `open` makes of a process that ends with this wait status and then is waited for.
pub fn ended<T>(status: i32, open: impl FnOnce(i32) -> io::Result<T>) -> io::Result<T> {
    // No signal tells of its end, so that no task notices; no tracer is attached to it.
    let flags = libc::CLONE_UNTRACED;
    // SAFETY: as fork(2): the child has a copy of everything, and calls only what may be called after fork.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) })? as i32;
    if pid == 0 {
        die(status);
    }
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::uninit();
    let keep = libc::WEXITED | libc::WNOWAIT | libc::__WALL;
    // SAFETY: room for a siginfo_t.
    let waited = check(unsafe { libc::waitid(libc::P_PID, pid as u32, info.as_mut_ptr(), keep) }.into());
    let opened = waited.and_then(|_| open(pid));
    // SAFETY: no status is asked for.
    check(unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) }.into())?;
    opened
}

/// Ends with this wait status.
fn die(status: i32) -> ! {
    if libc::WIFSIGNALED(status) {
        let (signal, none) = (libc::WTERMSIG(status), libc::rlimit { rlim_cur: 0, rlim_max: 0 });
        // SAFETY: no core file; then the signal gets its default action, is let in, and is sent to this very process.
        unsafe {
            libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
            libc::signal(signal, libc::SIG_DFL);
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, signal);
            libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
            libc::syscall(libc::SYS_kill, libc::syscall(libc::SYS_getpid), signal);
        }
    }
    // SAFETY: ends this process.
    unsafe { libc::_exit(libc::WEXITSTATUS(status)) }
}
