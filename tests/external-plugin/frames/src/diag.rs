//! What only packet_diag tells of a packet socket (include/uapi/linux/packet_diag.h, sock_diag(7)).

use stasis_plugin_api::{HookError, Result, socket};
use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// PACKET_SHOW_INFO, MCLIST, RING_CFG, FANOUT and FILTER.
const SHOW: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x20;
const PACKET_DIAG_INFO: u16 = 0;
const PACKET_DIAG_MCLIST: u16 = 1;
const PACKET_DIAG_RX_RING: u16 = 2;
const PACKET_DIAG_TX_RING: u16 = 3;
const PACKET_DIAG_FANOUT: u16 = 4;
const PACKET_DIAG_FILTER: u16 = 7;
/// PDI_RUNNING: it is bound.
const RUNNING: u32 = 1;
const NLMSG_DONE: u16 = 3;
const NLMSG_ERROR: u16 = 2;

/// A packet socket without its contents.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// TPACKET_V1 (0) to V3 (2).
    pub version: u32,
    /// PACKET_DIAG_RX_RING: block size, blocks, frame size, frames.
    pub ring: Option<[u32; 4]>,
    /// What this plugin does not keep.
    pub more: Option<&'static str>,
}

/// The facts of the packet socket with this inode number, in our network namespace.
pub fn facts(ino: u64) -> Result<Facts> {
    let failed = |error| HookError::failed("asking packet_diag", error);
    let netlink =
        socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG).map_err(failed)?;
    // A netlink header, then a packet_diag_req; packet sockets can only be asked for all at once.
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    let mut request = Vec::new();
    request.extend(36u32.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(flags.to_ne_bytes());
    request.extend([0; 8]);
    request.extend([libc::AF_PACKET as u8, 0, 0, 0]);
    request.extend(0u32.to_ne_bytes());
    request.extend(SHOW.to_ne_bytes());
    request.extend([0; 8]);
    // SAFETY: the kernel reads as many bytes as there are.
    let sent = unsafe { libc::send(netlink.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    if sent < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    let mut buffer = vec![0u8; 1 << 16];
    loop {
        // SAFETY: the buffer is as long as is said.
        let n =
            unsafe { libc::recv(netlink.as_fd().as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let n = usize::try_from(n).map_err(|_| failed(io::Error::last_os_error()))?;
        for (kind, message) in messages(&buffer[..n]) {
            match kind {
                NLMSG_DONE => return Err(HookError::invalid("packet_diag does not know the socket")),
                NLMSG_ERROR => return Err(failed(io::Error::from_raw_os_error(libc::EOPNOTSUPP))),
                _ if number(message, 4) == ino as u32 => {
                    return Ok(read(message.get(16..).unwrap_or_default()));
                }
                _ => {}
            }
        }
    }
}

fn number(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    word.map_or(0, u32::from_ne_bytes)
}

fn half(bytes: &[u8], at: usize) -> u16 {
    let half = bytes.get(at..at + 2).and_then(|half| half.try_into().ok());
    half.map_or(0, u16::from_ne_bytes)
}

/// Type and contents of netlink messages (netlink(7)).
fn messages(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while bytes.len() >= 16 {
        let length = (number(bytes, 0) as usize).clamp(16, bytes.len());
        found.push((half(bytes, 4), &bytes[16..length]));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

fn read(mut attributes: &[u8]) -> Facts {
    let mut facts = Facts::default();
    while attributes.len() >= 4 {
        let length = usize::from(half(attributes, 0)).clamp(4, attributes.len());
        let value = &attributes[4..length];
        match half(attributes, 2) {
            PACKET_DIAG_INFO => {
                facts.version = number(value, 4);
                let settings = [8, 12, 16].map(|at| number(value, at));
                if number(value, 20) & !RUNNING != 0 || settings != [0; 3] {
                    facts.more = Some("options of its own (PACKET_AUXDATA, PACKET_RESERVE or the like)");
                }
            }
            PACKET_DIAG_RX_RING => facts.ring = Some([0, 4, 8, 12].map(|at| number(value, at))),
            PACKET_DIAG_TX_RING => facts.more = Some("a ring to send from"),
            PACKET_DIAG_FANOUT => facts.more = Some("a fanout group"),
            PACKET_DIAG_MCLIST if !value.is_empty() => facts.more = Some("memberships"),
            PACKET_DIAG_FILTER if !value.is_empty() => facts.more = Some("a filter"),
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read() {
        let attribute = |kind: u16, words: &[u32]| {
            let mut bytes = (4 + 4 * words.len() as u16).to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            words.iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
            bytes
        };
        let mut bytes = attribute(PACKET_DIAG_INFO, &[3, 1, 0, 0, 0, RUNNING]);
        bytes.extend(attribute(PACKET_DIAG_MCLIST, &[]));
        bytes.extend(attribute(PACKET_DIAG_RX_RING, &[4096, 8, 2048, 16, 0, 0, 0]));
        let plain = Facts { version: 1, ring: Some([4096, 8, 2048, 16]), more: None };
        assert_eq!(read(&bytes), plain);
        bytes.extend(attribute(PACKET_DIAG_FANOUT, &[7]));
        assert_eq!(read(&bytes).more, Some("a fanout group"));
        assert_eq!(read(&bytes[..bytes.len() - 3]).ring, plain.ring);
    }
}
