//! What only packet_diag tells: linux/packet_diag.h.

use crate::record::stasis::packet::v1::Membership;
use stasis_plugin_api::socket;
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// PACKET_SHOW_MCLIST, RING_CFG and FANOUT.
const SHOW: u32 = 2 | 4 | 8;
const MEMBERSHIPS: u16 = 1;
const RECEIVE_RING: u16 = 2;
const SEND_RING: u16 = 3;
const FANOUT: u16 = 4;
/// Sizes of `nlmsghdr`, `packet_diag_msg` and `packet_diag_mclist`.
const HEADER: usize = 16;
const MESSAGE: usize = 16;
const MEMBERSHIP: usize = 44;
/// MAX_ADDR_LEN
const ADDRESS: usize = 32;

/// What is told of a socket.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Diagnosis {
    pub memberships: Vec<Membership>,
    pub has_ring: bool,
    pub has_fanout: bool,
}

/// Asks for the socket `ino` of the calling thread's net namespace.
pub fn ask(ino: u32) -> io::Result<Option<Diagnosis>> {
    let netlink = socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_SOCK_DIAG)?;
    // nlmsghdr, then packet_diag_req: family, protocol, padding, inode number (not looked at), what to show, cookie.
    let mut request = ((HEADER + 20) as u32).to_ne_bytes().to_vec();
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    request.extend([0; 8]);
    request.extend([libc::AF_PACKET as u8, 0, 0, 0]);
    request.extend([0; 4]);
    request.extend(SHOW.to_ne_bytes());
    request.resize(HEADER + 20, 0);
    // SAFETY: the kernel reads the vector.
    let sent = unsafe { libc::send(netlink.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    receive(&netlink, ino)
}

fn receive(netlink: &OwnedFd, ino: u32) -> io::Result<Option<Diagnosis>> {
    let mut found = None;
    let mut buffer = vec![0u8; 1 << 16];
    loop {
        let place = buffer.as_mut_ptr().cast();
        // SAFETY: the kernel writes at most the vector's length.
        let length = unsafe { libc::recv(netlink.as_raw_fd(), place, buffer.len(), 0) };
        let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
        if !take(&buffer[..length], ino, &mut found)? {
            return Ok(found);
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// Reads a series of answers; false after the last one.
fn take(mut answers: &[u8], ino: u32, found: &mut Option<Diagnosis>) -> io::Result<bool> {
    let malformed = || io::Error::from_raw_os_error(libc::EPROTO);
    while answers.len() >= HEADER {
        let length = word(answers, 0).ok_or_else(malformed)? as usize;
        let message = answers.get(HEADER..length).ok_or_else(malformed)?;
        match half(answers, 4) {
            Some(NLMSG_DONE) => return Ok(false),
            Some(NLMSG_ERROR) => {
                let error = word(message, 0).ok_or_else(malformed)?.cast_signed();
                return Err(io::Error::from_raw_os_error(error.wrapping_neg()));
            }
            _ if word(message, 4) == Some(ino) => {
                *found = Some(diagnosis(message.get(MESSAGE..).unwrap_or_default()))
            }
            _ => {}
        }
        answers = answers.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

fn diagnosis(mut attributes: &[u8]) -> Diagnosis {
    let mut found = Diagnosis::default();
    while let (Some(length), Some(kind)) = (half(attributes, 0), half(attributes, 2)) {
        let length = usize::from(length).max(4);
        let value = attributes.get(4..length).unwrap_or_default();
        match kind & 0x3fff {
            MEMBERSHIPS => {
                found.memberships = value.chunks_exact(MEMBERSHIP).filter_map(membership).collect()
            }
            // struct packet_diag_ring: all zeros if there is none.
            RECEIVE_RING | SEND_RING => found.has_ring |= value.iter().any(|byte| *byte != 0),
            FANOUT => found.has_fanout = true,
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// Index, count, type, length of the address, address.
fn membership(bytes: &[u8]) -> Option<Membership> {
    let length = usize::from(half(bytes, 10)?).min(ADDRESS);
    Some(Membership {
        interface: word(bytes, 0)?,
        count: word(bytes, 4)?,
        kind: half(bytes, 8)?.into(),
        address: bytes.get(12..12 + length)?.to_vec(),
    })
}
