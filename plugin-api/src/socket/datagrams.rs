//! The queue of a datagram socket, looked at without taking anything.

use super::{get_int, set_int};
use crate::{HookError, Result};
use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd},
};

/// No datagram is longer.
const LARGEST: usize = 1 << 16;

/// A datagram in a queue.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Datagram {
    /// `sockaddr` of the sender.
    pub sender: Vec<u8>,
    /// What was sent.
    pub data: Vec<u8>,
    /// To which of our addresses, if the socket asks for that (`IP_PKTINFO`, `IPV6_RECVPKTINFO`).
    pub destination: Option<IpAddr>,
}

/// `SO_PEEK_OFF` of a socket, put back at the end of its life.
struct PeekOffset<'a> {
    fd: BorrowedFd<'a>,
    before: i32,
}

impl<'a> PeekOffset<'a> {
    /// From the start of the queue.
    fn begin(fd: BorrowedFd<'a>) -> io::Result<Self> {
        let before = get_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
        set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)?;
        Ok(Self { fd, before })
    }
}

impl Drop for PeekOffset<'_> {
    fn drop(&mut self) {
        // It was set before, so it can be set again.
        let _ = set_int(self.fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, self.before);
    }
}

/// All datagrams of a socket that has `SO_PEEK_OFF`. An error must not be pending, since a look would take it away.
pub fn peek_all(fd: BorrowedFd<'_>) -> Result<Vec<Datagram>> {
    let failed = |error| HookError::failed("peeking at the receive queue", error);
    let _offset = PeekOffset::begin(fd).map_err(failed)?;
    let mut queue = Vec::new();
    let mut buffer = vec![0; LARGEST];
    loop {
        match receive(fd, &mut buffer, libc::MSG_PEEK) {
            Ok(datagram) => queue.push(datagram),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(queue),
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Takes a datagram, or looks at it (`MSG_PEEK`). Never waits.
pub fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: i32) -> io::Result<Datagram> {
    let mut control = [0u64; 64];
    let mut sender = [0u8; 128];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = sender.as_mut_ptr().cast();
    message.msg_namelen = sender.len() as libc::socklen_t;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `message` points to buffers that live through the call.
    let length = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) };
    if length < 0 {
        return Err(io::Error::last_os_error());
    }
    if message.msg_flags & libc::MSG_TRUNC != 0 {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    Ok(Datagram {
        sender: sender[..(message.msg_namelen as usize).min(sender.len())].to_vec(),
        data: buffer[..length as usize].to_vec(),
        destination: destination(&message),
    })
}

/// The address in the control messages that says to whom a datagram was sent.
fn destination(message: &libc::msghdr) -> Option<IpAddr> {
    // SAFETY: the kernel filled `msg_control` and `msg_controllen`; CMSG_NXTHDR stays within them.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    let mut found = None;
    while !header.is_null() {
        // SAFETY: not null, hence a whole header within the buffer.
        let (cmsg, data) = unsafe { (*header, libc::CMSG_DATA(header)) };
        match (cmsg.cmsg_level, cmsg.cmsg_type) {
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                // SAFETY: a message of this type holds one in_pktinfo.
                let info = unsafe { data.cast::<libc::in_pktinfo>().read_unaligned() };
                found = Some(IpAddr::from(info.ipi_addr.s_addr.to_ne_bytes()));
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                // SAFETY: a message of this type holds one in6_pktinfo.
                let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
                found = Some(IpAddr::from(info.ipi6_addr.s6_addr));
            }
            _ => {}
        }
        // SAFETY: as above.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    found
}
