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

/// getsockname(2) or getpeername(2).
type NameCall = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> i32;

/// `sockaddr_un` without the family.
fn address_by(call: NameCall, fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut address = [0u8; 256];
    let mut length = address.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes.
    let result =
        unsafe { call(fd.as_raw_fd(), address.as_mut_ptr().cast(), std::ptr::from_mut(&mut length)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(address.get(2..length as usize).unwrap_or_default().to_vec())
}

/// Address of a socket, without the family; empty if it is not bound.
pub(crate) fn local_address(fd: BorrowedFd<'_>) -> Result<Vec<u8>> {
    address_by(libc::getsockname, fd).map_err(|error| HookError::failed("getsockname", error))
}

/// Address of the peer; empty if that is not bound, or if there is none.
pub(crate) fn peer_address(fd: BorrowedFd<'_>) -> Result<Vec<u8>> {
    match address_by(libc::getpeername, fd) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => Ok(Vec::new()),
        result => result.map_err(|error| HookError::failed("getpeername", error)),
    }
}

fn sockaddr(address: &[u8]) -> Vec<u8> {
    let mut bytes = (libc::AF_UNIX as libc::sa_family_t).to_ne_bytes().to_vec();
    bytes.extend_from_slice(address);
    bytes
}

/// Binds to an address as `local_address` gave it.
pub(crate) fn bind(fd: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    let bytes = sockaddr(address);
    // SAFETY: the kernel copies `bytes.len()` bytes.
    let result = unsafe { libc::bind(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len() as libc::socklen_t) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Connects to an address as `local_address` gave it.
pub(crate) fn connect(fd: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    let bytes = sockaddr(address);
    // SAFETY: the kernel copies `bytes.len()` bytes.
    let result =
        unsafe { libc::connect(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len() as libc::socklen_t) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An address that leads to the file behind an O_PATH descriptor, wherever that is.
pub(crate) fn address_of(file: BorrowedFd<'_>) -> Vec<u8> {
    format!("/proc/self/fd/{}\0", file.as_raw_fd()).into_bytes()
}

/// The file to which a socket is bound, as an O_PATH descriptor (SIOCUNIXFILE, linux/un.h).
pub(crate) fn bound_file(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const SIOCUNIXFILE: libc::c_ulong = 0x89e0;
    ioctl_fd(fd, SIOCUNIXFILE)
}

/// SO_PEERCRED, in our own namespaces; laid out as `struct ucred`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PeerCredentials {
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
}

impl PeerCredentials {
    /// Whether the socket has any: -1 stands for none.
    pub fn is_known(self) -> bool {
        self.uid != u32::MAX || self.gid != u32::MAX
    }
}

/// Of whom a socket tells SO_PEERCRED (unix(7)).
pub(crate) fn peer_credentials(fd: BorrowedFd<'_>) -> Result<PeerCredentials> {
    let bytes = get_option(fd, libc::SO_PEERCRED, size_of::<libc::ucred>())
        .map_err(|error| HookError::failed("reading SO_PEERCRED", error))?;
    let word = |at: usize| -> Result<[u8; 4]> {
        let bytes = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.ok_or_else(|| HookError::invalid("SO_PEERCRED is too short"))
    };
    let (pid, uid, gid) = (word(0)?, word(4)?, word(8)?);
    Ok(PeerCredentials {
        pid: i32::from_ne_bytes(pid),
        uid: u32::from_ne_bytes(uid),
        gid: u32::from_ne_bytes(gid),
    })
}

/// Bytes that were sent and not yet received by the peer (SIOCOUTQ), of a stream or seqpacket socket.
pub(crate) fn unread_by_peer(fd: BorrowedFd<'_>) -> io::Result<i32> {
    let mut bytes: i32 = 0;
    // SAFETY: this ioctl writes one int.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, std::ptr::from_mut(&mut bytes)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes)
}

/// Inode number of a socket.
pub(crate) fn inode(fd: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(nix::sys::stat::fstat(fd)?.st_ino)
}

/// accept4(2).
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let none = std::ptr::null_mut::<libc::sockaddr>();
    // SAFETY: no address is asked for.
    let fd = unsafe { libc::accept4(listener.as_raw_fd(), none, none.cast(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A lock on a listener among the tasks that are being restored; it ends when this process closes the descriptor.
pub(crate) fn lock(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: all-zero is a valid flock: from the start, without end.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    // SAFETY: the structure outlives the call.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETLKW, std::ptr::from_ref(&lock)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Takes all permitted capabilities into use: a process with another effective uid has put them away
/// (capabilities(7)).
pub(crate) fn raise_capabilities() -> io::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`, 64 bits in two halves.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Default, Clone, Copy)]
    struct Half {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let mut header = Header { version: 0x2008_0522, pid: 0 };
    let mut halves = [Half::default(); 2];
    // SAFETY: header and two halves, as this version demands.
    let got = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, halves.as_mut_ptr()) };
    halves.iter_mut().for_each(|half| half.effective = half.permitted);
    // SAFETY: as above; the kernel only reads.
    if got < 0 || unsafe { libc::syscall(libc::SYS_capset, &raw mut header, halves.as_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What one `recvmsg` gave.
#[derive(Default)]
pub(crate) struct Received {
    pub length: usize,
    pub fds: Vec<OwnedFd>,
    pub credentials: Option<PeerCredentials>,
    /// Name of the sender, without the family; empty if it has none.
    pub sender: Vec<u8>,
}

/// Looks at a message without taking it. The call never blocks.
pub(crate) fn peek(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    /// linux/socket.h
    const SCM_PIDFD: i32 = 4;
    let mut sender = [0u8; 256];
    // SCM_MAX_FD is 253 (net/scm.h); u64 for the alignment of cmsghdr.
    let mut control = [0u64; 256];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = std::ptr::from_mut(&mut part);
    message.msg_iovlen = 1;
    message.msg_name = sender.as_mut_ptr().cast();
    message.msg_namelen = sender.len() as libc::socklen_t;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `message` points to buffers that live through the call.
    let length = unsafe { libc::recvmsg(fd.as_raw_fd(), std::ptr::from_mut(&mut message), flags) };
    if length < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut received = Received { length: length as usize, ..Received::default() };
    received.sender = sender.get(2..message.msg_namelen as usize).unwrap_or_default().to_vec();
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
                let libc::ucred { pid, uid, gid } = unsafe { data.cast::<libc::ucred>().read_unaligned() };
                received.credentials = Some(PeerCredentials { pid, uid, gid });
            }
            (libc::SOL_SOCKET, SCM_PIDFD) => {
                // SAFETY: a message of this type holds one descriptor or an error number; nobody else closes it.
                let pidfd = unsafe { data.cast::<RawFd>().read_unaligned() };
                if pidfd >= 0 {
                    // SAFETY: as above.
                    drop(unsafe { OwnedFd::from_raw_fd(pidfd) });
                }
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

/// Sends a message with descriptors and credentials, to an address or (empty) to the peer; gives what was taken of
/// `data`.
pub(crate) fn send_to(
    fd: BorrowedFd<'_>,
    to: &[u8],
    data: &[u8],
    fds: &[OwnedFd],
    credentials: Option<libc::ucred>,
) -> io::Result<usize> {
    let name = sockaddr(to);
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = size_of_val(raw.as_slice());
    let mut control = [0u64; 256];
    let mut part = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = std::ptr::from_mut(&mut part);
    message.msg_iovlen = 1;
    if !to.is_empty() {
        message.msg_name = name.as_ptr().cast_mut().cast();
        message.msg_namelen = name.len() as libc::socklen_t;
    }
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

/// Sends to the peer.
pub(crate) fn send(fd: BorrowedFd<'_>, data: &[u8], fds: &[OwnedFd]) -> io::Result<usize> {
    send_to(fd, &[], data, fds, None)
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
