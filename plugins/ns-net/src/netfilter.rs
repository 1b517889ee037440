//! Rules of nf_tables (those of iptables-nft among them) and what connection tracking knows: linux/netfilter/nf_tables.h,
//! nfnetlink_conntrack.h. Messages are kept as the kernel lists them and sent back as they were, but for what it numbers itself.

use crate::{
    netlink::{self, Answer, Netlink, Refusal, attribute, emit, find, kind, parse, text},
    record::stasis::ns_net::v1::{Attribute, Entry, Table as Saved},
};
use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST};
use stasis_plugin_api::{HookError, Result};

const NETLINK_NETFILTER: i32 = 12;
const NF_TABLES: u16 = 10 << 8;
const CONNECTIONS: u16 = 1 << 8;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
/// Bytes of `nfgenmsg`: family, version, number of the generation.
const HEADER: usize = 4;
/// Locks of ours have names that begin so.
const OURS: &str = "stasis-";

/// A kind of object.
struct Kind {
    /// In the image, and for messages.
    name: &'static str,
    get: u16,
    new: u16,
    /// Attributes that the kernel chooses or counts: handles, uses, positions.
    chosen: &'static [u16],
    flags: u16,
}

const ELEMENTS: &str = "elements";
const SETS: &str = "sets";

/// In the order in which they are made. The first attribute of each is its table.
const KINDS: [Kind; 7] = [
    Kind { name: "tables", get: 1, new: 0, chosen: &[3, 4, 5], flags: NLM_F_CREATE | NLM_F_EXCL },
    Kind { name: "chains", get: 4, new: 3, chosen: &[2, 6, 9, 11], flags: NLM_F_CREATE | NLM_F_EXCL },
    Kind { name: SETS, get: 10, new: 9, chosen: &[14, 16, 19, 20], flags: NLM_F_CREATE | NLM_F_EXCL },
    Kind { name: "objects", get: 19, new: 18, chosen: &[5, 6, 7], flags: NLM_F_CREATE | NLM_F_EXCL },
    Kind { name: "flowtables", get: 23, new: 22, chosen: &[4, 5, 6], flags: NLM_F_CREATE | NLM_F_EXCL },
    Kind { name: ELEMENTS, get: 13, new: 12, chosen: &[], flags: NLM_F_CREATE },
    Kind { name: "rules", get: 7, new: 6, chosen: &[3, 6, 8], flags: NLM_F_CREATE | NLM_F_APPEND },
];

fn failed(what: &'static str) -> impl Fn(Refusal) -> HookError {
    move |refusal| refusal.into_hook(what)
}

/// An entry without what the kernel chooses.
fn tidy(message: &[u8], chosen: &[u16]) -> Option<Entry> {
    let (header, attributes) = message.split_at_checked(HEADER)?;
    let mut entry = Entry { header: vec![header[0], 0, 0, 0], attributes: parse(attributes) };
    entry.attributes.retain(|one| !chosen.contains(&kind(one)));
    let table = find(&entry.attributes, 1).map(text).unwrap_or_default();
    (!table.starts_with(OURS)).then_some(entry)
}

/// Lists of a part of the kernel that may not be there.
fn listed(netlink: &mut Netlink, kind: u16, body: &[u8]) -> Answer<Vec<Vec<u8>>> {
    match netlink.list(kind, body) {
        Err(refusal) if matches!(refusal.errno(), libc::EINVAL | libc::EOPNOTSUPP | libc::ENOENT) => {
            Ok(Vec::new())
        }
        other => other,
    }
}

/// All rules of the namespace that this thread is in.
pub(crate) fn read_rules() -> Result<Vec<Saved>> {
    let mut netlink = match Netlink::open(NETLINK_NETFILTER) {
        // A kernel without netfilter.
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Vec::new()),
        other => other.map_err(|error| HookError::failed("opening nf_tables", error))?,
    };
    let mut saved: Vec<Saved> = Vec::new();
    for one in &KINDS {
        let mut entries = Vec::new();
        for body in questions(one, &saved) {
            let messages =
                listed(&mut netlink, NF_TABLES | one.get, &body).map_err(failed("listing nf_tables"))?;
            entries.extend(messages.iter().filter_map(|message| tidy(message, one.chosen)));
        }
        entries.iter().try_for_each(|entry| refuse(one, entry))?;
        saved.push(Saved { name: one.name.into(), entries });
    }
    saved.retain(|table| !table.entries.is_empty());
    Ok(saved)
}

/// Elements are asked for set by set.
fn questions(kind: &Kind, saved: &[Saved]) -> Vec<Vec<u8>> {
    if kind.name != ELEMENTS {
        return vec![vec![0; HEADER]];
    }
    let sets = saved.iter().filter(|table| table.name == SETS).flat_map(|table| &table.entries);
    let named = |set: &Entry| {
        let names: Vec<Attribute> =
            set.attributes.iter().filter(|one| matches!(crate::netlink::kind(one), 1 | 2)).cloned().collect();
        [set.header.clone(), emit(&names)].concat()
    };
    sets.map(named).collect()
}

/// Refuses what cannot be said in a message.
fn refuse(one: &Kind, entry: &Entry) -> Result<()> {
    let flags = |at: u16| {
        find(&entry.attributes, at)
            .and_then(|value| value.first_chunk())
            .map_or(0, |bytes| u32::from_be_bytes(*bytes))
    };
    let name = find(&entry.attributes, 1).map(text).unwrap_or_default();
    let (why, remedy) = match one.name {
        // NFT_TABLE_F_OWNER
        "tables" if flags(2) & 2 != 0 => {
            ("it belongs to a program that is outside", "stop that program (firewalld?)")
        }
        // NFT_CHAIN_BINDING
        "chains" if flags(10) & 4 != 0 => {
            ("a rule of it has a chain without a name", "give the chain a name")
        }
        _ => return Ok(()),
    };
    Err(HookError::unsupported(format!("nf_tables table {name}"), why, remedy))
}

/// Makes all rules, or none.
pub(crate) fn write_rules(saved: &[Saved]) -> Result<()> {
    if saved.is_empty() {
        return Ok(());
    }
    let mut batch = Vec::new();
    let mut append = |kind: u16, flags: u16, body: &[u8]| {
        batch.extend(netlink::message(kind, flags | NLM_F_REQUEST, 0, body));
    };
    append(BATCH_BEGIN, 0, &[0, 0, 0, 10]);
    let mut sets = 0_u32;
    for one in &KINDS {
        for entry in saved.iter().filter(|table| table.name == one.name).flat_map(|table| &table.entries) {
            let mut attributes = entry.attributes.clone();
            if one.name == SETS {
                // NFTA_SET_ID: a number within the batch.
                sets += 1;
                attributes.retain(|one| kind(one) != 10);
                attributes.push(attribute(10, sets.to_be_bytes()));
            }
            append(
                NF_TABLES | one.new,
                one.flags | NLM_F_ACK,
                &[entry.header.clone(), emit(&attributes)].concat(),
            );
        }
    }
    append(BATCH_END, 0, &[0, 0, 0, 10]);
    let netlink =
        Netlink::open(NETLINK_NETFILTER).map_err(|error| HookError::failed("opening nf_tables", error))?;
    netlink.batch(&batch).map_err(failed("making the rules of nf_tables"))
}

/// `CTA_*`.
const STATUS: u16 = 3;
/// Counters, use, number, marks of security, time stamp.
const CHOSEN: [u16; 7] = [9, 10, 11, 12, 17, 19, 20];

/// All that connection tracking knows in the namespace of this thread.
pub(crate) fn read_connections() -> Result<Vec<Entry>> {
    /// IPS_SRC_NAT, IPS_DST_NAT
    const TRANSLATED: u32 = 0x10 | 0x20;
    let Ok(mut netlink) = Netlink::open(NETLINK_NETFILTER) else { return Ok(Vec::new()) };
    let messages =
        listed(&mut netlink, CONNECTIONS | 1, &[0; HEADER]).map_err(failed("listing tracked connections"))?;
    let mut entries = Vec::new();
    for message in messages {
        let Some((header, attributes)) = message.split_at_checked(HEADER) else { continue };
        let mut entry = Entry { header: vec![header[0], 0, 0, 0], attributes: parse(attributes) };
        let status = find(&entry.attributes, STATUS)
            .and_then(|value| value.first_chunk())
            .map_or(0, |bytes| u32::from_be_bytes(*bytes));
        if status & TRANSLATED != 0 {
            return Err(HookError::unsupported(
                "connection tracking",
                "it translates addresses of a connection (NAT)",
                "end the connection, or forget it (conntrack -D)",
            ));
        }
        entry.attributes.retain(|one| !CHOSEN.contains(&kind(one)));
        entries.push(entry);
    }
    Ok(entries)
}

/// Tells connection tracking what it knew.
pub(crate) fn write_connections(entries: &[Entry]) -> Result<()> {
    if entries.is_empty() {
        return Ok(());
    }
    let mut netlink = Netlink::open(NETLINK_NETFILTER)
        .map_err(|error| HookError::failed("opening connection tracking", error))?;
    let mut rest: Vec<&Entry> = entries.iter().collect();
    // Those that come from others (of FTP, say) after them.
    while !rest.is_empty() {
        let before = rest.len();
        let mut refused = None;
        rest.retain(|entry| {
            let body = [entry.header.clone(), emit(&entry.attributes)].concat();
            match netlink.request(CONNECTIONS, NLM_F_CREATE | NLM_F_EXCL, &body) {
                Ok(()) => false,
                Err(refusal) if refusal.errno() == libc::EEXIST => false,
                Err(refusal) => {
                    refused.get_or_insert(refusal);
                    true
                }
            }
        });
        if let Some(refusal) = refused.filter(|_| rest.len() == before) {
            return Err(refusal.into_hook("telling connection tracking of a connection"));
        }
    }
    Ok(())
}

/// Connections that a helper waits for.
pub(crate) fn expectations() -> std::io::Result<Vec<String>> {
    let mut netlink = Netlink::open(NETLINK_NETFILTER)?;
    let found = listed(&mut netlink, 2 << 8 | 1, &[0; HEADER]).map_err(|refusal| refusal.error)?;
    Ok(if found.is_empty() { Vec::new() } else { vec![found.len().to_string()] })
}
