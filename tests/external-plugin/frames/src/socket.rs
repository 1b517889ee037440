//! Packet sockets: packet(7).

use crate::{
    diag,
    records::{Option as Saved, PacketSocket, Ring},
    ring::View,
};
use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector,
    socket::{self, options},
};
use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

const TPACKET_V2: u32 = 1;
/// For local experiments (include/uapi/linux/if_ether.h has none; IEEE 802 numbers): nobody else sends these.
const EXPERIMENTAL: u16 = 0x88b5;
const PATIENCE: Duration = Duration::from_secs(2);

pub struct Sockets;

/// The protocol and the interface that a `sockaddr_ll` names.
fn bound_to(address: &[u8]) -> (u16, u32) {
    let protocol = address.get(2..4).map_or(0, |p| u16::from_be_bytes([p[0], p[1]]));
    let index = address.get(4..8).map_or(0, |i| u32::from_ne_bytes([i[0], i[1], i[2], i[3]]));
    (protocol, index)
}

/// A `sockaddr_ll` for a protocol on an interface.
fn address(protocol: u16, index: u32) -> Vec<u8> {
    let mut address = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
    address.extend(protocol.to_be_bytes());
    address.extend(index.to_ne_bytes());
    // Type, packet type, and a hardware address of six bytes: that of the loopback device.
    address.extend([0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0]);
    address
}

fn name_of(index: u32) -> Option<String> {
    let mut name = [0u8; libc::IFNAMSIZ];
    // SAFETY: the buffer is as long as if_indextoname(3) wants it.
    let found = unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) };
    let text = std::ffi::CStr::from_bytes_until_nul(&name).ok()?.to_str().ok()?;
    (!found.is_null()).then(|| text.to_owned())
}

fn index_of(name: &str) -> Result<u32> {
    let text = CString::new(name).map_err(|_| HookError::invalid("a zero in the name of an interface"))?;
    // SAFETY: a text that ends with zero.
    match unsafe { libc::if_nametoindex(text.as_ptr()) } {
        0 => Err(HookError::failed(format!("interface {name}"), io::Error::last_os_error())),
        index => Ok(index),
    }
}

/// Brings a new ring to where the kernel fills `ring.next` next: that many packets of our own are received into it.
fn advance(fd: BorrowedFd<'_>, ring: &Ring) -> Result<()> {
    if ring.next == 0 {
        return Ok(());
    }
    let failed =
        |error| HookError::failed("moving a ring on by the loopback device", error).remedy("lo must be up");
    let lo = address(EXPERIMENTAL, index_of("lo")?);
    socket::bind(fd, &lo).map_err(failed)?;
    let sender = socket::socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0).map_err(failed)?;
    for _ in 0..ring.next {
        let (to, length) = (lo.as_ptr().cast(), lo.len() as libc::socklen_t);
        // SAFETY: the kernel reads the address and one byte.
        let sent = unsafe { libc::sendto(sender.as_raw_fd(), [0u8].as_ptr().cast(), 1, 0, to, length) };
        if sent < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
    }
    let view = View::new(fd, ring)?;
    let began = Instant::now();
    while !view.is_filled(ring.next - 1) {
        if began.elapsed() > PATIENCE {
            return Err(failed(io::Error::from_raw_os_error(libc::ETIMEDOUT)));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // Bound to no protocol: nothing more comes.
    socket::bind(fd, &address(0, 0)).map_err(failed)
}

impl Descriptor for Sockets {
    type Record = PacketSocket;
    const KIND: &'static str = "packet-socket";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Socket { domain: libc::AF_PACKET, kind: -1, protocol: -1 }]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        Ok(socket::describe::<Self>(handle))
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<PacketSocket>> {
        let handle = socket::only_handle(object)?;
        let label = object.description.as_str();
        let refuse = |why: &str, remedy: &str| Err(HookError::unsupported(label, why, remedy));
        let (owned, _) = socket::open(host, object)?;
        let fd = owned.as_fd();
        let facts = diag::facts(handle.ino)?;
        if let Some(more) = facts.more {
            return refuse(&format!("it has {more}, which this plugin does not know"), "do without");
        }
        let ring = match facts.ring {
            None => None,
            Some(_) if facts.version != TPACKET_V2 => {
                return refuse("its ring is not of TPACKET_V2", "use that version");
            }
            Some([block_size, block_count, frame_size, frame_count]) => {
                let ring = Ring { block_size, block_count, frame_size, frame_count, next: 0 };
                let Some(next) = View::new(fd, &ring)?.next() else {
                    return refuse("its frames are not handled in order", "let the program handle them");
                };
                Some(Ring { next, ..ring })
            }
        };
        let failed = |what: &'static str| move |error| HookError::failed(what, error);
        let waiting = socket::poll(fd, libc::POLLIN).map_err(failed("poll"))? & libc::POLLIN != 0;
        if ring.is_none() && waiting {
            return refuse("packets wait in its queue", "let the program read them");
        }
        let kind = socket::get_int(fd, libc::SOL_SOCKET, libc::SO_TYPE).map_err(failed("SO_TYPE"))?;
        let address = socket::local_address(fd).map_err(failed("getsockname"))?;
        let interface = name_of(bound_to(&address).1).unwrap_or_default();
        let option = |o: options::Saved| Saved { level: o.level, name: o.name, value: o.value };
        let options = options::read(fd, &[options::SOCKET])?.into_iter().map(option).collect();
        Ok(Dumped::new(PacketSocket { r#type: kind, address, interface, ring, options }))
    }

    fn create(&self, _: &Host<'_>, _: &ObjectInfo, record: &PacketSocket) -> Result<Vec<OwnedFd>> {
        let failed = |what: &'static str| move |error| HookError::failed(what, error);
        let fd = socket::socket(libc::AF_PACKET, record.r#type, 0).map_err(failed("socket"))?;
        let option = |o: &Saved| options::Saved { level: o.level, name: o.name, value: o.value.clone() };
        let saved: Vec<_> = record.options.iter().map(option).collect();
        options::write(fd.as_fd(), &[options::SOCKET], &saved)?;
        if let Some(ring) = &record.ring {
            let version = TPACKET_V2.cast_signed();
            socket::set_int(fd.as_fd(), libc::SOL_PACKET, libc::PACKET_VERSION, version)
                .map_err(failed("PACKET_VERSION"))?;
            let request = [ring.block_size, ring.block_count, ring.frame_size, ring.frame_count];
            let request: Vec<u8> = request.iter().flat_map(|word| word.to_ne_bytes()).collect();
            socket::set_option(fd.as_fd(), libc::SOL_PACKET, libc::PACKET_RX_RING, &request)
                .map_err(failed("PACKET_RX_RING"))?;
            advance(fd.as_fd(), ring)?;
        }
        Ok(vec![fd])
    }

    /// The mapped rings have their contents by now; from here on the kernel adds to them.
    fn settle(&self, host: &Host<'_>, object: &ObjectInfo, record: &PacketSocket) -> Result<()> {
        let (protocol, _) = bound_to(&record.address);
        let index = if record.interface.is_empty() { 0 } else { index_of(&record.interface)? };
        if protocol == 0 {
            return Ok(());
        }
        let fd = host.open_handle(socket::only_handle(object)?.id)?;
        socket::bind(fd.as_fd(), &address(protocol, index)).map_err(|error| HookError::failed("bind", error))
    }
}
