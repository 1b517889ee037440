//! Network devices: which kinds are kept, what of them, and how they are made. linux/if_link.h, rtnetlink(7).

use crate::{
    netlink::{
        self, Answer, Netlink, Refusal, attribute, emit, find, find_nested, find_number, kind, nested, parse,
        string, word,
    },
    record::stasis::ns_net::v1::{Attribute, Device, Outside},
    tables::difference,
};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use stasis_plugin_api::{HookError, Result};

const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const GET_LINK: u16 = 18;
const SET_LINK: u16 = 19;
const NEW_NAMES: u16 = 108;
/// Bytes of `ifinfomsg`: family, padding, type, index, flags, mask of flags.
const HEADER: usize = 16;

/// IFLA_*.
pub(crate) mod link {
    pub const ADDRESS: u16 = 1;
    pub const NAME: u16 = 3;
    pub const LOWER: u16 = 5;
    pub const QUEUEING: u16 = 6;
    pub const MASTER: u16 = 10;
    pub const INFO: u16 = 18;
    pub const AF_SPEC: u16 = 26;
    pub const NAMESPACE: u16 = 28;
    pub const LOWER_NAMESPACE: u16 = 37;
    pub const NUM_TX_QUEUES: u16 = 31;
    pub const NUM_RX_QUEUES: u16 = 32;
    pub const XDP: u16 = 43;
    pub const NAMES: u16 = 52;
    pub const ALTERNATIVE_NAME: u16 = 53;
}

/// IFLA_INFO_*.
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const INFO_PORT_KIND: u16 = 4;
const INFO_PORT_DATA: u16 = 5;
/// `VETH_INFO_PEER`.
const PEER: u16 = 1;

/// What is kept of every device: ADDRESS, BROADCAST, MTU, TXQLEN, LINKMODE, IFALIAS, GROUP, PROTO_DOWN, GSO_MAX_SEGS,
/// GSO_MAX_SIZE, GRO_MAX_SIZE, GSO_IPV4_MAX_SIZE, GRO_IPV4_MAX_SIZE.
const SETTINGS: [u16; 13] = [1, 2, 4, 13, 17, 20, 27, 39, 40, 41, 58, 63, 64];
/// What is said when a device is made: the numbers of queues.
const MADE_WITH: [u16; 2] = [link::NUM_TX_QUEUES, link::NUM_RX_QUEUES];
/// What is kept of the other end outside: ADDRESS, MTU, TXQLEN.
const OUTSIDE: [u16; 3] = [1, 4, 13];
/// Of IFLA_AF_SPEC, AF_INET6: the token, and how addresses are made. The rest are settings below /proc/sys.
const INET6: [u16; 2] = [7, 8];
/// IFF_UP, DEBUG, NOTRAILERS, NOARP, PROMISC, ALLMULTI, PORTSEL, AUTOMEDIA, DYNAMIC, MULTICAST.
const FLAGS: u32 = 0x1 | 0x4 | 0x20 | 0x80 | 0x100 | 0x200 | 0x2000 | 0x4000 | 0x8000 | 0x1000;
/// Disciplines that the kernel gives to a new device.
const QUEUEING: [&str; 4] = ["noqueue", "noop", "pfifo_fast", "mq"];

/// What another device has to do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Relation {
    /// There is none.
    Alone,
    /// It is the other end of it.
    Peer,
    /// It lies below it.
    Above,
    /// A descriptor is its other end.
    Descriptor,
}

/// A kind of device.
pub(crate) struct Kind {
    /// IFLA_INFO_KIND.
    pub name: &'static str,
    /// Attributes of IFLA_INFO_DATA that are said when it is made.
    made_with: &'static [u16],
    /// Those that can be changed later, too; all others say how it is.
    data: &'static [u16],
    pub relation: Relation,
}

/// What is kept. IFLA_VLAN_*, IFLA_MACVLAN_*, IFLA_BR_*, IFLA_TUN_*.
pub(crate) const KINDS: [Kind; 7] = [
    Kind { name: "veth", made_with: &[], data: &[], relation: Relation::Peer },
    Kind { name: "dummy", made_with: &[], data: &[], relation: Relation::Alone },
    Kind { name: "ifb", made_with: &[], data: &[], relation: Relation::Alone },
    // ID, FLAGS, EGRESS_QOS, INGRESS_QOS, PROTOCOL.
    Kind { name: "vlan", made_with: &[1, 2, 3, 4, 5], data: &[], relation: Relation::Above },
    // MODE, FLAGS, BC_QUEUE_LEN, BC_CUTOFF.
    Kind { name: "macvlan", made_with: &[1, 2], data: &[7, 9], relation: Relation::Above },
    // FORWARD_DELAY, HELLO_TIME, MAX_AGE, AGEING_TIME, STP_STATE, PRIORITY, VLAN_FILTERING, VLAN_PROTOCOL, GROUP_FWD_MASK, GROUP_ADDR,
    // MCAST_ROUTER, MCAST_SNOOPING, MCAST_QUERY_USE_IFADDR, MCAST_QUERIER, MCAST_HASH_MAX, MCAST_LAST_MEMBER_CNT,
    // MCAST_STARTUP_QUERY_CNT, their intervals, NF_CALL_*, VLAN_DEFAULT_PVID, VLAN_STATS_*, MCAST_STATS_ENABLED,
    // MCAST_IGMP_VERSION, MCAST_MLD_VERSION.
    Kind {
        name: "bridge",
        made_with: &[],
        data: &[
            1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 22, 23, 24, 25, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38,
            39, 41, 42, 43, 44, 45,
        ],
        relation: Relation::Alone,
    },
    // OWNER, GROUP, TYPE, PI, VNET_HDR, PERSIST, MULTI_QUEUE.
    Kind { name: "tun", made_with: &[1, 2, 3, 4, 5, 6, 7], data: &[], relation: Relation::Descriptor },
];

/// Attributes of a port of a bridge (IFLA_BRPORT_*) that can be set: PRIORITY, COST, MODE, GUARD, PROTECT, FAST_LEAVE, LEARNING,
/// UNICAST_FLOOD, PROXYARP, MULTICAST_ROUTER, MCAST_FLOOD, MCAST_TO_UCAST, VLAN_TUNNEL, BCAST_FLOOD, GROUP_FWD_MASK, NEIGH_SUPPRESS,
/// ISOLATED.
const PORT: [u16; 17] = [2, 3, 4, 5, 6, 7, 8, 9, 10, 25, 27, 28, 29, 30, 31, 32, 33];

/// The kind of a name.
pub(crate) fn named(name: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|kind| kind.name == name)
}

/// A device as it was listed.
pub(crate) struct Listed {
    pub index: u32,
    pub flags: u32,
    kind: u32,
    pub attributes: Vec<Attribute>,
}

impl Listed {
    fn new(message: &[u8]) -> Option<Self> {
        let (header, attributes) = message.split_at_checked(HEADER)?;
        Some(Self {
            index: netlink::number(&header[4..8]),
            flags: netlink::number(&header[8..12]),
            kind: netlink::number(&header[2..4]),
            attributes: parse(attributes),
        })
    }

    pub fn name(&self) -> String {
        find(&self.attributes, link::NAME).map_or(String::new(), netlink::text)
    }

    fn kept(&self, kinds: &[u16]) -> Vec<Attribute> {
        self.attributes.iter().filter(|one| kinds.contains(&kind(one))).cloned().collect()
    }

    /// Number of the namespace of its other device, as this namespace counts; none if that is this one.
    pub fn lower_namespace(&self) -> Option<i32> {
        find(&self.attributes, link::LOWER_NAMESPACE).map(|value| netlink::number(value).cast_signed())
    }

    /// Index of its other device, wherever that is.
    pub fn lower(&self) -> u32 {
        find_number(&self.attributes, link::LOWER)
    }

    /// The record of it, without what is outside.
    pub fn record(&self) -> Result<Device> {
        let name = self.name();
        let refuse = |why: String, remedy: &str| {
            Err(HookError::unsupported(format!("network device {name}"), why, remedy))
        };
        let info = find_nested(&self.attributes, link::INFO);
        let told = find(&info, INFO_KIND).map_or(String::new(), netlink::text);
        const LOOPBACK: u32 = 772;
        let (data, relation) = match named(&told) {
            Some(kind) => ([kind.made_with, kind.data].concat(), kind.relation),
            None if told.is_empty() && self.kind == LOOPBACK => (Vec::new(), Relation::Alone),
            None => {
                let what = if told.is_empty() { "a device of the machine" } else { told.as_str() };
                return refuse(
                    format!("nobody knows how to make it again: {what}"),
                    "move it out of the namespace, or delete it, before the dump",
                );
            }
        };
        let queueing = find(&self.attributes, link::QUEUEING).map_or(String::new(), netlink::text);
        if !QUEUEING.contains(&queueing.as_str()) {
            return refuse(format!("it has the queueing discipline {queueing}"), "remove it (tc qdisc del)");
        }
        // IFLA_XDP_ATTACHED
        if find(&find_nested(&self.attributes, link::XDP), 2).is_some_and(|mode| mode != [0]) {
            return refuse("an XDP program is attached to it".into(), "detach the program");
        }
        let port_kind = find(&info, INFO_PORT_KIND).map_or(String::new(), netlink::text);
        if !matches!(port_kind.as_str(), "" | "bridge") {
            return refuse(format!("it belongs to a {port_kind} device"), "take it out of that one");
        }
        let settable = |of: Vec<Attribute>, kinds: &[u16]| -> Vec<Attribute> {
            of.into_iter().filter(|one| kinds.contains(&kind(one))).collect()
        };
        let names = find_nested(&self.attributes, link::NAMES);
        let names = names.into_iter().filter(|one| kind(one) == link::ALTERNATIVE_NAME);
        let inet6 = find_nested(&find_nested(&self.attributes, link::AF_SPEC), libc::AF_INET6 as u16);
        // A token of zeros is none.
        let inet6 = settable(inet6, &INET6)
            .into_iter()
            .filter(|one| one.value.len() == 1 || one.value.iter().any(|byte| *byte != 0));
        let here = self.lower_namespace().is_none() && matches!(relation, Relation::Peer | Relation::Above);
        Ok(Device {
            index: self.index,
            flags: self.flags & FLAGS,
            r#type: self.kind,
            settings: self.kept(&[&SETTINGS[..], &MADE_WITH].concat()),
            data: settable(find_nested(&info, INFO_DATA), &data),
            alternative_names: names.map(|one| one.value).collect(),
            lower: if here { self.lower() } else { 0 },
            master: find_number(&self.attributes, link::MASTER),
            port: settable(find_nested(&info, INFO_PORT_DATA), &PORT),
            outside: None,
            inet6: inet6.collect(),
            kind: told,
            name,
        })
    }

    /// As the other end of a device, in the namespace of stasis.
    pub fn outside(&self) -> Outside {
        Outside {
            name: self.name(),
            flags: self.flags & FLAGS,
            settings: self.kept(&OUTSIDE),
            ..Outside::default()
        }
    }
}

fn header(index: u32, flags: u32, mask: u32) -> Vec<u8> {
    let mut header = vec![0; 4];
    header.extend(index.to_ne_bytes());
    header.extend(flags.to_ne_bytes());
    header.extend(mask.to_ne_bytes());
    header
}

/// All devices of a namespace.
pub(crate) fn list(netlink: &mut Netlink) -> Result<Vec<Listed>> {
    let listed = netlink.list(GET_LINK, &[0; HEADER]);
    let listed = listed.map_err(|refusal| refusal.into_hook("listing network devices"))?;
    Ok(listed.iter().filter_map(|message| Listed::new(message)).collect())
}

/// One device, by its index.
pub(crate) fn get(netlink: &mut Netlink, index: u32) -> Answer<Option<Listed>> {
    Ok(Listed::new(&netlink.get(GET_LINK, &header(index, 0, 0))?))
}

/// One device, by its name.
pub(crate) fn by_name(netlink: &mut Netlink, name: &str) -> Answer<Option<Listed>> {
    let body = [header(0, 0, 0), emit(&[string(link::NAME, name)])].concat();
    Ok(Listed::new(&netlink.get(GET_LINK, &body)?))
}

/// The whole message that removes a device.
pub(crate) fn deletion(index: u32) -> Vec<u8> {
    netlink::message(DELETE_LINK, netlink_packet_core::NLM_F_REQUEST, 0, &header(index, 0, 0))
}

/// Removes a device.
pub(crate) fn delete(netlink: &mut Netlink, index: u32) -> Answer<()> {
    netlink.request(DELETE_LINK, 0, &header(index, 0, 0))
}

/// Changes a device.
pub(crate) fn change(netlink: &mut Netlink, index: u32, attributes: &[Attribute]) -> Answer<()> {
    netlink.request(SET_LINK, 0, &[header(index, 0, 0), emit(attributes)].concat())
}

/// Sets flags of a device.
pub(crate) fn set_flags(netlink: &mut Netlink, index: u32, flags: u32, mask: u32) -> Answer<()> {
    netlink.request(SET_LINK, 0, &header(index, flags, mask))
}

/// What a new device lies above, or is connected to.
pub(crate) enum Other<'a> {
    Nothing,
    /// A device of the same namespace.
    Above(u32),
    /// One of the namespace of `netlink`, while the new one goes to that of the descriptor.
    AboveFrom(i32, u32),
    /// Its other end, in the same namespace.
    Peer(&'a Device),
    /// Its other end, in the namespace that the descriptor refers to.
    PeerElsewhere(i32, &'a str, Option<u32>, &'a [Attribute]),
}

/// Makes a device.
pub(crate) fn make(netlink: &mut Netlink, device: &Device, other: &Other<'_>) -> Answer<()> {
    let made_with = |device: &Device| {
        let kept = device.settings.iter().filter(|one| {
            MADE_WITH.contains(&kind(one))
                || matches!(kind(one), link::ADDRESS) && one.value.iter().any(|byte| *byte != 0)
        });
        let mut attributes: Vec<Attribute> = kept.cloned().collect();
        attributes.push(string(link::NAME, &device.name));
        attributes
    };
    let mut attributes = made_with(device);
    let said = named(&device.kind).map_or(&[][..], |kind| kind.made_with);
    let mut data: Vec<Attribute> =
        device.data.iter().filter(|one| said.contains(&kind(one))).cloned().collect();
    match other {
        Other::Nothing => {}
        Other::Above(index) => attributes.push(word(link::LOWER, *index)),
        Other::AboveFrom(namespace, index) => {
            attributes.extend([word(link::LOWER, *index), word(link::NAMESPACE, namespace.cast_unsigned())])
        }
        Other::Peer(peer) => {
            let body = [header(peer.index, 0, 0), emit(&made_with(peer))].concat();
            data.push(attribute(PEER, body));
        }
        Other::PeerElsewhere(namespace, name, index, settings) => {
            let mut of_peer =
                settings.iter().filter(|one| kind(one) == link::ADDRESS).cloned().collect::<Vec<_>>();
            of_peer.extend([string(link::NAME, name), word(link::NAMESPACE, namespace.cast_unsigned())]);
            data.push(attribute(PEER, [header(index.unwrap_or(0), 0, 0), emit(&of_peer)].concat()));
        }
    }
    attributes.push(nested(link::INFO, &[string(INFO_KIND, &device.kind), nested(INFO_DATA, &data)]));
    netlink.request(
        NEW_LINK,
        NLM_F_CREATE | NLM_F_EXCL,
        &[header(device.index, 0, 0), emit(&attributes)].concat(),
    )
}

/// Gives a device the settings that it does not have already.
pub(crate) fn settle(netlink: &mut Netlink, device: &Device) -> Result<()> {
    let name = &device.name;
    let failed = |what: &'static str| {
        move |refusal: Refusal| refusal.into_hook(format!("{what} of network device {name}"))
    };
    let present = get(netlink, device.index).map_err(failed("looking for the settings"))?;
    let present =
        present.ok_or_else(|| HookError::invalid(format!("network device {name} has no description")))?;
    for setting in difference(&device.settings, &present.attributes) {
        if !MADE_WITH.contains(&kind(&setting)) {
            let what = format!("setting attribute {} of network device {name}", kind(&setting));
            change(netlink, device.index, &[setting]).map_err(|refusal| refusal.into_hook(what))?;
        }
    }
    let data = find_nested(&find_nested(&present.attributes, link::INFO), INFO_DATA);
    let changeable = named(&device.kind).map_or(&[][..], |kind| kind.data);
    let wanted = difference(&device.data, &data).into_iter();
    for setting in wanted.filter(|setting| changeable.contains(&kind(setting))) {
        let what = format!("setting {} {} of network device {name}", device.kind, kind(&setting));
        let info = [string(INFO_KIND, &device.kind), nested(INFO_DATA, &[setting])];
        change_info(netlink, device.index, &info).map_err(|refusal| refusal.into_hook(what))?;
    }
    for alternative in &device.alternative_names {
        let names = [nested(link::NAMES, &[attribute(link::ALTERNATIVE_NAME, alternative.clone())])];
        let body = [header(device.index, 0, 0), emit(&names)].concat();
        let made = netlink.request(NEW_NAMES, NLM_F_CREATE | NLM_F_EXCL, &body);
        made.map_err(failed("making another name"))?;
    }
    if device.master != 0 {
        change(netlink, device.index, &[word(link::MASTER, device.master)])
            .map_err(failed("setting the bridge"))?;
        let present = get(netlink, device.index).map_err(failed("looking for the bridge port"))?;
        let present = present.map_or(Vec::new(), |one| find_nested(&one.attributes, link::INFO));
        for setting in difference(&device.port, &find_nested(&present, INFO_PORT_DATA)) {
            let what = format!("setting bridge port {} of network device {name}", kind(&setting));
            let info = [string(INFO_PORT_KIND, "bridge"), nested(INFO_PORT_DATA, &[setting])];
            change_info(netlink, device.index, &info).map_err(|refusal| refusal.into_hook(what))?;
        }
    }
    Ok(())
}

fn change_info(netlink: &mut Netlink, index: u32, info: &[Attribute]) -> Answer<()> {
    let body = [header(index, 0, 0), emit(&[nested(link::INFO, info)])].concat();
    netlink.request(NEW_LINK, 0, &body)
}

/// Puts a device up, if it was, with all its flags.
pub(crate) fn put_up(netlink: &mut Netlink, device: &Device) -> Result<()> {
    set_flags(netlink, device.index, device.flags & FLAGS, FLAGS)
        .map_err(|refusal| refusal.into_hook(format!("setting the flags of network device {}", device.name)))
}

/// When its addresses are there: how the kernel makes others. Told by /proc/sys it would make them at once.
pub(crate) fn set_generation(netlink: &mut Netlink, device: &Device) -> Result<()> {
    if device.inet6.is_empty() {
        return Ok(());
    }
    let inet6 = nested(libc::AF_INET6 as u16, &device.inet6);
    change(netlink, device.index, &[nested(link::AF_SPEC, &[inet6])]).map_err(|refusal| {
        refusal.into_hook(format!("setting how network device {} gets addresses of IPv6", device.name))
    })
}
