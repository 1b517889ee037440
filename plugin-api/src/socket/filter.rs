//! Packet filters of classic BPF: socket(7), `SO_ATTACH_FILTER`.

use super::{check, get_int, set_int, set_option};
use crate::{HookError, Result};
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// `SO_GET_FILTER` is `SO_ATTACH_FILTER`.
const SO_GET_FILTER: i32 = 26;
const SO_LOCK_FILTER: i32 = 44;
/// Bytes of one instruction (`struct sock_filter`).
const INSTRUCTION: usize = 8;

/// The instructions of the attached filter; none if there is none. An eBPF program cannot be read back.
pub fn read(fd: BorrowedFd<'_>, label: &str) -> Result<Vec<u8>> {
    match ask(fd, &mut []) {
        Ok(0) => Ok(Vec::new()),
        Ok(count) => {
            let mut program = vec![0u8; count * INSTRUCTION];
            ask(fd, &mut program).map_err(|error| HookError::failed("reading SO_GET_FILTER", error))?;
            Ok(program)
        }
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            Err(HookError::unsupported(label, "an eBPF program is attached, which cannot be read back", ""))
        }
        // This kind of socket has none.
        Err(_) => Ok(Vec::new()),
    }
}

/// Whether the filter is locked.
pub fn is_locked(fd: BorrowedFd<'_>) -> bool {
    get_int(fd, libc::SOL_SOCKET, SO_LOCK_FILTER).is_ok_and(|locked| locked != 0)
}

/// The length of this option counts instructions, not bytes (net/core/filter.c, sk_get_filter); with length 0 it only
/// says how many there are.
fn ask(fd: BorrowedFd<'_>, room: &mut [u8]) -> io::Result<usize> {
    let mut length = (room.len() / INSTRUCTION) as libc::socklen_t;
    let place = if room.is_empty() { std::ptr::null_mut() } else { room.as_mut_ptr().cast() };
    let (level, name) = (libc::SOL_SOCKET, SO_GET_FILTER);
    // SAFETY: the kernel writes at most `length` instructions.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, place, &raw mut length) })?;
    Ok(length as usize)
}

/// Attaches a filter as [`read`] gave it, and locks it.
pub fn write(fd: BorrowedFd<'_>, program: &[u8], locked: bool) -> Result<()> {
    if !program.is_empty() {
        let mut instructions: Vec<libc::sock_filter> = program
            .chunks_exact(INSTRUCTION)
            .map(|word| libc::sock_filter {
                code: u16::from_ne_bytes([word[0], word[1]]),
                jt: word[2],
                jf: word[3],
                k: u32::from_ne_bytes([word[4], word[5], word[6], word[7]]),
            })
            .collect();
        let len = u16::try_from(instructions.len())
            .map_err(|_| HookError::invalid("the filter has too many instructions"))?;
        let filter = libc::sock_fprog { len, filter: instructions.as_mut_ptr() };
        // SAFETY: sock_fprog is plain data; its padding is not looked at.
        let bytes =
            unsafe { std::slice::from_raw_parts((&raw const filter).cast::<u8>(), size_of_val(&filter)) };
        set_option(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, bytes)
            .map_err(|error| HookError::failed("SO_ATTACH_FILTER", error))?;
    }
    if locked {
        set_int(fd, libc::SOL_SOCKET, SO_LOCK_FILTER, 1)
            .map_err(|error| HookError::failed("SO_LOCK_FILTER", error))?;
    }
    Ok(())
}
