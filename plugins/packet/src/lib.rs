//! Packet sockets: packet(7). Protocol, interface, memberships, options and filters. Frames that wait to be read are dropped, with a
//! warning, as the kernel drops them whenever nobody reads: a socket that hears all traffic is never without any.

mod diag;
mod dump;
mod restore;

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, Host, ObjectInfo, Result, Selector, export_plugin, register,
    socket::{self, options::Spec},
};
use std::os::fd::{BorrowedFd, OwnedFd};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::packet::v1::Socket;

const SOL_PACKET: i32 = 263;

macro_rules! table {
    ($($name:literal, $label:literal;)*) => {
        &[$(Spec { level: SOL_PACKET, name: $name, label: $label, size: 4 }),*]
    };
}

/// linux/if_packet.h. The version comes first: others depend on it.
const OPTIONS: &[Spec] = table! {
    10, "PACKET_VERSION";
    12, "PACKET_RESERVE";
    7, "PACKET_COPY_THRESH";
    8, "PACKET_AUXDATA";
    9, "PACKET_ORIGDEV";
    14, "PACKET_LOSS";
    15, "PACKET_VNET_HDR";
    17, "PACKET_TIMESTAMP";
    19, "PACKET_TX_HAS_OFF";
    20, "PACKET_QDISC_BYPASS";
    23, "PACKET_IGNORE_OUTGOING";
    24, "PACKET_VNET_HDR_SZ";
};

struct Packet;

impl Descriptor for Packet {
    type Record = Socket;
    const KIND: &'static str = "packet";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Socket { domain: libc::AF_PACKET, kind: -1, protocol: -1 }]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        Ok(socket::describe::<Self>(handle))
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Socket>> {
        dump::dump(host, object)
    }

    fn create(&self, _: &Host<'_>, _: &ObjectInfo, record: &Socket) -> Result<Vec<OwnedFd>> {
        restore::create(record).map(|fd| vec![fd])
    }

    fn settle(&self, host: &Host<'_>, object: &ObjectInfo, record: &Socket) -> Result<()> {
        restore::settle(host, object, record)
    }
}

register!(descriptor: Packet);
export_plugin! { name: "packet", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::stasis::packet::v1::Membership;
    use stasis_plugin_api::testing::Kit;
    use std::os::fd::AsFd;

    #[test]
    fn bindings_memberships_and_options_come_back() {
        let fd = socket::socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0).unwrap();
        socket::set_int(fd.as_fd(), SOL_PACKET, 8, 1).unwrap();
        let multicast = Membership { interface: 1, kind: 0, address: vec![1, 0, 0x5e, 0, 0, 7], count: 1 };
        let promiscuous = Membership { interface: 1, kind: 1, address: vec![], count: 2 };
        for membership in [&multicast, &promiscuous, &promiscuous] {
            restore::join(fd.as_fd(), membership).unwrap();
        }
        socket::bind(fd.as_fd(), &restore::address(0x88cc, 1)).unwrap();
        let mut kit = Kit::new();
        kit.plugin(Packet);
        let number = kit.hold(fd, Packet::KIND).unwrap();
        assert_eq!(kit.dump().unwrap(), 1);
        let before = kit.record::<Packet>().unwrap();
        assert_eq!((before.protocol, before.interface, before.memberships.len()), (0x88cc, 1, 2));
        kit.restore().unwrap();
        assert_eq!(socket::get_int(kit.fd(number), SOL_PACKET, 8).unwrap(), 1);
        kit.dump().unwrap();
        assert_eq!(kit.record::<Packet>().unwrap(), before);
    }

    #[test]
    fn rings_and_fanout_are_refused() {
        let refuse = |prepare: &dyn Fn(BorrowedFd<'_>)| {
            let fd = socket::socket(libc::AF_PACKET, libc::SOCK_RAW, 0).unwrap();
            prepare(fd.as_fd());
            let mut kit = Kit::new();
            kit.plugin(Packet);
            kit.hold(fd, Packet::KIND).unwrap();
            kit.dump().unwrap_err().what
        };
        // struct tpacket_req: block size, blocks, frame size, frames.
        let ring: Vec<u8> = [4096u32, 2, 2048, 4].iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert!(refuse(&|fd| socket::set_option(fd, SOL_PACKET, 5, &ring).unwrap()).contains("ring"));
        let fanout = refuse(&|fd| {
            socket::bind(fd, &restore::address(0x88cc, 1)).unwrap();
            socket::set_int(fd, SOL_PACKET, 18, 4711).unwrap();
        });
        assert!(fanout.contains("fanout"));
    }
}
