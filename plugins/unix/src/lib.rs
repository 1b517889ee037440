//! Unix sockets: unix(7). Connected pairs with what is queued in them, ends whose peer is gone, unconnected and
//! listening sockets. Connections made through a listener, and peers outside the tree, are refused by name.

mod diag;
mod dump;
mod options;
mod queue;
mod restore;
mod sys;

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, Host, ObjectInfo, Result, Selector, export_plugin, register,
};
use std::os::fd::{BorrowedFd, OwnedFd};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::unix::v1::Sockets;

struct Unix;

impl Descriptor for Unix {
    type Record = Sockets;
    const KIND: &'static str = "unix";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Socket { domain: libc::AF_UNIX, kind: -1, protocol: -1 }]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        dump::describe(handle, fd)
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Sockets>> {
        dump::dump(host, object)
    }

    fn create(&self, host: &Host<'_>, object: &ObjectInfo, record: &Sockets) -> Result<Vec<OwnedFd>> {
        restore::create(host, object, record)
    }

    fn link(&self, host: &Host<'_>, object: &ObjectInfo, record: &Sockets) -> Result<()> {
        restore::link(host, object, record)
    }
}

register!(descriptor: Unix);
export_plugin! { name: "unix", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use stasis_plugin_api::testing::Kit;
    use std::os::fd::AsFd;

    /// A pair comes back with its queues, options and SO_PEERCRED; an end without peer still reads its data, then EOF.
    #[test]
    fn pairs_and_orphans_come_back() {
        for kind in [SockType::Stream, SockType::SeqPacket] {
            let pair = || socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
            let (a, b) = pair();
            sys::send(a.as_fd(), b"to b", &[], None).unwrap();
            sys::send(b.as_fd(), b"to a", &[], None).unwrap();
            let (orphan, peer) = pair();
            sys::send(peer.as_fd(), b"last", &[], None).unwrap();
            drop(peer);
            let mut kit = Kit::new();
            kit.plugin(Unix);
            let fds = [b, a, orphan].map(|fd| kit.hold(fd, "unix").unwrap());
            assert_eq!(kit.dump().unwrap(), 2);
            kit.restore().unwrap();
            let mut buffer = [0; 64];
            for (fd, text) in fds.into_iter().zip([b"to b", b"to a", b"last"]) {
                let length = nix::unistd::read(kit.fd(fd), &mut buffer).unwrap();
                assert_eq!(&buffer[..length], text);
                let peer = sys::get_option(kit.fd(fd), libc::SO_PEERCRED, 12).unwrap();
                assert_eq!(peer[..4], std::process::id().to_ne_bytes());
            }
            assert_eq!(nix::unistd::read(kit.fd(fds[2]), &mut buffer).unwrap(), 0);
        }
    }

    #[test]
    fn a_peer_outside_the_tree_is_named() {
        let (a, _outside) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut kit = Kit::new();
        kit.plugin(Unix);
        kit.hold(a, "unix").unwrap();
        assert!(kit.dump().unwrap_err().what.contains("is outside the tree"));
    }
}
