//! sock_diag(7) for one unix socket: who is its peer, what is in its queue.

use crate::sys;
use stasis_plugin_api::{HookError, Result};
use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

/// `SIOCGSKNS` (linux/sockios.h): the net namespace of a socket.
const SIOCGSKNS: libc::c_ulong = 0x894c;
const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
/// linux/unix_diag.h
const UDIAG_SHOW_PEER: u32 = 4;
const UDIAG_SHOW_ICONS: u32 = 8;
const UDIAG_SHOW_RQLEN: u32 = 16;
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_ICONS: u16 = 3;
const UNIX_DIAG_RQLEN: u16 = 4;
const UNIX_DIAG_SHUTDOWN: u16 = 6;

/// What the kernel says about a socket.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Diag {
    /// Inode of the peer; `Some(0)` if it is connected to a socket that was closed, or that was not accepted yet.
    pub peer: Option<u32>,
    /// Bytes to read, or connections to accept.
    pub receive_queue: u32,
    /// For a listener: the backlog.
    pub write_queue: u32,
    /// 1 receive, 2 send.
    pub shutdown: u32,
    /// Of a listener: inodes of the clients that are not accepted yet, the next one first; 0 for one that was closed.
    pub waiting: Vec<u32>,
}

/// The net namespace of a socket.
pub(crate) fn namespace(socket: BorrowedFd<'_>) -> Result<File> {
    sys::ioctl_fd(socket, SIOCGSKNS)
        .map(File::from)
        .map_err(|error| HookError::failed("SIOCGSKNS", error).remedy("needs CAP_NET_ADMIN"))
}

/// Asks for the socket with inode number `ino`, in the net namespace of `socket`.
pub(crate) fn query(socket: BorrowedFd<'_>, ino: u64) -> Result<Diag> {
    ask(&open(socket)?, ino)
}

/// Asks for the socket with inode number `ino`, in the net namespace of this process.
pub(crate) fn query_here(ino: u64) -> Result<Diag> {
    ask(&open_here()?, ino)
}

fn ask(netlink: &OwnedFd, ino: u64) -> Result<Diag> {
    let what = || format!("sock_diag for socket:[{ino}]");
    let ino = u32::try_from(ino).map_err(|_| HookError::invalid(format!("{}: number too large", what())))?;
    let answer = exchange(netlink, &request(ino)).map_err(|error| HookError::failed(what(), error))?;
    parse(&answer).map_err(|error| HookError::failed(what(), error))
}

/// A sock_diag socket in the namespace of `socket`; made by a thread that enters it and ends.
fn open(socket: BorrowedFd<'_>) -> Result<OwnedFd> {
    let namespace = namespace(socket)?;
    let stat = |file: &File| file.metadata().map(|stat| stat.ino());
    let ours = File::open("/proc/self/ns/net").and_then(|file| stat(&file));
    let theirs = stat(&namespace);
    match (ours, theirs) {
        (Ok(ours), Ok(theirs)) if ours == theirs => open_here(),
        _ => std::thread::spawn(move || {
            // SAFETY: changes this thread alone, which ends below.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } < 0 {
                return Err(HookError::failed("setns to a net namespace", io::Error::last_os_error()));
            }
            open_here()
        })
        .join()
        .unwrap_or_else(|_| Err(HookError::invalid("the sock_diag thread panicked"))),
    }
}

fn open_here() -> Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd =
        unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, NETLINK_SOCK_DIAG) };
    if fd < 0 {
        return Err(HookError::failed("opening a sock_diag socket", io::Error::last_os_error()));
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `nlmsghdr` and `unix_diag_req`.
fn request(ino: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(40);
    bytes.extend(40u32.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    bytes.extend([0; 8]); // sequence, port
    bytes.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    bytes.extend(u32::MAX.to_ne_bytes()); // states
    bytes.extend(ino.to_ne_bytes());
    bytes.extend((UDIAG_SHOW_PEER | UDIAG_SHOW_ICONS | UDIAG_SHOW_RQLEN).to_ne_bytes());
    bytes.extend([0xff; 8]); // no cookie
    bytes
}

fn exchange(netlink: &OwnedFd, request: &[u8]) -> io::Result<Vec<u8>> {
    let fd = netlink.as_raw_fd();
    // SAFETY: reads the slice.
    if unsafe { libc::send(fd, request.as_ptr().cast(), request.len(), 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // net.core.somaxconn is 4096 as a rule.
    let mut answer = vec![0u8; 65536];
    // SAFETY: writes at most the vector's length.
    let length = unsafe { libc::recv(fd, answer.as_mut_ptr().cast(), answer.len(), 0) };
    if length < 0 {
        return Err(io::Error::last_os_error());
    }
    answer.truncate(length as usize);
    Ok(answer)
}

fn parse(answer: &[u8]) -> io::Result<Diag> {
    let short = || io::Error::from_raw_os_error(libc::EPROTO);
    let u16_at = |at: usize| -> io::Result<u16> {
        let bytes = answer.get(at..at + 2).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u16::from_ne_bytes).ok_or_else(short)
    };
    let u32_at = |at: usize| -> io::Result<u32> {
        let bytes = answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_ne_bytes).ok_or_else(short)
    };
    if u16_at(4)? == NLMSG_ERROR {
        return Err(io::Error::from_raw_os_error((u32_at(16)? as i32).wrapping_neg()));
    }
    if u16_at(4)? != SOCK_DIAG_BY_FAMILY {
        return Err(short());
    }
    let end = (u32_at(0)? as usize).min(answer.len());
    let mut diag = Diag::default();
    let mut at = 32; // nlmsghdr and unix_diag_msg, 16 bytes each
    while at + 4 <= end {
        let (length, kind) = (usize::from(u16_at(at)?), u16_at(at + 2)?);
        if length < 4 {
            return Err(short());
        }
        match kind {
            UNIX_DIAG_PEER => diag.peer = Some(u32_at(at + 4)?),
            UNIX_DIAG_ICONS => {
                let waiting = (at + 4..at + length).step_by(4).map(u32_at);
                diag.waiting = waiting.collect::<io::Result<_>>()?;
            }
            UNIX_DIAG_RQLEN => {
                diag.receive_queue = u32_at(at + 4)?;
                diag.write_queue = u32_at(at + 8)?;
            }
            UNIX_DIAG_SHUTDOWN => {
                diag.shutdown = u32::from(*answer.get(at + 4).ok_or_else(short)?);
            }
            _ => {}
        }
        at += length.next_multiple_of(4);
    }
    Ok(diag)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Write,
        net::Shutdown,
        os::{fd::AsFd, unix::net::UnixStream},
    };

    fn ino(fd: BorrowedFd<'_>) -> u64 {
        File::from(fd.try_clone_to_owned().unwrap()).metadata().unwrap().ino()
    }

    #[test]
    fn pair_knows_its_peer_and_queue() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(b"hello").unwrap();
        a.shutdown(Shutdown::Write).unwrap();
        let diag = query(b.as_fd(), ino(b.as_fd())).unwrap();
        assert_eq!(diag.peer.map(u64::from), Some(ino(a.as_fd())));
        assert_eq!((diag.receive_queue, diag.shutdown), (5, 1));
        drop(a);
        let diag = query(b.as_fd(), ino(b.as_fd())).unwrap();
        assert_eq!((diag.peer.unwrap_or(0), diag.shutdown), (0, 3));
    }

    #[test]
    fn truncated_answers_are_errors() {
        let (a, _b) = UnixStream::pair().unwrap();
        let netlink = open(a.as_fd()).unwrap();
        let answer = exchange(&netlink, &request(ino(a.as_fd()) as u32)).unwrap();
        assert!(parse(&answer).is_ok());
        for length in 0..32 {
            // Nothing but errors and empty answers, and no panic.
            let _ = parse(&answer[..length]);
        }
        assert_eq!(query(a.as_fd(), 0xffff_fff0).unwrap_err().errno, libc::ENOENT);
    }
}
