//! What rtnetlink(7) lists, makes and removes by messages of one shape: addresses, routes, rules and their kin. A list in the
//! image and a list in a namespace are compared message by message, and the difference is made up.

use crate::{
    netlink::{self, Answer, Netlink, Refusal, find, find_number, kind, word},
    record::stasis::ns_net::v1::{Attribute, Entry, Table as Saved},
};
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use stasis_plugin_api::{HookError, Result};
use std::{
    thread,
    time::{Duration, Instant},
};

const INET: u8 = libc::AF_INET as u8;
const INET6: u8 = libc::AF_INET6 as u8;
/// `RTNL_FAMILY_IPMR`, `RTNL_FAMILY_IP6MR`: rules of multicast routers.
const MULTICAST_ROUTERS: [u8; 2] = [128, 129];
/// How long the kernel may take to make what it makes by itself, such as the route to a new address.
const GRACE: Duration = Duration::from_millis(300);

/// How one list is read and changed.
pub(crate) struct Table {
    /// In the image, and for messages.
    pub name: &'static str,
    get: u16,
    new: u16,
    remove: u16,
    /// Bytes before the attributes.
    header: usize,
    /// Requests: family, and where in the header flags are.
    asked: &'static [Asked],
    /// Flags of requests that make one.
    flags: u16,
    /// Brings an entry into the form in which it is compared and sent; `None` if it is no state.
    tidy: fn(Entry) -> Result<Option<Entry>>,
    /// Where in the header the index of its device is, if there.
    device: Option<usize>,
}

/// The header of a request for a list: a family, and one more byte at a place.
struct Asked(u8, usize, u8);

/// In the order in which they are made.
pub(crate) const TABLES: [Table; 7] = [
    Table {
        name: "address labels",
        get: 74,
        new: 72,
        remove: 73,
        header: 12,
        asked: &[Asked(INET6, 0, INET6)],
        flags: NLM_F_CREATE | NLM_F_EXCL,
        tidy: tidy_label,
        device: None,
    },
    Table {
        name: "addresses",
        get: 22,
        new: 20,
        remove: 21,
        header: 8,
        asked: &[Asked(INET, 0, INET), Asked(INET6, 0, INET6)],
        flags: NLM_F_CREATE | NLM_F_EXCL,
        tidy: tidy_address,
        device: Some(4),
    },
    Table {
        name: "nexthops",
        get: 106,
        new: 104,
        remove: 105,
        header: 8,
        asked: &[Asked(0, 0, 0)],
        flags: NLM_F_CREATE | NLM_F_EXCL,
        tidy: tidy_nexthop,
        device: None,
    },
    Table {
        name: "routes",
        get: 26,
        new: 24,
        remove: 25,
        header: 12,
        asked: &[Asked(INET, 0, INET), Asked(INET6, 0, INET6)],
        flags: NLM_F_CREATE | NLM_F_APPEND,
        tidy: tidy_route,
        device: None,
    },
    Table {
        name: "rules",
        get: 34,
        new: 32,
        remove: 33,
        header: 12,
        asked: &[
            Asked(INET, 0, INET),
            Asked(INET6, 0, INET6),
            Asked(MULTICAST_ROUTERS[0], 0, MULTICAST_ROUTERS[0]),
            Asked(MULTICAST_ROUTERS[1], 0, MULTICAST_ROUTERS[1]),
        ],
        flags: NLM_F_CREATE | NLM_F_EXCL,
        tidy: tidy_rule,
        device: None,
    },
    Table {
        name: "neighbours",
        get: 30,
        new: 28,
        remove: 29,
        header: 12,
        asked: &[Asked(INET, 0, INET), Asked(INET6, 0, INET6)],
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        tidy: tidy_neighbour,
        device: Some(4),
    },
    Table {
        name: "proxied neighbours",
        get: 30,
        new: 28,
        remove: 29,
        header: 12,
        // NTF_PROXY
        asked: &[Asked(INET, 10, 8), Asked(INET6, 10, 8)],
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        tidy: tidy_proxy,
        device: Some(4),
    },
];

/// The table of a name.
pub(crate) fn named(name: &str) -> Option<&'static Table> {
    TABLES.iter().find(|table| table.name == name)
}

impl Table {
    /// What is in the namespace of `netlink`.
    pub fn read(&self, netlink: &mut Netlink) -> Result<Vec<Entry>> {
        let failed = |refusal: Refusal| refusal.into_hook(format!("listing {}", self.name));
        let mut entries = Vec::new();
        for Asked(family, place, value) in self.asked {
            let mut header = vec![0; self.header];
            header[0] = *family;
            header[*place] = *value;
            let listed = match netlink.list(self.get, &header) {
                // Not every kernel has all of them.
                Err(refusal) if matches!(refusal.errno(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP) => continue,
                other => other.map_err(failed)?,
            };
            for message in listed {
                let Some((header, attributes)) = message.split_at_checked(self.header) else { continue };
                // Some lists do not look at the family that they are asked for.
                if *family != 0 && header[0] != *family {
                    continue;
                }
                let entry = Entry { header: header.to_vec(), attributes: netlink::parse(attributes) };
                entries.extend((self.tidy)(entry)?);
            }
        }
        Ok(entries)
    }

    /// As [`Table::read`], for the image: in the order in which they are to be made.
    pub fn save(&self, netlink: &mut Netlink) -> Result<Saved> {
        let mut entries = self.read(netlink)?;
        if self.device.is_some() && self.name == "addresses" {
            // The kernel puts a new one of IPv6 before the others.
            let first = entries.iter().position(|entry| entry.header[0] == INET6).unwrap_or(entries.len());
            entries[first..].reverse();
        }
        Ok(Saved { name: self.name.into(), entries })
    }

    /// The entries of a device.
    pub fn of_device(&self, entries: Vec<Entry>, index: u32) -> Vec<Entry> {
        let of = |entry: &Entry| self.device.and_then(|at| entry.header.get(at..at + 4)).map(netlink::number);
        entries.into_iter().filter(|entry| of(entry) == Some(index)).collect()
    }

    /// The same entry of another device.
    pub fn moved(&self, mut entry: Entry, index: u32) -> Entry {
        if let Some(place) = self.device.and_then(|at| entry.header.get_mut(at..at + 4)) {
            place.copy_from_slice(&index.to_ne_bytes());
        }
        entry
    }

    /// Whether it is what a device knows of others.
    pub fn is_of_neighbours(&self) -> bool {
        self.get == 30
    }

    /// Makes one.
    pub fn make(&self, netlink: &mut Netlink, entry: &Entry) -> Answer<()> {
        netlink.request(self.new, self.flags, &body(entry))
    }

    /// Makes the namespace's list what the image says.
    pub fn bring_about(&self, netlink: &mut Netlink, wanted: &[Entry]) -> Result<()> {
        if let Some(entry) = wanted.iter().find(|entry| entry.header.len() != self.header) {
            return Err(HookError::invalid(format!(
                "one of the {} has a header of {}",
                self.name,
                entry.header.len()
            )));
        }
        let began = Instant::now();
        let missing = loop {
            let present = self.read(netlink)?;
            for entry in present.iter().filter(|entry| !wanted.contains(entry)) {
                match netlink.request(self.remove, 0, &body(entry)) {
                    // It went with another one.
                    Err(refusal)
                        if !matches!(refusal.errno(), libc::ESRCH | libc::ENOENT | libc::EADDRNOTAVAIL) =>
                    {
                        return Err(refusal.into_hook(format!("removing one of the {}", self.name)));
                    }
                    _ => {}
                }
            }
            let missing: Vec<&Entry> = wanted.iter().filter(|entry| !present.contains(entry)).collect();
            if !missing.iter().any(|entry| self.is_automatic(entry)) || began.elapsed() > GRACE {
                break missing;
            }
            thread::sleep(Duration::from_millis(1));
        };
        self.make_all(netlink, missing)
    }

    /// Whether the kernel makes it by itself, `RTPROT_KERNEL`, soon after an address.
    fn is_automatic(&self, entry: &Entry) -> bool {
        self.name == "routes" && entry.header.get(5) == Some(&2)
    }

    /// In rounds, since some need others.
    fn make_all(&self, netlink: &mut Netlink, mut missing: Vec<&Entry>) -> Result<()> {
        while !missing.is_empty() {
            let before = missing.len();
            let mut refused = None;
            missing.retain(|entry| match self.make(netlink, entry) {
                Ok(()) => false,
                // The kernel was faster.
                Err(refusal) if refusal.errno() == libc::EEXIST => false,
                Err(refusal) => {
                    refused.get_or_insert((refusal, *entry));
                    true
                }
            });
            if let Some((refusal, entry)) = refused.filter(|_| missing.len() == before) {
                return Err(refusal.into_hook(format!("making one of the {}: {}", self.name, shown(entry))));
            }
        }
        Ok(())
    }
}

fn body(entry: &Entry) -> Vec<u8> {
    [entry.header.clone(), netlink::emit(&entry.attributes)].concat()
}

/// For messages: the header, and attributes by their numbers, in hexadecimal.
fn shown(entry: &Entry) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let attributes = entry.attributes.iter().map(|one| format!(" {}:{}", kind(one), hex(&one.value)));
    format!("{}{}", hex(&entry.header), attributes.collect::<String>())
}

fn without(entry: &mut Entry, kinds: &[u16]) {
    entry.attributes.retain(|attribute| !kinds.contains(&kind(attribute)));
}

/// A word of the header, changed.
fn mask(entry: &mut Entry, at: usize, keep: u32) {
    if let Some(place) = entry.header.get_mut(at..at + 4) {
        let masked = netlink::number(place) & keep;
        place.copy_from_slice(&masked.to_ne_bytes());
    }
}

/// `struct ifaddrlblmsg`: family, prefix, flags, index, number of the change.
fn tidy_label(mut entry: Entry) -> Result<Option<Entry>> {
    mask(&mut entry, 8, 0);
    Ok(Some(entry))
}

/// `struct ifaddrmsg`: family, prefix, flags, scope, index.
fn tidy_address(mut entry: Entry) -> Result<Option<Entry>> {
    const FLAGS: u16 = 8;
    const CACHE_INFO: u16 = 6;
    // Those that say what became of it, not what it was made with: IFA_F_SECONDARY, DADFAILED, DEPRECATED, TENTATIVE,
    // PERMANENT, STABLE_PRIVACY.
    const TOLD: u32 = 0x01 | 0x08 | 0x20 | 0x40 | 0x80 | 0x800;
    const TEMPORARY: u32 = 0x01;
    let flags = find_number(&entry.attributes, FLAGS) | u32::from(entry.header[2]);
    if entry.header[0] == INET6 && flags & TEMPORARY != 0 {
        return Err(HookError::unsupported(
            format!("an address of device {}", netlink::number(&entry.header[4..8])),
            "it is a temporary one (RFC 8981), which nobody but the kernel can make",
            "set net.ipv6.conf.DEVICE.use_tempaddr to 0, and remove it",
        ));
    }
    entry.header[2] = 0;
    without(&mut entry, &[FLAGS]);
    entry.attributes.push(word(FLAGS, flags & !TOLD));
    if let Some(info) = entry.attributes.iter_mut().find(|attribute| kind(attribute) == CACHE_INFO)
        && let Some(times) = info.value.get_mut(8..)
    {
        times.fill(0);
    }
    Ok(Some(entry))
}

/// `struct nhmsg`: family, scope, protocol, reserved, flags.
fn tidy_nexthop(mut entry: Entry) -> Result<Option<Entry>> {
    const ONLINK: u32 = 4;
    mask(&mut entry, 4, ONLINK);
    // The kernel finds the scope itself.
    entry.header[1] = 0;
    // NHA_OP_FLAGS and statistics.
    without(&mut entry, &[14, 15, 16, 17]);
    Ok(Some(entry))
}

/// `struct rtmsg`: family, lengths of destination and source, tos, table, protocol, scope, type, flags.
fn tidy_route(mut entry: Entry) -> Result<Option<Entry>> {
    const CLONED: u32 = 0x200;
    const CACHE_INFO: u16 = 12;
    const EXPIRES: u16 = 23;
    const NEXTHOP: u16 = 30;
    /// What follows from a nexthop: OIF, GATEWAY, MULTIPATH, VIA, ENCAP_TYPE, ENCAP.
    const BY_NEXTHOP: [u16; 6] = [4, 5, 9, 18, 21, 22];
    if netlink::number(&entry.header[8..12]) & CLONED != 0 {
        return Ok(None);
    }
    // RTNH_F_PERVASIVE and RTNH_F_ONLINK; others say how it is.
    mask(&mut entry, 8, 2 | 4);
    // rta_expires, in hundredths of a second.
    let expires =
        find(&entry.attributes, CACHE_INFO).and_then(|info| info.get(8..12)).map_or(0, netlink::number);
    without(&mut entry, &[CACHE_INFO]);
    if expires.cast_signed() > 0 {
        entry.attributes.push(word(EXPIRES, expires.div_ceil(100)));
    }
    if find(&entry.attributes, NEXTHOP).is_some() {
        without(&mut entry, &BY_NEXTHOP);
    }
    for attribute in &mut entry.attributes {
        if kind(attribute) == 9 {
            tidy_hops(&mut attribute.value);
        }
    }
    Ok(Some(entry))
}

/// `struct rtnexthop`, each followed by its attributes: length, flags, weight, index.
fn tidy_hops(hops: &mut [u8]) {
    let mut at = 0;
    while let Some(hop) = hops.get_mut(at..at + 8) {
        hop[2] &= 2 | 4;
        let length = usize::from(u16::from_ne_bytes([hop[0], hop[1]]));
        at += length.max(8).next_multiple_of(4);
    }
}

/// `struct fib_rule_hdr`: family, lengths, tos, table, reserved, action, flags.
fn tidy_rule(mut entry: Entry) -> Result<Option<Entry>> {
    // FIB_RULE_INVERT; others say how it is.
    mask(&mut entry, 8, 2);
    Ok(Some(entry))
}

/// `struct ndmsg`: family, index at 4, state at 8, flags, type.
fn tidy_neighbour(mut entry: Entry) -> Result<Option<Entry>> {
    const PERMANENT: u16 = 0x80;
    const STALE: u16 = 0x04;
    /// REACHABLE, STALE, DELAY, PROBE.
    const KNOWN: u16 = 0x02 | 0x04 | 0x08 | 0x10;
    let state = u16::from_ne_bytes([entry.header[8], entry.header[9]]);
    let kept = match state {
        _ if state & PERMANENT != 0 => PERMANENT,
        _ if state & KNOWN != 0 => STALE,
        // Nobody has answered yet; or the kernel's own, of a device without addresses.
        _ => return Ok(None),
    };
    entry.header[8..10].copy_from_slice(&kept.to_ne_bytes());
    tidy_proxy(entry)
}

fn tidy_proxy(mut entry: Entry) -> Result<Option<Entry>> {
    // Type, NDA_CACHEINFO, NDA_PROBES.
    entry.header[11] = 0;
    without(&mut entry, &[3, 4]);
    Ok(Some(entry))
}

/// Waits until the kernel uses every address of IPv6 that it has been given.
pub(crate) fn settle_addresses(netlink: &mut Netlink, devices_up: &[u32]) -> Result<()> {
    const TENTATIVE: u8 = 0x40;
    const PATIENCE: Duration = Duration::from_secs(5);
    let began = Instant::now();
    loop {
        let listed = netlink.list(22, &[INET6, 0, 0, 0, 0, 0, 0, 0]);
        let listed = listed.map_err(|refusal| refusal.into_hook("listing addresses"))?;
        let waits = listed.iter().any(|message| {
            let up = message.get(4..8).is_some_and(|index| devices_up.contains(&netlink::number(index)));
            up && message.first() == Some(&INET6) && message[2] & TENTATIVE != 0
        });
        match waits {
            false => return Ok(()),
            true if began.elapsed() > PATIENCE => {
                return Err(HookError::invalid("the kernel does not take an IPv6 address into use"));
            }
            true => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Attributes that are in `wanted` and not in `present`.
pub(crate) fn difference(wanted: &[Attribute], present: &[Attribute]) -> Vec<Attribute> {
    wanted.iter().filter(|one| !present.contains(one)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attribute;

    #[test]
    fn routes_lose_what_only_tells_of_their_state() {
        let mut header = vec![2, 0, 0, 0, 254, 3, 0, 1];
        header.extend(0x15_u32.to_ne_bytes());
        let info = [0, 0, 150, 0, 0, 0, 0, 0].map(u32::to_ne_bytes).concat();
        let hop = [12, 0, 0x15, 0, 2, 0, 0, 0, 4, 0, 1, 0];
        let entry = Entry { header, attributes: vec![attribute(12, info), attribute(9, hop)] };
        let tidied = tidy_route(entry).unwrap().unwrap();
        assert_eq!(tidied.header[8], 4);
        assert_eq!(tidied.attributes[0].value[2], 4);
        assert_eq!(find_number(&tidied.attributes, 23), 2);
        tidy_hops(&mut [1, 0, 255]);
        tidy_hops(&mut [0; 20]);
    }

    #[test]
    fn temporary_addresses_are_refused_by_name() {
        let entry =
            |family, flags| Entry { header: vec![family, 64, flags, 0, 3, 0, 0, 0], attributes: vec![] };
        assert!(tidy_address(entry(INET6, 1)).unwrap_err().to_string().contains("device 3"));
        assert!(tidy_address(entry(INET, 1)).unwrap().is_some());
    }
}
