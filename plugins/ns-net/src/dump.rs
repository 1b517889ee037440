//! From a namespace to its record, by a thread that has entered it.

use crate::{
    EMPTY, devices, external, netfilter,
    netlink::{Netlink, attribute, emit, find_number, parse},
    record::stasis::ns_net::v1::{Device, NetNamespace},
    refusals, sysctls,
    tables::{self, TABLES},
    tun,
};
use stasis_plugin_api::{DumpedNamespace, HookError, Host, NamespaceInfo, Result, UndoStep, namespace};
use std::{fs::File, os::fd::AsRawFd};

/// RTM_GETNSID, NETNSA_NSID, NETNSA_FD: linux/net_namespace.h.
const GET_NUMBER: u16 = 90;
const NUMBER: u16 = 1;
const DESCRIPTOR: u16 = 3;

pub(crate) fn dump(host: &Host<'_>, info: &NamespaceInfo) -> Result<DumpedNamespace<NetNamespace>> {
    namespace::whole_tree(host, info)?;
    let record = match external::of(host, info.ino) {
        Some(key) => NetNamespace { external: key, ..NetNamespace::default() },
        None if host.option(EMPTY).is_some_and(|kinds| external::names_net(&kinds)) => {
            NetNamespace { empty: true, ..NetNamespace::default() }
        }
        None => {
            let ours = File::open("/proc/self/ns/net");
            let ours = ours.map_err(|error| HookError::failed("opening a network namespace", error))?;
            let mut outside = open()?;
            let proc = namespace::member(host, info)?;
            let (record, inside) = namespace::within(&proc, "net", || read(info.ino, &ours, &mut outside))?;
            if host.ends_tree() && !host.is_dry_run() {
                cut_off(host, &record, &inside)?;
            }
            record
        }
    };
    Ok(DumpedNamespace { record, version: 1 })
}

fn open() -> Result<Netlink> {
    Netlink::route().map_err(|error| HookError::failed("opening rtnetlink", error))
}

/// Everything of the namespace of this thread. `ours` is that of stasis, and `outside` talks to it.
fn read(ino: u64, ours: &File, outside: &mut Netlink) -> Result<(NetNamespace, Netlink)> {
    refusals::check(ino)?;
    let mut netlink = open()?;
    let number = number_of(&mut netlink, ours)?;
    let mut devices = Vec::new();
    for listed in devices::list(&mut netlink)? {
        let mut device = listed.record()?;
        tun::check(&device, ino)?;
        if let Some(namespace) = listed.lower_namespace() {
            let known = number == Some(namespace);
            device.outside = Some(match known {
                true => look(outside, listed.lower(), &device)?,
                false => Default::default(),
            });
        }
        devices.push(device);
    }
    let tables = TABLES.iter().map(|table| table.save(&mut netlink)).collect::<Result<_>>()?;
    let record = NetNamespace {
        sysctls: sysctls::read()?,
        devices,
        tables,
        rules: netfilter::read_rules()?,
        connections: netfilter::read_connections()?,
        ..NetNamespace::default()
    };
    Ok((record, netlink))
}

/// When the tree is killed its namespace lives on for a moment, then without the lock of connections: a packet would be answered by a
/// reset. So what leads out goes first.
fn cut_off(host: &Host<'_>, record: &NetNamespace, inside: &Netlink) -> Result<()> {
    let leading_out = record.devices.iter().filter(|device| device.outside.is_some());
    let steps: Vec<UndoStep> = leading_out
        .map(|device| UndoStep::WriteWhenKilled(devices::deletion(device.index).as_slice().into()))
        .collect();
    if steps.is_empty() { Ok(()) } else { host.undo(inside.as_fd(), &steps) }
}

/// How this namespace calls the one of stasis, if it does.
fn number_of(netlink: &mut Netlink, ours: &File) -> Result<Option<i32>> {
    let descriptor = attribute(DESCRIPTOR, ours.as_raw_fd().to_ne_bytes());
    let body = [vec![0; 4], emit(&[descriptor])].concat();
    let answer = netlink.get(GET_NUMBER, &body);
    let answer =
        answer.map_err(|refusal| refusal.into_hook("asking for the number of a network namespace"))?;
    let number = find_number(&parse(answer.get(4..).unwrap_or_default()), NUMBER).cast_signed();
    Ok(Some(number).filter(|number| *number >= 0))
}

/// The other device, in the namespace of stasis: its end of a pair, or what is below.
fn look(
    netlink: &mut Netlink,
    index: u32,
    device: &Device,
) -> Result<crate::record::stasis::ns_net::v1::Outside> {
    let failed = |what: &'static str| {
        let name = device.name.clone();
        move |refusal: crate::netlink::Refusal| refusal.into_hook(format!("{what} of network device {name}"))
    };
    let other = devices::get(netlink, index).map_err(failed("looking for the other end"))?;
    let Some(other) = other else { return Ok(Default::default()) };
    let mut outside = other.outside();
    let bridge = find_number(&other.attributes, devices::link::MASTER);
    if bridge != 0
        && let Some(bridge) = devices::get(netlink, bridge).map_err(failed("looking for the bridge"))?
    {
        outside.bridge = bridge.name();
    }
    if let Some(table) = tables::named("addresses").filter(|_| device.kind == "veth") {
        outside.addresses = table.of_device(table.read(netlink)?, index);
    }
    Ok(outside)
}
