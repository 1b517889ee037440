//! What sock_diag(7) tells of internet sockets beyond what they say themselves: linux/inet_diag.h.

use super::{check, in_namespace, namespace, socket};
use crate::{HookError, Result};
use std::{
    collections::BTreeMap,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    sync::{Mutex, PoisonError},
};

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Attributes.
const SHUTDOWN: u16 = 8;
const MD5_KEYS: u16 = 18;
/// Sizes of `nlmsghdr` and `inet_diag_msg`, and where the latter has the inode number.
const HEADER: usize = 16;
const MESSAGE: usize = 72;
const INODE: usize = 68;

/// What is told of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Diagnosis {
    /// 1: shut down for receiving, 2: for sending.
    pub shutdown: u32,
    /// Whether segments are signed (`TCP_MD5SIG`).
    pub has_md5_keys: bool,
}

type Table = BTreeMap<u32, Diagnosis>;
/// By net namespace, domain and protocol. A socket that is not there is a reason to ask again.
static KNOWN: Mutex<BTreeMap<(u64, i32, i32), Table>> = Mutex::new(BTreeMap::new());

/// What the kernel tells of the socket `ino`. None if it is not in the kernel's tables (it has no port), or if the kernel was
/// built without this interface.
///
/// # Errors
/// If the kernel refuses to tell: it needs CAP_NET_ADMIN.
pub fn inet(fd: BorrowedFd<'_>, domain: i32, protocol: i32, ino: u64) -> Result<Option<Diagnosis>> {
    let failed = |error| HookError::failed("asking sock_diag", error);
    let namespace = namespace(fd)?;
    let key = (namespace.metadata().map_err(failed)?.ino(), domain, protocol);
    let number = ino as u32;
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = known.get(&key).and_then(|table| table.get(&number)) {
        return Ok(Some(*found));
    }
    let asked = in_namespace(&namespace, move || table(domain, protocol));
    let table = match asked {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        other => other.map_err(failed)?,
    };
    let found = table.get(&number).copied();
    known.insert(key, table);
    Ok(found)
}

/// All sockets of a domain and protocol in the net namespace of the calling thread.
fn table(domain: i32, protocol: i32) -> io::Result<Table> {
    let netlink = socket(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_SOCK_DIAG)?;
    ask(&netlink, &[domain as u8, protocol as u8])?;
    let mut table = Table::new();
    let mut buffer = vec![0u8; 1 << 16];
    loop {
        let place = buffer.as_mut_ptr().cast();
        // SAFETY: the kernel writes at most the vector's length.
        let length = unsafe { libc::recv(netlink.as_raw_fd(), place, buffer.len(), 0) };
        let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
        if !take(&buffer[..length], &mut table)? {
            return Ok(table);
        }
    }
}

/// Asks for all sockets in all states.
fn ask(netlink: &OwnedFd, what: &[u8; 2]) -> io::Result<()> {
    // nlmsghdr, then inet_diag_req_v2: family, protocol, extensions, padding, states, an id that is not looked at.
    let mut request = Vec::with_capacity(HEADER + 56);
    request.extend(((HEADER + 56) as u32).to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    request.extend([0; 8]);
    request.extend(what);
    // INET_DIAG_INFO: the keys come with it.
    request.extend([1 << 1, 0]);
    request.extend(u32::MAX.to_ne_bytes());
    request.resize(HEADER + 56, 0);
    // SAFETY: the kernel reads the vector.
    let sent = unsafe { libc::send(netlink.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    check(i32::try_from(sent).unwrap_or(-1)).map(drop)
}

/// Reads a series of answers; false after the last one.
fn take(mut answers: &[u8], table: &mut Table) -> io::Result<bool> {
    let malformed = || io::Error::from_raw_os_error(libc::EPROTO);
    while answers.len() >= HEADER {
        let word = |at: usize| answers.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
        let length = word(0).ok_or_else(malformed)? as usize;
        let kind = u16::from_ne_bytes([answers[4], answers[5]]);
        let message = answers.get(HEADER..length).ok_or_else(malformed)?;
        match kind {
            NLMSG_DONE => return Ok(false),
            NLMSG_ERROR => {
                let error = word(HEADER).ok_or_else(malformed)?.cast_signed();
                return Err(io::Error::from_raw_os_error(error.wrapping_neg()));
            }
            _ if message.len() >= MESSAGE => {
                let ino = message[INODE..INODE + 4].try_into().map_or(0, u32::from_ne_bytes);
                table.insert(ino, diagnosis(&message[MESSAGE..]));
            }
            _ => return Err(malformed()),
        }
        answers = answers.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

fn diagnosis(mut attributes: &[u8]) -> Diagnosis {
    let mut found = Diagnosis::default();
    while let Some(head) = attributes.first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]])).max(4);
        match u16::from_ne_bytes([head[2], head[3]]) {
            SHUTDOWN => found.shutdown = attributes.get(4).copied().map_or(0, u32::from) & 3,
            MD5_KEYS => found.has_md5_keys = length > 4,
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, net::UdpSocket, os::fd::AsFd};

    #[test]
    fn a_half_that_is_shut_down_is_seen() {
        let sockets = [0, 1].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        sockets[0].connect(sockets[1].local_addr().unwrap()).unwrap();
        super::super::shutdown(sockets[0].as_fd(), libc::SHUT_WR).unwrap();
        let told = sockets.each_ref().map(|socket| {
            let ino = fs::metadata(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap().ino();
            inet(socket.as_fd(), libc::AF_INET, libc::IPPROTO_UDP, ino).unwrap().unwrap().shutdown
        });
        assert_eq!(told, [2, 0]);
    }

    #[test]
    fn damaged_answers_are_no_panic() {
        let mut table = Table::new();
        assert!(take(&[255; 20], &mut table).is_err());
        assert!(take(&[0; 16], &mut table).is_err());
        assert_eq!(diagnosis(&[0; 3]), Diagnosis::default());
        assert_eq!(diagnosis(&[1, 0, 8, 0, 9]).shutdown, 1);
    }
}
