//! The system call itself.

use nix::errno::Errno;

/// Requests that libc lacks (include/uapi/linux/ptrace.h).
pub const SECCOMP_GET_FILTER: u32 = 0x420c;
/// See [`SECCOMP_GET_FILTER`].
pub const SECCOMP_GET_METADATA: u32 = 0x420d;
/// PTRACE_EVENT_STOP.
pub const EVENT_STOP: i32 = 128;

/// ptrace(2) with plain numbers.
///
/// # Safety
/// If the request makes the kernel read or write memory of ours, `address` and `data` must point to it as ptrace(2) says.
pub unsafe fn ptrace(request: u32, tid: i32, address: usize, data: usize) -> Result<i64, Errno> {
    Errno::clear();
    // SAFETY: the caller vouches for the pointers.
    let result = unsafe { libc::ptrace(request, tid, address, data) };
    if result == -1 && Errno::last_raw() != 0 { Err(Errno::last()) } else { Ok(result) }
}
