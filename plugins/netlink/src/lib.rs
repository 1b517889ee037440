//! Netlink sockets: netlink(7). Port id, groups, whom they talk to, options and filters; of protocols for which the kernel keeps
//! nothing more. Messages that wait to be read are refused: nobody but the kernel can send them again.

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
use record::stasis::netlink::v1::Socket;

/// linux/socket.h
const SOL_NETLINK: i32 = 270;

macro_rules! table {
    ($($name:literal, $label:literal;)*) => {
        &[$(Spec { level: SOL_NETLINK, name: $name, label: $label, size: 4 }),*]
    };
}

/// linux/netlink.h
const OPTIONS: &[Spec] = table! {
    3, "NETLINK_PKTINFO";
    4, "NETLINK_BROADCAST_ERROR";
    5, "NETLINK_NO_ENOBUFS";
    8, "NETLINK_LISTEN_ALL_NSID";
    10, "NETLINK_CAP_ACK";
    11, "NETLINK_EXT_ACK";
    12, "NETLINK_GET_STRICT_CHK";
};

/// A protocol, and why its sockets cannot be kept, if so.
struct Protocol {
    number: i32,
    name: &'static str,
    refused: Option<&'static str>,
}

const fn kept(number: i32, name: &'static str) -> Protocol {
    Protocol { number, name, refused: None }
}

const fn refused(number: i32, name: &'static str, why: &'static str) -> Protocol {
    Protocol { number, name, refused: Some(why) }
}

/// linux/netlink.h. What is not here is refused.
const PROTOCOLS: &[Protocol] = &[
    kept(0, "NETLINK_ROUTE"),
    kept(4, "NETLINK_SOCK_DIAG"),
    kept(6, "NETLINK_XFRM"),
    kept(15, "NETLINK_KOBJECT_UEVENT"),
    kept(16, "NETLINK_GENERIC"),
    refused(9, "NETLINK_AUDIT", "the kernel may send its audit records to this very socket"),
    refused(11, "NETLINK_CONNECTOR", "what it has subscribed to cannot be read from the kernel"),
    refused(12, "NETLINK_NETFILTER", "tables, queues and logs that belong to it go with it"),
    refused(10, "NETLINK_FIB_LOOKUP", "it is not known"),
    refused(20, "NETLINK_RDMA", "what belongs to it cannot be read from the kernel"),
    refused(21, "NETLINK_CRYPTO", "it is not known"),
];

struct Netlink;

impl Descriptor for Netlink {
    type Record = Socket;
    const KIND: &'static str = "netlink";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Socket { domain: libc::AF_NETLINK, kind: -1, protocol: -1 }]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        let mut described = socket::describe::<Self>(handle);
        dump::refuse_protocol(fd, &described.description)?;
        described.description = format!("socket:[{}] ({})", handle.ino, dump::name_of(fd)).into();
        Ok(described)
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

register!(descriptor: Netlink);
export_plugin! { name: "netlink", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_plugin_api::testing::Kit;
    use std::os::fd::AsFd;

    fn open(protocol: i32) -> OwnedFd {
        socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, protocol).unwrap()
    }

    #[test]
    fn port_groups_and_options_come_back() {
        let fd = open(0);
        socket::bind(fd.as_fd(), &restore::address(0, 0)).unwrap();
        for group in [1, 5, 33] {
            socket::set_int(fd.as_fd(), SOL_NETLINK, 1, group).unwrap();
        }
        socket::set_int(fd.as_fd(), SOL_NETLINK, 11, 1).unwrap();
        let before = socket::local_address(fd.as_fd()).unwrap();
        let mut kit = Kit::new();
        kit.plugin(Netlink);
        let number = kit.hold(fd, Netlink::KIND).unwrap();
        assert_eq!(kit.dump().unwrap(), 1);
        assert_eq!(kit.record::<Netlink>().unwrap().groups, [1, 5, 33]);
        kit.restore().unwrap();
        assert_eq!(socket::local_address(kit.fd(number)).unwrap(), before);
        assert_eq!(dump::groups(kit.fd(number)).unwrap(), [1, 5, 33]);
        assert_eq!(socket::get_int(kit.fd(number), SOL_NETLINK, 11).unwrap(), 1);
    }

    #[test]
    fn messages_and_foreign_protocols_are_refused() {
        let fd = open(0);
        // RTM_GETLINK of all links: the answer waits.
        let mut request = 32u32.to_ne_bytes().to_vec();
        request.extend(18u16.to_ne_bytes());
        request.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
        request.resize(32, 0);
        // SAFETY: the kernel reads the vector.
        let sent = unsafe {
            use std::os::fd::AsRawFd;
            libc::send(fd.as_raw_fd(), request.as_ptr().cast(), request.len(), 0)
        };
        assert_eq!(sent, 32);
        let mut kit = Kit::new();
        kit.plugin(Netlink);
        kit.hold(fd, Netlink::KIND).unwrap();
        assert!(kit.dump().unwrap_err().what.contains("wait to be read"));
        drop(kit);
        let mut kit = Kit::new();
        kit.plugin(Netlink);
        let error = kit.hold(open(12), Netlink::KIND).map(|_| ()).and_then(|()| kit.dump().map(drop));
        assert!(error.unwrap_err().what.contains("NETLINK_NETFILTER"));
    }

    #[test]
    fn groups_of_a_bitmap() {
        assert_eq!(dump::of_bitmap(&[0b1_0001, 0, 0, 0, 1, 0, 0, 0]), [1, 5, 33]);
        assert!(dump::of_bitmap(&[]).is_empty());
    }
}
