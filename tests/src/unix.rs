//! Unix sockets for workloads: addresses as bytes, messages with all that comes along.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use crate::sys::{cvt, cvt_long};

/// A message as it was received.
#[derive(Debug, Default)]
pub struct Message {
    /// Its data.
    pub data: Vec<u8>,
    /// SCM_RIGHTS.
    pub fds: Vec<OwnedFd>,
    /// Pid of SCM_CREDENTIALS.
    pub pid: Option<i32>,
    /// Name of the sender, without the family.
    pub sender: Vec<u8>,
}

/// A socket that never waits.
pub fn new(kind: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the descriptor is new.
    unsafe { Ok(OwnedFd::from_raw_fd(cvt(libc::socket(libc::AF_UNIX, kind | libc::SOCK_NONBLOCK, 0))?)) }
}

/// The ends of a socketpair(2) that never wait.
pub fn pair(kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors, which are new.
    unsafe {
        cvt(libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_NONBLOCK, 0, fds.as_mut_ptr()))?;
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

/// The address of a path, without the family.
pub fn path(path: &Path) -> Vec<u8> {
    [path.to_string_lossy().as_bytes(), b"\0"].concat()
}

fn whole(address: &[u8]) -> Vec<u8> {
    [&(libc::AF_UNIX as u16).to_ne_bytes()[..], address].concat()
}

/// bind(2); an empty address lets the kernel choose.
pub fn bind(fd: impl AsFd, address: &[u8]) -> io::Result<()> {
    let bytes = whole(address);
    // SAFETY: the kernel copies that many bytes.
    cvt(unsafe { libc::bind(fd.as_fd().as_raw_fd(), bytes.as_ptr().cast(), bytes.len() as u32) }).map(drop)
}

/// connect(2).
pub fn connect(fd: impl AsFd, address: &[u8]) -> io::Result<()> {
    let bytes = whole(address);
    // SAFETY: the kernel copies that many bytes.
    cvt(unsafe { libc::connect(fd.as_fd().as_raw_fd(), bytes.as_ptr().cast(), bytes.len() as u32) }).map(drop)
}

/// A socket bound to an address.
pub fn named(kind: i32, address: &[u8]) -> io::Result<OwnedFd> {
    let socket = new(kind)?;
    bind(&socket, address)?;
    Ok(socket)
}

/// A socket that listens.
pub fn listener(kind: i32, address: &[u8], backlog: i32) -> io::Result<OwnedFd> {
    let socket = named(kind, address)?;
    // SAFETY: no pointers.
    cvt(unsafe { libc::listen(socket.as_raw_fd(), backlog) })?;
    Ok(socket)
}

/// A socket that is connected to an address.
pub fn client(kind: i32, address: &[u8]) -> io::Result<OwnedFd> {
    let socket = new(kind)?;
    connect(&socket, address)?;
    Ok(socket)
}

/// accept4(2); the new socket never waits.
pub fn accept(listener: impl AsFd) -> io::Result<OwnedFd> {
    let none = std::ptr::null_mut::<libc::sockaddr>();
    // SAFETY: no address is asked for; the descriptor is new.
    unsafe {
        let fd = libc::accept4(listener.as_fd().as_raw_fd(), none, none.cast(), libc::SOCK_NONBLOCK);
        Ok(OwnedFd::from_raw_fd(cvt(fd)?))
    }
}

type NameCall = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut u32) -> i32;

fn name_by(call: NameCall, fd: impl AsFd) -> io::Result<Vec<u8>> {
    let (mut bytes, mut length) = ([0u8; 256], 256u32);
    // SAFETY: room for `length` bytes.
    cvt(unsafe { call(fd.as_fd().as_raw_fd(), bytes.as_mut_ptr().cast(), &raw mut length) })?;
    Ok(bytes.get(2..length as usize).unwrap_or_default().to_vec())
}

/// getsockname(2), without the family.
pub fn name(fd: impl AsFd) -> io::Result<Vec<u8>> {
    name_by(libc::getsockname, fd)
}

/// getpeername(2), without the family.
pub fn peer_name(fd: impl AsFd) -> io::Result<Vec<u8>> {
    name_by(libc::getpeername, fd)
}

/// Pid of SO_PEERCRED.
pub fn peer_pid(fd: impl AsFd) -> io::Result<i32> {
    let words = option(fd, libc::SO_PEERCRED, size_of::<libc::ucred>())?;
    Ok(words.get(..4).and_then(|pid| pid.try_into().ok()).map_or(0, i32::from_ne_bytes))
}

/// getsockopt(2) of SOL_SOCKET.
pub fn option(fd: impl AsFd, name: i32, size: usize) -> io::Result<Vec<u8>> {
    let (mut value, mut length) = (vec![0u8; size], size as u32);
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: room for `length` bytes.
    cvt(unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, value.as_mut_ptr().cast(), &raw mut length) })?;
    value.truncate(length as usize);
    Ok(value)
}

/// setsockopt(2) of SOL_SOCKET.
pub fn set_option(fd: impl AsFd, name: i32, value: &[u8]) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel reads the slice.
    cvt(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, name, value.as_ptr().cast(), value.len() as u32) })
        .map(drop)
}

/// Sends data with descriptors to the peer, or (not empty) to an address.
pub fn send(fd: impl AsFd, to: &[u8], data: &[u8], fds: &[RawFd]) -> io::Result<usize> {
    let (bytes, mut control) = (whole(to), [0u64; 32]);
    let mut part = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: a msghdr of zeros is valid; the control buffer has room for a few descriptors; all lives through the call.
    unsafe {
        let mut message: libc::msghdr = zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        if !to.is_empty() {
            message.msg_name = bytes.as_ptr().cast_mut().cast();
            message.msg_namelen = bytes.len() as u32;
        }
        if !fds.is_empty() {
            let size = size_of_val(fds) as u32;
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(size) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_len = libc::CMSG_LEN(size) as usize;
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            std::ptr::copy_nonoverlapping(fds.as_ptr().cast(), libc::CMSG_DATA(header), size as usize);
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        cvt_long(libc::sendmsg(fd.as_fd().as_raw_fd(), &raw const message, flags) as i64).map(|n| n as usize)
    }
}

/// Receives a message with whatever comes along.
pub fn receive(fd: impl AsFd) -> io::Result<Message> {
    let (mut data, mut sender, mut control) = (vec![0u8; 1 << 18], [0u8; 256], [0u64; 64]);
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    let mut received = Message::default();
    // SAFETY: a msghdr of zeros is valid; the buffers live through the call; headers are those the kernel wrote.
    unsafe {
        let mut message: libc::msghdr = zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        message.msg_name = sender.as_mut_ptr().cast();
        message.msg_namelen = sender.len() as u32;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        let flags = libc::MSG_DONTWAIT;
        let length = cvt_long(libc::recvmsg(fd.as_fd().as_raw_fd(), &raw mut message, flags) as i64)?;
        data.truncate(length as usize);
        received.sender = sender.get(2..message.msg_namelen as usize).unwrap_or_default().to_vec();
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            let (at, size) = (libc::CMSG_DATA(header), (*header).cmsg_len - libc::CMSG_LEN(0) as usize);
            match (*header).cmsg_type {
                libc::SCM_RIGHTS => {
                    let fds = (0..size / 4).map(|n| at.cast::<RawFd>().add(n).read_unaligned());
                    received.fds.extend(fds.map(|fd| OwnedFd::from_raw_fd(fd)));
                }
                libc::SCM_CREDENTIALS => received.pid = Some(at.cast::<i32>().read_unaligned()),
                _ => {}
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    received.data = data;
    Ok(received)
}

/// Only the data.
pub fn data(fd: impl AsFd) -> io::Result<Vec<u8>> {
    receive(fd).map(|message| message.data)
}
