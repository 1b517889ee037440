//! The socket calls that are wanted in a rawer form than nix has them.

use stasis_plugin_api::{HookError, Result};
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// An option of SOL_SOCKET, of at most `size` bytes.
pub(crate) fn get_option(fd: BorrowedFd<'_>, name: i32, size: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0u8; size];
    let mut length = size as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to a buffer of that size.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            value.as_mut_ptr().cast(),
            std::ptr::from_mut(&mut length),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    value.truncate(length as usize);
    Ok(value)
}

pub(crate) fn get_int(fd: BorrowedFd<'_>, name: i32) -> io::Result<i32> {
    let value = get_option(fd, name, 4)?;
    value.try_into().map(i32::from_ne_bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

pub(crate) fn set_option(fd: BorrowedFd<'_>, name: i32, value: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads `value.len()` bytes from the slice.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `sockaddr_un` of a socket, without the family; empty if it is not bound.
pub(crate) fn local_address(fd: BorrowedFd<'_>) -> Result<Vec<u8>> {
    let mut address = [0u8; 256];
    let mut length = address.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes.
    let result = unsafe {
        libc::getsockname(fd.as_raw_fd(), address.as_mut_ptr().cast(), std::ptr::from_mut(&mut length))
    };
    if result < 0 {
        return Err(HookError::failed("getsockname", io::Error::last_os_error()));
    }
    Ok(address.get(2..length as usize).unwrap_or_default().to_vec())
}

/// Binds to an address as `local_address` gave it.
pub(crate) fn bind(fd: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    let mut bytes = (libc::AF_UNIX as libc::sa_family_t).to_ne_bytes().to_vec();
    bytes.extend_from_slice(address);
    // SAFETY: the kernel copies `bytes.len()` bytes.
    let result = unsafe { libc::bind(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len() as libc::socklen_t) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What one `recvmsg` gave.
#[derive(Default)]
pub(crate) struct Received {
    pub length: usize,
    pub fds: Vec<OwnedFd>,
    pub credentials: Option<libc::ucred>,
}

/// Looks at a message without taking it. The call never blocks.
pub(crate) fn peek(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    // SCM_MAX_FD is 253 (net/scm.h); u64 for the alignment of cmsghdr.
    let mut control = [0u64; 256];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = std::ptr::from_mut(&mut part);
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `message` points to buffers that live through the call.
    let length = unsafe { libc::recvmsg(fd.as_raw_fd(), std::ptr::from_mut(&mut message), flags) };
    if length < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut received = Received { length: length as usize, ..Received::default() };
    // SAFETY: the kernel filled `msg_control` and `msg_controllen`; CMSG_NXTHDR stays within them.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&message) };
    while !header.is_null() {
        // SAFETY: not null, hence a header within `control`.
        let (cmsg, data) = unsafe { (*header, libc::CMSG_DATA(header)) };
        // SAFETY: computes a length only.
        let size = cmsg.cmsg_len - unsafe { libc::CMSG_LEN(0) } as usize;
        match (cmsg.cmsg_level, cmsg.cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                for i in 0..size / size_of::<RawFd>() {
                    // SAFETY: the kernel put `size` bytes of new descriptors there, which are ours.
                    received
                        .fds
                        .push(unsafe { OwnedFd::from_raw_fd(data.cast::<RawFd>().add(i).read_unaligned()) });
                }
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                // SAFETY: a message of this type holds one ucred.
                received.credentials = Some(unsafe { data.cast::<libc::ucred>().read_unaligned() });
            }
            _ => {}
        }
        // SAFETY: as above.
        header = unsafe { libc::CMSG_NXTHDR(&message, header) };
    }
    match message.msg_flags & (libc::MSG_CTRUNC | libc::MSG_TRUNC) {
        0 => Ok(received),
        _ => Err(io::Error::from_raw_os_error(libc::EMSGSIZE)),
    }
}

/// Peeks at `valid + 1` bytes of a stream into memory of which only `valid` bytes exist; gives how much was copied in
/// whole buffers of the kernel.
pub(crate) fn peek_to_fault(fd: BorrowedFd<'_>, valid: usize) -> io::Result<usize> {
    const PAGE: usize = 4096;
    let room = valid.next_multiple_of(PAGE);
    let area = room + PAGE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, nothing is replaced.
    let base =
        unsafe { libc::mmap(std::ptr::null_mut(), area, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the last page of the mapping above, which nobody else knows.
    let guard = unsafe { libc::mprotect(base.byte_add(room), PAGE, libc::PROT_NONE) };
    let result = if guard < 0 {
        Err(io::Error::last_os_error())
    } else {
        // SAFETY: the kernel writes to our mapping only, and stops at the guard page.
        let copied = unsafe {
            let start = base.byte_add(room - valid);
            libc::recv(fd.as_raw_fd(), start, valid + 1, libc::MSG_PEEK | libc::MSG_DONTWAIT)
        };
        match (copied, io::Error::last_os_error()) {
            (0.., _) => Ok(copied as usize),
            (_, error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(0),
            (_, error) => Err(error),
        }
    };
    // SAFETY: the mapping made above; no reference into it is left.
    unsafe { libc::munmap(base, area) };
    result
}

/// Sends a message with descriptors and credentials; gives what was taken of `data`.
pub(crate) fn send(
    fd: BorrowedFd<'_>,
    data: &[u8],
    fds: &[OwnedFd],
    credentials: Option<libc::ucred>,
) -> io::Result<usize> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = size_of_val(raw.as_slice());
    let mut control = [0u64; 256];
    let mut part = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = std::ptr::from_mut(&mut part);
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    let mut used = 0;
    let mut put = |kind: i32, source: *const u8, size: usize| -> io::Result<()> {
        // SAFETY: computes lengths only.
        let (space, length) =
            unsafe { (libc::CMSG_SPACE(size as u32) as usize, libc::CMSG_LEN(size as u32) as usize) };
        if used + space > 256 * size_of::<u64>() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: `used + space` is within `control`, checked above, and the header is aligned since CMSG_SPACE is.
        unsafe {
            let header = message.msg_control.cast::<u8>().add(used).cast::<libc::cmsghdr>();
            (*header).cmsg_len = length;
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = kind;
            std::ptr::copy_nonoverlapping(source, libc::CMSG_DATA(header), size);
        }
        used += space;
        Ok(())
    };
    if !raw.is_empty() {
        put(libc::SCM_RIGHTS, raw.as_ptr().cast(), rights)?;
    }
    if let Some(credentials) = &credentials {
        put(libc::SCM_CREDENTIALS, std::ptr::from_ref(credentials).cast(), size_of::<libc::ucred>())?;
    }
    message.msg_controllen = used;
    if used == 0 {
        message.msg_control = std::ptr::null_mut();
    }
    // SAFETY: `message` points to buffers that live through the call.
    let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(sent as usize) }
}

/// `poll` without waiting.
pub(crate) fn poll(fd: BorrowedFd<'_>) -> io::Result<i16> {
    let mut entry = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN | libc::POLLPRI | libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one valid entry.
    if unsafe { libc::poll(std::ptr::from_mut(&mut entry), 1, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(entry.revents)
}

/// An ioctl without argument that gives a descriptor.
pub(crate) fn ioctl_fd(fd: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<OwnedFd> {
    // SAFETY: used with requests that take no argument.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}
