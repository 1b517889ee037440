//! Messages to the kernel and back: netlink(7), rtnetlink(7). One request at a time, each with its answer.

use crate::record::stasis::ns_net::v1::Attribute;
use netlink_packet_core::{
    DefaultNla, Emitable, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE,
    NLMSG_ERROR, NetlinkBuffer, NetlinkHeader, Nla, NlasIterator, Parseable,
};
use netlink_sys::{Socket, SocketAddr};
use stasis_plugin_api::{HookError, socket};
use std::{
    fmt, io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Bytes of `nlmsghdr`.
const HEADER: usize = 16;
/// A list that changes while it is read is read again, so many times at most.
const ATTEMPTS: usize = 20;
/// `NLMSGERR_ATTR_MSG`: what the kernel says about an error.
const ERROR_TEXT: u16 = 1;
/// For a batch and its answers.
const ROOM: i32 = 64 << 20;
/// No attribute is longer: its length, with its header, is 16 bits wide.
const LONGEST: usize = u16::MAX as usize - 4;

/// What the kernel answers to a request that it does not carry out.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub error: io::Error,
    /// The kernel's own explanation, or nothing.
    pub text: String,
}

impl Refusal {
    pub fn errno(&self) -> i32 {
        self.error.raw_os_error().unwrap_or_default()
    }

    /// As the error of a hook.
    pub fn into_hook(self, what: impl fmt::Display) -> HookError {
        match self.text.is_empty() {
            true => HookError::failed(what.to_string(), self.error),
            false => HookError::failed(format!("{what} ({})", self.text), self.error),
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self { error, text: String::new() }
    }
}

pub(crate) type Answer<T> = std::result::Result<T, Refusal>;

fn malformed() -> Refusal {
    io::Error::from_raw_os_error(libc::EPROTO).into()
}

/// A socket to one part of the kernel, in the network namespace in which it was made.
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// `protocol` is one of `NETLINK_*`.
    pub fn open(protocol: i32) -> io::Result<Self> {
        let mut socket = Socket::new(protocol as isize)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Older kernels know neither; what they say is shorter, then.
        let _ = socket.set_ext_ack(true).and_then(|()| socket.set_cap_ack(true));
        Ok(Self { socket, sequence: 0 })
    }

    /// To rtnetlink(7).
    pub fn route() -> io::Result<Self> {
        Self::open(libc::NETLINK_ROUTE)
    }

    fn send(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.sequence += 1;
        let message = message(kind, flags, self.sequence, body);
        self.socket.send(&message, 0).map(drop)
    }

    /// Asks for something to be done.
    pub fn request(&mut self, kind: u16, flags: u16, body: &[u8]) -> Answer<()> {
        self.send(kind, flags | NLM_F_REQUEST | NLM_F_ACK, body)?;
        self.receive(|_, _| {}).map(drop)
    }

    /// Asks for one thing: the body of the answer.
    pub fn get(&mut self, kind: u16, body: &[u8]) -> Answer<Vec<u8>> {
        self.send(kind, NLM_F_REQUEST | NLM_F_ACK, body)?;
        let mut found = None;
        self.receive(|_, payload| found = Some(payload.to_vec()))?;
        found.ok_or_else(malformed)
    }

    /// Asks for a list: the bodies of its messages.
    pub fn list(&mut self, kind: u16, body: &[u8]) -> Answer<Vec<Vec<u8>>> {
        for _ in 0..ATTEMPTS {
            self.send(kind, NLM_F_REQUEST | NLM_F_DUMP, body)?;
            let mut found = Vec::new();
            if self.receive(|_, payload| found.push(payload.to_vec()))? {
                return Ok(found);
            }
        }
        Err(io::Error::from_raw_os_error(libc::EINTR).into())
    }

    /// Sends several messages at once, of which the kernel carries out all or none.
    pub fn batch(&self, messages: &[u8]) -> Answer<()> {
        let fd = self.as_fd();
        for name in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
            socket::set_int(fd, libc::SOL_SOCKET, name, ROOM)?;
        }
        self.socket.send(messages, 0)?;
        // All answers are there when the call returns.
        self.socket.set_non_blocking(true)?;
        loop {
            let bytes = match self.socket.recv_from_full() {
                Ok((bytes, _)) => bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let message = NetlinkBuffer::new_checked(rest).map_err(|_| malformed())?;
                if message.message_type() == NLMSG_ERROR {
                    end(message.payload(), message.flags())?;
                }
                rest = rest.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    /// The descriptor, for those who keep it.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket lives as long as what borrows it.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }

    /// Reads up to the end of an answer; false if what was listed has changed meanwhile.
    fn receive(&mut self, mut take: impl FnMut(u16, &[u8])) -> Answer<bool> {
        let mut steady = true;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let message = NetlinkBuffer::new_checked(rest).map_err(|_| malformed())?;
                let payload = message.payload();
                let (kind, flags) = (message.message_type(), message.flags());
                steady &= flags & NLM_F_DUMP_INTR == 0;
                match kind {
                    // What is left of an answer that an error has cut short.
                    _ if message.sequence_number() != self.sequence => {}
                    NLMSG_ERROR | NLMSG_DONE => return end(payload, flags).map(|()| steady),
                    _ => take(kind, payload),
                }
                rest = rest.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

/// The last message of an answer: an errno, and perhaps words.
fn end(payload: &[u8], flags: u16) -> Answer<()> {
    let code = payload.first_chunk::<4>().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
    if code >= 0 {
        return Ok(());
    }
    let explained = flags & NLM_F_ACK_TLVS != 0;
    let attributes = payload.get(4 + HEADER..).filter(|_| explained).map_or(Vec::new(), parse);
    let text = find(&attributes, ERROR_TEXT).map_or(String::new(), text);
    Err(Refusal { error: io::Error::from_raw_os_error(code.saturating_neg()), text })
}

/// A whole message.
pub(crate) fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.length = (HEADER + body.len()) as u32;
    (header.message_type, header.flags, header.sequence_number) = (kind, flags, sequence);
    let mut bytes = vec![0; HEADER];
    header.emit(&mut bytes);
    bytes.extend(body);
    bytes
}

/// A text that ends with a zero.
pub(crate) fn text(bytes: &[u8]) -> String {
    let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(bytes).into_owned()
}

/// A number, in the machine's order; 0 if it is none.
pub(crate) fn number(bytes: &[u8]) -> u32 {
    match *bytes {
        [one] => one.into(),
        [one, two] => u16::from_ne_bytes([one, two]).into(),
        [one, two, three, four, ..] => u32::from_ne_bytes([one, two, three, four]),
        _ => 0,
    }
}

/// All attributes of a message or of another attribute, up to the first that is damaged.
pub(crate) fn parse(bytes: &[u8]) -> Vec<Attribute> {
    let attributes = NlasIterator::new(bytes).map_while(Result::ok);
    let attribute = |buffer| {
        let nla = DefaultNla::parse(&buffer).ok()?;
        let mut value = vec![0; nla.value_len()];
        nla.emit_value(&mut value);
        Some(Attribute { kind: nla.kind().into(), value })
    };
    attributes.filter_map(attribute).collect()
}

/// The type of an attribute, without its flags.
pub(crate) fn kind(attribute: &Attribute) -> u16 {
    attribute.kind as u16 & netlink_packet_core::NLA_TYPE_MASK
}

/// The value of the first attribute of a type.
pub(crate) fn find(attributes: &[Attribute], wanted: u16) -> Option<&[u8]> {
    attributes.iter().find(|attribute| kind(attribute) == wanted).map(|attribute| attribute.value.as_slice())
}

/// Likewise, as a number; 0 if there is none.
pub(crate) fn find_number(attributes: &[Attribute], wanted: u16) -> u32 {
    find(attributes, wanted).map_or(0, number)
}

/// The attributes in another one.
pub(crate) fn find_nested(attributes: &[Attribute], wanted: u16) -> Vec<Attribute> {
    find(attributes, wanted).map_or(Vec::new(), parse)
}

/// The opposite of [`parse`]. What is too long for an attribute, as no image of ours has it, is left out.
pub(crate) fn emit(attributes: &[Attribute]) -> Vec<u8> {
    let fitting = attributes.iter().filter(|attribute| attribute.value.len() <= LONGEST);
    let nlas: Vec<DefaultNla> =
        fitting.map(|one| DefaultNla::new(one.kind as u16, one.value.clone())).collect();
    let nlas = nlas.as_slice();
    let mut bytes = vec![0; nlas.buffer_len()];
    nlas.emit(&mut bytes);
    bytes
}

/// An attribute.
pub(crate) fn attribute(kind: u16, value: impl Into<Vec<u8>>) -> Attribute {
    Attribute { kind: kind.into(), value: value.into() }
}

/// One that is a number of 32 bits.
pub(crate) fn word(kind: u16, value: u32) -> Attribute {
    attribute(kind, value.to_ne_bytes())
}

/// One that is a text.
pub(crate) fn string(kind: u16, value: &str) -> Attribute {
    attribute(kind, [value.as_bytes(), &[0]].concat())
}

/// One that has others in it.
pub(crate) fn nested(kind: u16, attributes: &[Attribute]) -> Attribute {
    attribute(kind | netlink_packet_core::NLA_F_NESTED, emit(attributes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_written_and_read() {
        let inner = [word(7, 9), string(2, "eth0"), attribute(3, [1])];
        let outer = [nested(18, &inner), attribute(1, [])];
        let read = parse(&emit(&outer));
        assert_eq!(read, outer);
        assert_eq!(find_nested(&read, 18), inner);
        assert_eq!(text(find(&inner, 2).unwrap()), "eth0");
        assert_eq!(find_number(&inner, 7), 9);
        assert!(parse(&[9, 0, 1]).is_empty());
        assert!(emit(&[attribute(1, vec![0; 1 << 17])]).is_empty());
    }

    #[test]
    fn errors_have_their_words() {
        let words = [0xff_ff_ff_ea_u32.to_ne_bytes().to_vec(), vec![0; 16], emit(&[string(1, "no such")])];
        let refusal = end(&words.concat(), NLM_F_ACK_TLVS).unwrap_err();
        assert_eq!((refusal.errno(), refusal.text.as_str()), (libc::EINVAL, "no such"));
        assert!(end(&[0; 4], 0).is_ok());
        assert!(end(&[], 0).is_ok());
        assert!(end(&i32::MIN.to_ne_bytes(), NLM_F_ACK_TLVS).is_err());
    }

    #[test]
    fn the_loopback_device_is_listed() {
        let mut netlink = Netlink::route().unwrap();
        let links = netlink.list(18, &[0; 16]).unwrap();
        assert!(links.iter().any(|link| find(&parse(&link[16..]), 3) == Some(b"lo\0")));
        assert_eq!(netlink.request(16, 0, &[0; 3]).unwrap_err().errno(), libc::EINVAL);
    }
}
