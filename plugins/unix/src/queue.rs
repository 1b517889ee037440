//! What a socket has received and nobody has read: looked at without taking it, and queued again.
//!
//! `MSG_PEEK` starts at the head, so what is behind the first descriptor or datagram is seen only with `SO_PEEK_OFF`
//! (socket(7)), and its credentials only with `SO_PASSCRED`. Both are states of the socket, set for the while, and put
//! back in any case.

use crate::sys::{self, PeerCredentials, Received};
use stasis_plugin_api::{HookError, Result};
use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

/// A message, or for a stream a run of bytes whose first carried the descriptors.
#[derive(Debug, Default)]
pub(crate) struct Message {
    pub data: Vec<u8>,
    pub fds: Vec<OwnedFd>,
    /// Who sent it; process 0 if the kernel does not know.
    pub credentials: Option<PeerCredentials>,
    /// Name of the sender's socket, without the family.
    pub sender: Vec<u8>,
}

/// Largest datagram that is taken: the kernel's limit is the sender's buffer size.
const LARGEST: usize = 8 << 20;

/// Turns SO_PASSCRED on, and puts it back when dropped.
struct ShowCredentials<'a> {
    fd: BorrowedFd<'a>,
    before: i32,
}

impl<'a> ShowCredentials<'a> {
    fn begin(fd: BorrowedFd<'a>) -> Result<Self> {
        let failed = |error| HookError::failed("SO_PASSCRED", error);
        let before = sys::get_int(fd, libc::SO_PASSCRED).map_err(failed)?;
        sys::set_option(fd, libc::SO_PASSCRED, &1i32.to_ne_bytes()).map_err(failed)?;
        Ok(Self { fd, before })
    }
}

impl Drop for ShowCredentials<'_> {
    fn drop(&mut self) {
        // It was set before, so it can be set again.
        let _ = sys::set_option(self.fd, libc::SO_PASSCRED, &self.before.to_ne_bytes());
    }
}

/// Sets SO_PEEK_OFF, and puts it back when dropped.
struct PeekOffset<'a> {
    fd: BorrowedFd<'a>,
    before: i32,
}

impl<'a> PeekOffset<'a> {
    fn begin(fd: BorrowedFd<'a>) -> Result<Self> {
        let before = sys::get_int(fd, libc::SO_PEEK_OFF)
            .map_err(|error| HookError::failed("reading SO_PEEK_OFF", error))?;
        let this = Self { fd, before };
        this.set(0)?;
        Ok(this)
    }

    fn set(&self, offset: usize) -> Result<()> {
        let offset = i32::try_from(offset).unwrap_or(i32::MAX);
        sys::set_option(self.fd, libc::SO_PEEK_OFF, &offset.to_ne_bytes())
            .map_err(|error| HookError::failed("setting SO_PEEK_OFF", error))
    }
}

impl Drop for PeekOffset<'_> {
    fn drop(&mut self) {
        // It was set before, so it can be set again.
        let _ = sys::set_option(self.fd, libc::SO_PEEK_OFF, &self.before.to_ne_bytes());
    }
}

fn peeked(result: io::Result<Received>) -> Result<Received> {
    result.map_err(|error| HookError::failed("peeking at the receive queue", error))
}

/// The queue of a stream socket that holds `length` bytes. Never asks for more than there is: the kernel would report,
/// and so lose, a pending error of the socket.
pub(crate) fn peek_stream(fd: BorrowedFd<'_>, length: usize) -> Result<Vec<Message>> {
    if length == 0 {
        return Ok(Vec::new());
    }
    let mut buffer = vec![0; length];
    let _credentials = ShowCredentials::begin(fd)?;
    let plain =
        sys::get_int(fd, libc::SO_PEEK_OFF).map_err(|e| HookError::failed("reading SO_PEEK_OFF", e))? < 0;
    if plain {
        let all = peeked(sys::peek(fd, &mut buffer))?;
        if all.length == length && all.fds.is_empty() {
            return Ok(vec![Message { data: buffer, credentials: all.credentials, ..Message::default() }]);
        }
    }
    let offset = PeekOffset::begin(fd)?;
    let mut queue = Vec::new();
    let mut at = 0;
    while at < length {
        offset.set(at)?;
        let chunk = peeked(sys::peek(fd, &mut buffer[at..]))?;
        if chunk.length == 0 {
            return Err(HookError::invalid(format!("only {at} of {length} queued bytes could be seen")));
        }
        let mut start = 0;
        if !chunk.fds.is_empty() {
            start = carrier(&offset, at, chunk.length)?;
            if start > 0 {
                let data = buffer[at..at + start].to_vec();
                queue.push(Message { data, credentials: chunk.credentials, ..Message::default() });
            }
        }
        let data = buffer[at + start..at + chunk.length].to_vec();
        let (fds, credentials) = (chunk.fds, chunk.credentials);
        queue.push(Message { data, fds, credentials, ..Message::default() });
        at += chunk.length;
    }
    Ok(queue)
}

/// A chunk of `length` bytes at `at` ends with the buffer that carries descriptors, but may begin before it: the
/// offset in the chunk at which that buffer starts. A peek shows the descriptors however short it is, so the length
/// tells nothing; but the kernel copies buffer by buffer, and a copy that faults at the chunk's last byte ends before
/// the buffer that holds it (net/unix/af_unix.c, unix_stream_read_generic).
fn carrier(offset: &PeekOffset<'_>, at: usize, length: usize) -> Result<usize> {
    offset.set(at)?;
    sys::peek_to_fault(offset.fd, length - 1)
        .map_err(|error| HookError::failed("finding the start of a message with descriptors", error))
}

/// The queue of a datagram or seqpacket socket. `end_is_silent`: an empty queue reads as length 0, not as EAGAIN (a
/// seqpacket socket that was shut down), and then `length` bytes are all there is.
pub(crate) fn peek_messages(fd: BorrowedFd<'_>, end_is_silent: Option<usize>) -> Result<Vec<Message>> {
    let mut buffer = vec![0; LARGEST];
    let _credentials = ShowCredentials::begin(fd)?;
    let _offset = PeekOffset::begin(fd)?;
    let mut queue = Vec::new();
    let mut total = 0;
    while end_is_silent.is_none_or(|length| total < length) {
        let message = match sys::peek(fd, &mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            result => peeked(result)?,
        };
        total += message.length;
        queue.push(Message {
            data: buffer[..message.length].to_vec(),
            fds: message.fds,
            credentials: message.credentials,
            sender: message.sender,
        });
    }
    Ok(queue)
}

/// Makes room in the buffer of a sender; its final size is set later.
pub(crate) fn widen(sender: BorrowedFd<'_>) {
    // Without the privilege the size stays, which suffices if the sender's size was the usual one.
    let _ = sys::set_option(sender, libc::SO_SNDBUFFORCE, &i32::to_ne_bytes(64 << 20));
}

/// Sends a message to the peer, or to an address, so that it is found in the queue there. Its ids are those of the
/// sending process' namespaces.
pub(crate) fn send(sender: BorrowedFd<'_>, to: &[u8], stream: bool, message: &Message) -> Result<()> {
    let credentials = message.credentials.filter(|credentials| credentials.pid != 0);
    let credentials = credentials.map(|PeerCredentials { pid, uid, gid }| libc::ucred { pid, uid, gid });
    let mut at = 0;
    loop {
        let fds = if at == 0 { &message.fds[..] } else { &[] };
        let sent = sys::send_to(sender, to, &message.data[at..], fds, credentials)
            .map_err(|error| HookError::failed("refilling the receive queue", error))?;
        at += sent;
        if !stream || at >= message.data.len() {
            break;
        }
    }
    if at == message.data.len() { Ok(()) } else { Err(HookError::invalid("a datagram was sent in part")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::{
        fs::File,
        io::{Read, Write},
        os::fd::AsFd,
    };

    fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK).unwrap()
    }

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn text(queue: &[Message]) -> Vec<(String, usize)> {
        queue.iter().map(|m| (String::from_utf8_lossy(&m.data).into_owned(), m.fds.len())).collect()
    }

    #[test]
    fn stream_with_descriptors_keeps_where_they_are() {
        let (a, b) = pair(SockType::Stream);
        for (data, fds) in [("plain", 0), ("one", 1), ("more", 0), ("x", 2), ("tail", 0)] {
            let fds: Vec<_> = (0..fds).map(|_| null()).collect();
            sys::send(a.as_fd(), data.as_bytes(), &fds).unwrap();
        }
        let expected =
            [("plain", 0), ("one", 1), ("more", 0), ("x", 2), ("tail", 0)].map(|(d, n)| (d.to_owned(), n));
        for before in [-1, 3] {
            sys::set_option(b.as_fd(), libc::SO_PEEK_OFF, &i32::to_ne_bytes(before)).unwrap();
            let queue = peek_stream(b.as_fd(), 17).unwrap();
            assert_eq!(text(&queue), expected);
            assert_eq!(sys::get_int(b.as_fd(), libc::SO_PEEK_OFF).unwrap(), before);
            // The same again, put into another pair.
            let (c, d) = pair(SockType::Stream);
            widen(c.as_fd());
            for message in &queue {
                send(c.as_fd(), &[], true, message).unwrap();
            }
            assert_eq!(text(&peek_stream(d.as_fd(), 17).unwrap()), expected);
        }
        // Nothing was consumed.
        let mut data = [0; 8];
        assert_eq!(File::from(b).read(&mut data[..5]).unwrap(), 5);
        assert_eq!(&data[..5], b"plain");
    }

    #[test]
    fn message_boundaries_are_kept() {
        for kind in [SockType::Datagram, SockType::SeqPacket] {
            let (a, b) = pair(kind);
            sys::send(a.as_fd(), b"abc", &[]).unwrap();
            sys::send(a.as_fd(), b"", &[]).unwrap();
            sys::send(a.as_fd(), b"defgh", &[null()]).unwrap();
            let queue = peek_messages(b.as_fd(), None).unwrap();
            let expected = [("abc".to_owned(), 0), (String::new(), 0), ("defgh".to_owned(), 1)];
            assert_eq!(text(&queue), expected);
            assert_eq!(sys::get_int(b.as_fd(), libc::SO_PEEK_OFF).unwrap(), -1);
            let (c, d) = pair(kind);
            for message in &queue {
                send(c.as_fd(), &[], false, message).unwrap();
            }
            assert_eq!(text(&peek_messages(d.as_fd(), None).unwrap()), expected);
        }
    }

    #[test]
    fn pending_reset_survives_a_peek() {
        let (a, b) = pair(SockType::Stream);
        let (mut a, b) = (File::from(a), b);
        a.write_all(b"data").unwrap();
        sys::send(b.as_fd(), b"unread", &[]).unwrap();
        drop(a);
        assert_ne!(sys::poll(b.as_fd()).unwrap() & libc::POLLERR, 0);
        assert_eq!(text(&peek_stream(b.as_fd(), 4).unwrap()), [("data".to_owned(), 0)]);
        assert_ne!(sys::poll(b.as_fd()).unwrap() & libc::POLLERR, 0);
    }
}
