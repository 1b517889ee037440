//! Raw sockets and those for echo requests: raw(7), icmp(7). Addresses, peers, options, filters and memberships. Packets that wait to
//! be read are refused: there is no way to look at more than the first.

mod dump;
mod restore;

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, Host, ObjectInfo, Result, Selector, export_plugin, register,
    socket::{self, options},
};
use std::os::fd::{BorrowedFd, OwnedFd};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::rawicmp::v1::Socket;

macro_rules! table {
    ($($level:expr, $name:expr, $label:literal, $size:literal;)*) => {
        &[$(options::Spec { level: $level, name: $name, label: $label, size: $size }),*]
    };
}

/// linux/icmp.h, linux/icmpv6.h, linux/in.h, linux/in6.h; SOL_RAW is 255.
const RAW: &[options::Spec] = table! {
    255, 1, "ICMP_FILTER", 4;
    libc::IPPROTO_IP, libc::IP_HDRINCL, "IP_HDRINCL", 4;
    libc::IPPROTO_IP, 22, "IP_NODEFRAG", 4;
    libc::IPPROTO_ICMPV6, 1, "ICMPV6_FILTER", 32;
    libc::IPPROTO_IPV6, 7, "IPV6_CHECKSUM", 4;
    libc::IPPROTO_IPV6, 36, "IPV6_HDRINCL", 4;
};

/// The tables of options for a domain.
fn tables(domain: i32) -> &'static [&'static [options::Spec]] {
    const V4: &[&[options::Spec]] = &[options::IPV4, options::SOCKET, RAW, options::REUSE];
    const V6: &[&[options::Spec]] = &[options::IPV6, options::IPV4, options::SOCKET, RAW, options::REUSE];
    if domain == libc::AF_INET6 { V6 } else { V4 }
}

/// The two kinds differ in what they claim alone.
macro_rules! kind {
    ($type:ident, $name:literal, $selectors:expr) => {
        struct $type;

        impl Descriptor for $type {
            type Record = Socket;
            const KIND: &'static str = $name;

            fn selectors(&self) -> Vec<Selector> {
                $selectors.map(|(domain, kind, protocol)| Selector::Socket { domain, kind, protocol }).to_vec()
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

            fn link(&self, host: &Host<'_>, object: &ObjectInfo, record: &Socket) -> Result<()> {
                restore::link(host, object, record)
            }
        }

        register!(descriptor: $type);
    };
}

kind!(Raw, "raw", [(libc::AF_INET, libc::SOCK_RAW, -1), (libc::AF_INET6, libc::SOCK_RAW, -1)]);
kind!(
    Icmp,
    "icmp",
    [
        (libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP),
        (libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_ICMPV6),
    ]
);
export_plugin! { name: "raw-icmp", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_plugin_api::testing::Kit;
    use std::os::fd::AsFd;

    #[test]
    fn addresses_peers_and_filters_come_back() {
        let mut address = (libc::AF_INET as u16).to_ne_bytes().to_vec();
        address.extend([0, 0, 127, 0, 0, 1]);
        address.resize(16, 0);
        let fd = socket::socket(libc::AF_INET, libc::SOCK_RAW, 253).unwrap();
        socket::bind(fd.as_fd(), &address).unwrap();
        socket::connect(fd.as_fd(), &address).unwrap();
        let icmp = socket::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP).unwrap();
        socket::set_option(icmp.as_fd(), 255, 1, &[0xfe, 0xff, 0xff, 0xff]).unwrap();
        let mut kit = Kit::new();
        kit.plugin(Raw);
        let [fd, icmp] = [fd, icmp].map(|fd| kit.hold(fd, Raw::KIND).unwrap());
        assert_eq!(kit.dump().unwrap(), 2);
        kit.restore().unwrap();
        assert_eq!(socket::get_int(kit.fd(fd), libc::SOL_SOCKET, libc::SO_PROTOCOL).unwrap(), 253);
        let local = socket::local_address(kit.fd(fd)).unwrap();
        assert_eq!(socket::host(&local), Some([127, 0, 0, 1].into()));
        assert_eq!(socket::get_int(kit.fd(icmp), 255, 1).unwrap(), -2);
    }

    #[test]
    fn a_peer_without_a_port_is_seen() {
        let entry =
            "   1: 0100007F:00FD 0200007F:0000 01 00000000:00000000 00:00000000 00000000  0  0 4711 2 0 0";
        let found = socket::table_entry(entry, 4711).unwrap();
        assert_eq!(socket::host(&found.remote), Some([127, 0, 0, 2].into()));
        assert_eq!(found.state, 1);
        assert!(socket::table_entry(entry, 1).is_none());
    }
}
