//! Fills the new namespace, from outside, while its first task waits: with our own powers, through our own /proc, and before
//! there is anybody inside who could see it half done. What leads out of it is connected last ([`late`]).

use crate::{
    EMPTY, JOIN,
    devices::{self, Other, Relation, link},
    external::{self, External},
    late::{self, End},
    netlink::{Answer, Netlink, Refusal, kind},
    record::stasis::ns_net::v1::{Attribute, Device, NetNamespace, Outside},
    sysctls, tables, tun,
};
use stasis_plugin_api::{HookError, Host, Result, namespace};
use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

const UP: u32 = 1;
/// How long a device of the same name may take to go, with a namespace that has just ended.
const GOING: Duration = Duration::from_secs(5);

/// What becomes of the namespace.
enum Fate<'a> {
    Filled,
    Empty,
    /// Another one is entered: a path, or the key of an inherited descriptor.
    Joined(Place<'a>),
}

enum Place<'a> {
    Path(String),
    Inherited(&'a str),
}

fn fate<'a>(host: &Host<'_>, record: &'a NetNamespace) -> Result<Fate<'a>> {
    let join = host.option(JOIN).and_then(|value| external::path_to_join(&value).map(str::to_owned));
    Ok(match join {
        Some(path) => Fate::Joined(Place::Path(path)),
        None if !record.external.is_empty() => Fate::Joined(Place::Inherited(&record.external)),
        None if record.empty || host.option(EMPTY).is_some_and(|kinds| external::names_net(&kinds)) => {
            Fate::Empty
        }
        None => Fate::Filled,
    })
}

/// In the first task, before its mounts change what paths mean.
pub(crate) fn enter(host: &Host<'_>, record: &NetNamespace) -> Result<()> {
    let Fate::Joined(how) = fate(host, record)? else { return Ok(()) };
    let (file, name): (OwnedFd, _) = match how {
        Place::Path(path) => {
            let file = File::open(&path);
            (
                file.map_err(|error| HookError::failed(format!("opening {path} (--join-ns)"), error))?.into(),
                path,
            )
        }
        Place::Inherited(key) => {
            let file = host.inherited(key)?.ok_or_else(|| {
                HookError::invalid(format!("the network namespace {key} is outside of the image"))
                    .remedy(format!("give it by --inherit-fd fd[N]:{key}, or by --join-ns=net:PATH"))
            })?;
            (file, key.to_owned())
        }
    };
    // SAFETY: integer arguments; this process has one thread.
    let entered = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
    nix::errno::Errno::result(entered).map(drop).map_err(|errno| {
        HookError::failed(format!("entering the network namespace {name}"), errno)
            .remedy("a tree with a user namespace can enter only what that owns")
    })
}

/// What the user wants on the other side of each device.
type Externals = BTreeMap<u32, External>;

/// In the command.
pub(crate) fn prepare(host: &Host<'_>, record: &NetNamespace, host_pid: i32) -> Result<()> {
    if !matches!(fate(host, record)?, Fate::Filled) {
        return Ok(());
    }
    let open =
        |path: String| File::open(&path).map_err(|error| HookError::failed(format!("opening {path}"), error));
    let proc: OwnedFd = open(format!("/proc/{host_pid}"))?.into();
    let inside = open(format!("/proc/{host_pid}/ns/net"))?;
    let ours = open("/proc/self/ns/net".into())?;
    let wanted = record
        .devices
        .iter()
        .filter_map(|device| Some((device.index, external::of_device(host, &device.kind, &device.name)?)));
    let externals: Externals = wanted.collect();
    let outer = Netlink::route().map_err(|error| HookError::failed("opening rtnetlink", error))?;
    namespace::within(&proc, "net", || {
        let inner = Netlink::route().map_err(|error| HookError::failed("opening rtnetlink", error))?;
        Filling {
            record,
            externals: &externals,
            inner,
            outer,
            inside: &inside,
            ours: &ours,
            tuns: Vec::new(),
        }
        .fill()
    })?;
    late::note_inside(&inside, record)
}

struct Filling<'a> {
    record: &'a NetNamespace,
    externals: &'a Externals,
    inner: Netlink,
    outer: Netlink,
    /// The new namespace, and that of stasis.
    inside: &'a File,
    ours: &'a File,
    /// What gives devices a carrier while addresses are made.
    tuns: Vec<File>,
}

impl<'a> Filling<'a> {
    fn fill(mut self) -> Result<()> {
        let devices = self.make_devices()?;
        for device in &devices {
            devices::settle(&mut self.inner, &first(device))?;
        }
        sysctls::begin(&self.record.sysctls)?;
        for device in &devices {
            devices::put_up(&mut self.inner, &first(device))?;
        }
        let up: Vec<u32> =
            devices.iter().filter(|device| device.flags & UP != 0).map(|device| device.index).collect();
        for saved in &self.record.tables {
            let table = tables::named(&saved.name)
                .ok_or_else(|| HookError::invalid(format!("the image has a list of {}", saved.name)))?;
            table.bring_about(&mut self.inner, &saved.entries)?;
            if saved.name == "addresses" {
                tables::settle_addresses(&mut self.inner, &up)?;
            }
        }
        for device in &devices {
            devices::set_generation(&mut self.inner, device)?;
        }
        sysctls::finish(&self.record.sysctls)
    }

    /// Makes all devices, those below others first; returns them in that order.
    fn make_devices(&mut self) -> Result<Vec<&'a Device>> {
        let record = self.record;
        let mut rest: Vec<&'a Device> = record.devices.iter().collect();
        let mut made: Vec<&'a Device> = Vec::new();
        while !rest.is_empty() {
            let is_made = |index: u32| made.iter().any(|device| device.index == index);
            let ready = rest.iter().position(|device| {
                device.lower == 0 || is_made(device.lower) || relation(device) == Relation::Peer
            });
            let Some(ready) = ready else {
                return Err(HookError::invalid("devices lie above each other in a circle"));
            };
            let device = rest.remove(ready);
            let with_peer = relation(device) == Relation::Peer && is_made(device.lower);
            if !device.kind.is_empty() && !with_peer {
                self.make(device)?;
            }
            made.push(device);
        }
        Ok(made)
    }

    fn make(&mut self, device: &Device) -> Result<()> {
        let failed = |refusal: Refusal| refusal.into_hook(format!("making network device {}", device.name));
        match (relation(device), device.outside.as_ref()) {
            (Relation::Peer, Some(outside)) => return self.make_end(device, outside),
            (Relation::Above, Some(outside)) => {
                let name = self.other_name(device, outside)?;
                let lower = self.find_outside(&name, device)?;
                let other = Other::AboveFrom(self.inside.as_raw_fd(), lower);
                devices::make(&mut self.outer, &late::disguised(device), &other)
            }
            (Relation::Peer, None) => {
                let peer = self.record.devices.iter().find(|other| other.index == device.lower);
                let peer = peer.ok_or_else(|| {
                    HookError::invalid(format!("network device {} has no other end", device.name))
                })?;
                devices::make(&mut self.inner, device, &Other::Peer(peer))
            }
            (Relation::Above, None) => devices::make(&mut self.inner, device, &Other::Above(device.lower)),
            (Relation::Alone, _) => devices::make(&mut self.inner, device, &Other::Nothing),
            (Relation::Descriptor, _) => {
                self.tuns.push(tun::make(device)?);
                return Ok(());
            }
        }
        .map_err(failed)
    }

    fn other_name(&self, device: &Device, outside: &Outside) -> Result<String> {
        let given = self.externals.get(&device.index).map(|external| external.name.clone());
        given.or_else(|| Some(outside.name.clone()).filter(|name| !name.is_empty())).ok_or_else(|| {
            let Device { kind, name, .. } = device;
            HookError::invalid(format!("the image does not say where device {name} led to"))
                .remedy(format!("give --external {kind}[{name}]:OUTSIDE"))
        })
    }

    fn find_outside(&mut self, name: &str, device: &Device) -> Result<u32> {
        match devices::by_name(&mut self.outer, name) {
            Ok(Some(found)) => Ok(found.index),
            Ok(None) => Err(HookError::invalid(format!("network device {name} has no description"))),
            Err(refusal) => {
                let Device { kind, name: inside, .. } = device;
                let bridge = if kind == "veth" { "@BRIDGE" } else { "" };
                Err(refusal
                    .into_hook(format!("looking for {name}, to which network device {inside} is connected"))
                    .remedy(format!(
                        "make it, or name another by --external {kind}[{inside}]:OUTSIDE{bridge}"
                    )))
            }
        }
    }

    /// A pair whose other end is in the namespace of stasis. That is put up, but reached by nobody yet.
    fn make_end(&mut self, device: &Device, outside: &Outside) -> Result<()> {
        let external = self.externals.get(&device.index);
        let name = self.other_name(device, outside)?;
        let bridge = match external {
            Some(external) => external.bridge.clone(),
            None => Some(outside.bridge.clone()).filter(|bridge| !bridge.is_empty()),
        };
        let bridge = bridge.map(|bridge| self.find_outside(&bridge, device)).transpose()?;
        // What the user names is his: it gets no address of another's.
        let settings: &[Attribute] = if external.is_some() { &[] } else { &outside.settings };
        let other = Other::PeerElsewhere(self.ours.as_raw_fd(), &name, None, settings);
        let what = format!("making network device {} with its other end {name}", device.name);
        self.make_patiently(device, &other).map_err(|refusal| {
            let taken = refusal.errno() == libc::EEXIST;
            let error = refusal.into_hook(what);
            let remedy = format!("give another name by --external veth[{}]:OUTSIDE@BRIDGE", device.name);
            if taken { error.remedy(remedy) } else { error }
        })?;
        let index = self.find_outside(&name, device)?;
        late::note(End { index, name: name.clone(), bridge, addresses: outside.addresses.clone() });
        let failed = |refusal: Refusal| refusal.into_hook(format!("setting up network device {name}"));
        for setting in settings.iter().filter(|setting| kind(setting) != link::ADDRESS) {
            devices::change(&mut self.outer, index, std::slice::from_ref(setting)).map_err(failed)?;
        }
        let flags = if external.is_some() { UP } else { outside.flags };
        devices::set_flags(&mut self.outer, index, flags, flags).map_err(failed)
    }

    /// The devices of a namespace that has just ended go a moment later.
    fn make_patiently(&mut self, device: &Device, other: &Other<'_>) -> Answer<()> {
        let began = Instant::now();
        loop {
            match devices::make(&mut self.inner, device, other) {
                Err(refusal) if refusal.errno() == libc::EEXIST && began.elapsed() < GOING => {
                    thread::sleep(Duration::from_millis(5));
                }
                other => return other,
            }
        }
    }
}

/// A device as it is until everything is in place.
fn first(device: &Device) -> Cow<'_, Device> {
    match late::is_live(device) {
        true => Cow::Owned(late::disguised(device)),
        false => Cow::Borrowed(device),
    }
}

fn relation(device: &Device) -> Relation {
    devices::named(&device.kind).map_or(Relation::Alone, |kind| kind.relation)
}
