//! UDP and UDP-lite sockets over IPv4 and IPv6: udp(7), udplite(7). Addresses, options, memberships, and datagrams that
//! wait to be read, with their senders.

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
use record::stasis::udp::v1::Socket;

struct Udp;

impl Descriptor for Udp {
    type Record = Socket;
    const KIND: &'static str = "udp";

    fn selectors(&self) -> Vec<Selector> {
        let mut selectors = Vec::new();
        for domain in [libc::AF_INET, libc::AF_INET6] {
            for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_UDPLITE] {
                selectors.push(Selector::Socket { domain, kind: libc::SOCK_DGRAM, protocol });
            }
        }
        selectors
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

    fn settle(&self, host: &Host<'_>, object: &ObjectInfo, record: &Socket) -> Result<()> {
        restore::settle(host, object, record)
    }
}

/// udp(7), linux/udp.h, udplite(7).
const UDP: &[options::Spec] = &[
    options::Spec { level: libc::IPPROTO_UDP, name: 1, label: "UDP_CORK", size: 4 },
    options::Spec { level: libc::IPPROTO_UDP, name: 100, label: "UDP_ENCAP", size: 4 },
    options::Spec { level: libc::IPPROTO_UDP, name: 101, label: "UDP_NO_CHECK6_TX", size: 4 },
    options::Spec { level: libc::IPPROTO_UDP, name: 102, label: "UDP_NO_CHECK6_RX", size: 4 },
    options::Spec { level: libc::IPPROTO_UDP, name: 103, label: "UDP_SEGMENT", size: 4 },
    options::Spec { level: libc::IPPROTO_UDP, name: 104, label: "UDP_GRO", size: 4 },
    options::Spec { level: libc::IPPROTO_UDPLITE, name: 10, label: "UDPLITE_SEND_CSCOV", size: 4 },
    options::Spec { level: libc::IPPROTO_UDPLITE, name: 11, label: "UDPLITE_RECV_CSCOV", size: 4 },
];

/// The tables of options for a domain.
fn tables(domain: i32) -> &'static [&'static [options::Spec]] {
    const V4: &[&[options::Spec]] = &[options::IPV4, options::SOCKET, UDP];
    const V6: &[&[options::Spec]] = &[options::IPV6, options::IPV4, options::SOCKET, UDP];
    if domain == libc::AF_INET6 { V6 } else { V4 }
}

register!(descriptor: Udp);
export_plugin! { name: "udp", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_plugin_api::testing::Kit;
    use std::{net::UdpSocket, os::fd::AsFd};

    /// A bound socket comes back at its port with its queue, a connected one with its peer.
    #[test]
    fn queues_and_connections_come_back() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(bound) = UdpSocket::bind(host) else { continue };
            let (address, sender) = (bound.local_addr().unwrap(), UdpSocket::bind(host).unwrap());
            sender.send_to(b"first", address).unwrap();
            sender.send_to(b"", address).unwrap();
            sender.send_to(&[3; 9000], address).unwrap();
            let connected = UdpSocket::bind(host).unwrap();
            connected.connect(sender.local_addr().unwrap()).unwrap();
            let mut kit = Kit::new();
            kit.plugin(Udp);
            let [bound, connected] = [bound, connected].map(|s| kit.hold(s, "udp").unwrap());
            assert_eq!(kit.dump().unwrap(), 2);
            kit.restore().unwrap();
            let of = |number| UdpSocket::from(kit.fd(number).try_clone_to_owned().unwrap());
            let (bound, connected) = (of(bound), of(connected));
            assert_eq!(bound.local_addr().unwrap(), address);
            assert_eq!(connected.peer_addr().unwrap(), sender.local_addr().unwrap());
            let mut buffer = vec![0; 10_000];
            for data in [&b"first"[..], b"", &[3; 9000]] {
                let (length, from) = bound.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..length], from), (data, sender.local_addr().unwrap()));
            }
            let shared = socket::get_int(bound.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap();
            assert_eq!(shared, 0);
        }
    }

    /// What cannot be seen is named.
    #[test]
    fn corked_data_and_errors_are_refused() {
        let corked = UdpSocket::bind("127.0.0.1:0").unwrap();
        corked.connect("127.0.0.1:9").unwrap();
        socket::set_int(corked.as_fd(), libc::IPPROTO_UDP, 1, 1).unwrap();
        corked.send(b"not yet").unwrap();
        let mut kit = Kit::new();
        kit.plugin(Udp);
        kit.hold(corked, "udp").unwrap();
        assert!(kit.dump().unwrap_err().what.contains("corked"));
        // There is one at a time.
        drop(kit);

        let broken = UdpSocket::bind("127.0.0.1:0").unwrap();
        broken.connect("127.0.0.1:9").unwrap();
        broken.send(b"to nobody").unwrap();
        let mut kit = Kit::new();
        kit.plugin(Udp);
        kit.hold(broken, "udp").unwrap();
        assert!(kit.dump().unwrap_err().what.contains("error waits"));
    }
}
