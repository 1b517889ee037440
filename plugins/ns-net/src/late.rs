//! What comes last, when all sockets are in place: rules, through which what restores sockets need not pass, and everything that leads
//! out. Nobody shall be told that there are no sockets.

use crate::{
    devices::{self, link},
    netfilter,
    netlink::{Netlink, Refusal, kind, word},
    record::stasis::ns_net::v1::{Device, Entry, NetNamespace},
    tables,
};
use stasis_plugin_api::{Event, HookError, Host, Lifecycle, Result, socket};
use std::{
    fs::File,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// The outer end of a pair that is connected when everything inside is in place.
pub(crate) struct End {
    pub index: u32,
    pub name: String,
    pub bridge: Option<u32>,
    pub addresses: Vec<Entry>,
}

/// What is still to be done in a namespace.
struct Inside {
    namespace: File,
    record: NetNamespace,
}

#[derive(Default)]
struct Waiting {
    ends: Vec<End>,
    inside: Vec<Inside>,
}

static WAITING: Mutex<Waiting> = Mutex::new(Waiting { ends: Vec::new(), inside: Vec::new() });

fn waiting() -> MutexGuard<'static, Waiting> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Remembers an end.
pub(crate) fn note(end: End) {
    waiting().ends.push(end);
}

/// Remembers a namespace with all that must wait in it.
pub(crate) fn note_inside(namespace: &File, record: &NetNamespace) -> Result<()> {
    let later =
        record.devices.iter().any(is_live) || !record.rules.is_empty() || !record.connections.is_empty();
    if later {
        let namespace = namespace.try_clone();
        let namespace = namespace.map_err(|error| HookError::failed("duplicating a descriptor", error))?;
        waiting().inside.push(Inside { namespace, record: record.clone() });
    }
    Ok(())
}

/// Whether others reach a device as soon as it is up: it lies on one of ours. Until all is in place it has another address, and answers
/// nobody who asks for it.
pub(crate) fn is_live(device: &Device) -> bool {
    device.outside.is_some()
        && devices::named(&device.kind).is_some_and(|kind| kind.relation == devices::Relation::Above)
}

/// IFF_NOARP
const SILENT: u32 = 0x80;

/// A live device as it is until then.
pub(crate) fn disguised(device: &Device) -> Device {
    let mut disguised = device.clone();
    disguised.settings.retain(|setting| kind(setting) != link::ADDRESS);
    disguised.flags |= SILENT;
    disguised
}

impl Inside {
    /// In its namespace.
    fn finish(&self) -> Result<()> {
        netfilter::write_rules(&self.record.rules)?;
        netfilter::write_connections(&self.record.connections)?;
        let mut netlink = route()?;
        for device in self.record.devices.iter().filter(|device| is_live(device)) {
            devices::settle(&mut netlink, device)?;
            devices::put_up(&mut netlink, device)?;
        }
        // With its address a device loses whom it knows.
        for saved in &self.record.tables {
            if let Some(table) = tables::named(&saved.name).filter(|table| table.is_of_neighbours()) {
                table.bring_about(&mut netlink, &saved.entries)?;
            }
        }
        Ok(())
    }
}

fn route() -> Result<Netlink> {
    Netlink::route().map_err(|error| HookError::failed("opening rtnetlink", error))
}

fn connect() -> Result<()> {
    let Waiting { ends, inside } = std::mem::take(&mut *waiting());
    for inside in inside {
        let namespace = inside.namespace.try_clone();
        let namespace = namespace.map_err(|error| HookError::failed("duplicating a descriptor", error))?;
        let entered = socket::in_namespace(&namespace, move || Ok::<_, io::Error>(inside.finish()));
        entered.map_err(|error| HookError::failed("entering a network namespace", error))??;
    }
    if ends.is_empty() {
        return Ok(());
    }
    let mut netlink = route()?;
    // Noted again, so that a failure takes all of them away.
    let mut connected = Ok(());
    for end in &ends {
        connected = connected.and_then(|()| connect_end(&mut netlink, end));
    }
    waiting().ends = ends;
    connected
}

fn connect_end(netlink: &mut Netlink, end: &End) -> Result<()> {
    let failed = |refusal: Refusal| refusal.into_hook(format!("connecting network device {}", end.name));
    if let Some(bridge) = end.bridge {
        devices::change(netlink, end.index, &[word(link::MASTER, bridge)]).map_err(failed)?;
    }
    let Some(table) = tables::named("addresses") else { return Ok(()) };
    for address in &end.addresses {
        match table.make(netlink, &table.moved(address.clone(), end.index)) {
            // The kernel has made one by itself, for example.
            Err(refusal) if refusal.errno() != libc::EEXIST => return Err(failed(refusal)),
            _ => {}
        }
    }
    Ok(())
}

/// A restore that has failed: what was made outside goes at once, not some time after the namespace.
fn disconnect() {
    let Waiting { ends, .. } = std::mem::take(&mut *waiting());
    if let Ok(mut netlink) = Netlink::route() {
        for end in ends {
            let _ = devices::delete(&mut netlink, end.index);
        }
    }
}

/// Its hooks.
pub(crate) struct Connecting;

impl Lifecycle for Connecting {
    const KIND: &'static str = "network-devices";

    fn event(&self, _: &Host<'_>, event: Event) -> Result<()> {
        match event {
            Event::Restored => connect(),
            Event::Aborted => {
                disconnect();
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
