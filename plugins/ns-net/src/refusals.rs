//! State of a network namespace that nobody keeps yet: its presence is refused by name.

use crate::netlink::{Netlink, find, number, parse, text};
use stasis_plugin_api::{HookError, Result};
use std::{fs, io};

const NETLINK_XFRM: i32 = 6;
const NETLINK_NETFILTER: i32 = 12;

/// Something that may be there.
struct Refused {
    /// What users call it.
    name: &'static str,
    /// Its traces in the namespace of this thread, for the message.
    found: fn() -> io::Result<Vec<String>>,
    remedy: &'static str,
}

const REFUSED: [Refused; 8] = [
    Refused { name: "IPsec associations", found: || xfrm(0x12), remedy: "remove them (ip xfrm state flush)" },
    Refused { name: "IPsec policies", found: || xfrm(0x15), remedy: "remove them (ip xfrm policy flush)" },
    Refused {
        name: "queueing disciplines for packets that come in",
        found: ingress,
        remedy: "remove them (tc qdisc del dev DEVICE ingress)",
    },
    Refused {
        name: "entries made by hand in a bridge's table of addresses",
        found: bridge_entries,
        remedy: "remove them (bridge fdb del)",
    },
    Refused {
        name: "interfaces of a multicast router",
        found: multicast_routing,
        remedy: "stop the multicast router",
    },
    Refused {
        name: "iptables (legacy) tables",
        found: xtables,
        remedy: "use iptables-nft instead, or remove the tables with their namespace",
    },
    Refused {
        name: "expected connections (of helpers, for FTP and the like)",
        found: crate::netfilter::expectations,
        remedy: "let the connections be made, or forget them (conntrack -F expect)",
    },
    Refused { name: "sets of ipset", found: ipset, remedy: "destroy them (ipset destroy)" },
];

/// Refuses what is there, in the namespace of this thread.
pub(crate) fn check(ino: u64) -> Result<()> {
    for refused in &REFUSED {
        let found = (refused.found)();
        let found =
            found.map_err(|error| HookError::failed(format!("looking for {}", refused.name), error))?;
        if !found.is_empty() {
            let why = format!("it has {}: {}", refused.name, found.join(", "));
            return Err(HookError::unsupported(format!("net:[{ino}]"), why, refused.remedy));
        }
    }
    Ok(())
}

/// A list of a part of the kernel that may not be there.
fn list(protocol: i32, kind: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    const ABSENT: [i32; 4] = [libc::EPROTONOSUPPORT, libc::EINVAL, libc::EOPNOTSUPP, libc::ENOENT];
    let listed = Netlink::open(protocol).map_err(Into::into).and_then(|mut netlink| netlink.list(kind, body));
    match listed {
        Err(refusal) if ABSENT.contains(&refusal.errno()) => Ok(Vec::new()),
        other => other.map_err(|refusal| refusal.error),
    }
}

fn xfrm(kind: u16) -> io::Result<Vec<String>> {
    let listed = list(NETLINK_XFRM, kind, &[])?;
    Ok(if listed.is_empty() { Vec::new() } else { vec![listed.len().to_string()] })
}

/// `struct tcmsg`: family, index, handle, parent, info.
fn ingress() -> io::Result<Vec<String>> {
    const TC_H_INGRESS: u32 = 0xffff_fff1;
    const GET_QDISC: u16 = 38;
    let listed = list(libc::NETLINK_ROUTE, GET_QDISC, &[0; 20])?;
    let of_input = listed.iter().filter(|one| one.get(12..16).map(number) == Some(TC_H_INGRESS));
    let shown = |one: &Vec<u8>| {
        let kind = one.get(20..).map(parse).and_then(|attributes| find(&attributes, 1).map(text));
        format!("{} of device {}", kind.unwrap_or_default(), one.get(4..8).map_or(0, number))
    };
    Ok(of_input.map(shown).collect())
}

/// `struct ndmsg` of family AF_BRIDGE: index at 4, state at 8. Those of the ports' own addresses are permanent, learned ones age.
fn bridge_entries() -> io::Result<Vec<String>> {
    const GET_NEIGHBOUR: u16 = 30;
    const ADDRESS: u16 = 2;
    const STATIC: u16 = 0x40;
    let mut header = [0; 12];
    header[0] = libc::AF_BRIDGE as u8;
    let listed = list(libc::NETLINK_ROUTE, GET_NEIGHBOUR, &header)?;
    let by_hand = listed.iter().filter(|one| {
        one.first() == Some(&(libc::AF_BRIDGE as u8)) && one.get(8..10).map(number) == Some(STATIC.into())
    });
    let shown = |one: &Vec<u8>| {
        let address =
            one.get(12..).map(parse).and_then(|attributes| find(&attributes, ADDRESS).map(<[u8]>::to_vec));
        let address =
            address.unwrap_or_default().iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>();
        format!("{} at device {}", address.join(":"), one.get(4..8).map_or(0, number))
    };
    Ok(by_hand.map(shown).collect())
}

/// A table in /proc with one line of headings.
fn multicast_routing() -> io::Result<Vec<String>> {
    let vifs = ["ip_mr_vif", "ip6_mr_vif"].map(|name| proc(name).map(|text| text.lines().count() > 1));
    let [v4, v6] = vifs;
    let names = [(v4?, "IPv4"), (v6?, "IPv6")];
    Ok(names.into_iter().filter(|(there, _)| *there).map(|(_, name)| name.to_owned()).collect())
}

fn xtables() -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for file in ["ip_tables_names", "ip6_tables_names", "arp_tables_names"] {
        let names = proc(file)?;
        found
            .extend(names.lines().map(|name| format!("{name} ({})", file.trim_end_matches("_tables_names"))));
    }
    Ok(found)
}

/// What this kernel has no file for is not there.
fn proc(name: &str) -> io::Result<String> {
    match fs::read_to_string(format!("/proc/thread-self/net/{name}")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        other => other,
    }
}

/// IPSET_CMD_LIST: names and the like, without their elements.
fn ipset() -> io::Result<Vec<String>> {
    const LIST: u16 = 6 << 8 | 7;
    const PROTOCOL: u16 = 1;
    const NAME: u16 = 2;
    const FLAGS: u16 = 8;
    use crate::netlink::{attribute, emit};
    // IPSET_FLAG_LIST_SETNAME, in network order.
    let flags = attribute(FLAGS | 0x4000, (1_u32 << 1).to_be_bytes());
    let body = [vec![libc::AF_INET as u8, 0, 0, 0], emit(&[attribute(PROTOCOL, [7]), flags])].concat();
    let listed = list(NETLINK_NETFILTER, LIST, &body)?;
    let name =
        |one: &Vec<u8>| one.get(4..).map(parse).and_then(|attributes| find(&attributes, NAME).map(text));
    Ok(listed.iter().filter_map(name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_namespace_has_nothing_to_refuse() {
        let fresh = || {
            // SAFETY: changes this thread alone.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0 {
                check(7).unwrap();
            }
        };
        std::thread::spawn(fresh).join().unwrap();
    }
}
