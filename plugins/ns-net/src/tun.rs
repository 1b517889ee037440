//! Devices whose other end is a descriptor, and those descriptors: tun and tap, linux/if_tun.h.
//!
//! The device is made with its namespace, as one that stays; the descriptor takes it, and then it stays only if it did before.

use crate::{
    devices,
    netlink::{Netlink, find_nested, find_number, text},
    record::stasis::ns_net::v1::{Device, Tun},
};
use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector, socket,
};
use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
        },
    },
    path::Path,
    sync::{Mutex, PoisonError},
};

const USUAL: &str = "/dev/net/tun";
/// Major and minor number: miscellaneous devices.
const NUMBER: (u32, u32) = (10, 200);

/// ioctl(2) requests.
const SET_DEVICE: libc::c_ulong = 0x4004_54ca;
const SET_PERSISTENT: libc::c_ulong = 0x4004_54cb;
const SET_OWNER: libc::c_ulong = 0x4004_54cc;
const SET_GROUP: libc::c_ulong = 0x4004_54ce;
const GET_DEVICE: libc::c_ulong = 0x8004_54d2;
const GET_SEND_BUFFER: libc::c_ulong = 0x8004_54d3;
const SET_SEND_BUFFER: libc::c_ulong = 0x4004_54d4;
const GET_HEADER: libc::c_ulong = 0x8004_54d7;
const SET_HEADER: libc::c_ulong = 0x4004_54d8;
const SET_INDEX: libc::c_ulong = 0x4004_54da;
const GET_FILTER: libc::c_ulong = 0x8010_54db;
const GET_LITTLE_ENDIAN: libc::c_ulong = 0x8004_54dd;
const SET_LITTLE_ENDIAN: libc::c_ulong = 0x4004_54dc;
const SET_BIG_ENDIAN: libc::c_ulong = 0x4004_54de;
const GET_BIG_ENDIAN: libc::c_ulong = 0x8004_54df;
const GET_NAMESPACE: libc::c_ulong = 0x54e3;

/// IFF_*.
const NO_PACKET_INFORMATION: u32 = 0x1000;
const VNET_HEADER: u32 = 0x4000;
const MULTI_QUEUE: u32 = 0x100;
const DETACHED: u32 = 0x400;
const PERSISTENT: u32 = 0x800;
const TAP: u32 = 2;
/// Those that say what kind of device it is: TUN, TAP, NAPI, NAPI_FRAGS, MULTI_QUEUE, VNET_HDR.
const KIND: u32 = 0x1 | TAP | 0x10 | 0x20 | MULTI_QUEUE | VNET_HEADER;

/// IFLA_TUN_*.
mod attribute {
    pub const OWNER: u16 = 1;
    pub const GROUP: u16 = 2;
    pub const TYPE: u16 = 3;
    pub const PACKET_INFORMATION: u16 = 4;
    pub const VNET_HEADER: u16 = 5;
    pub const PERSISTENT: u16 = 6;
    pub const MULTI_QUEUE: u16 = 7;
}

fn get(fd: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<i32> {
    socket::ioctl_int(fd, request)
}

fn set(fd: BorrowedFd<'_>, request: libc::c_ulong, value: i32) -> io::Result<()> {
    // SAFETY: requests that read one int.
    socket::check(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const value) }).map(drop)
}

/// Requests whose argument is the number itself.
fn tell(fd: BorrowedFd<'_>, request: libc::c_ulong, value: u32) -> io::Result<()> {
    // SAFETY: no pointers.
    socket::check(unsafe { libc::ioctl(fd.as_raw_fd(), request, libc::c_ulong::from(value)) }).map(drop)
}

/// TUNSETIFF
fn take(fd: BorrowedFd<'_>, name: &str, flags: u32) -> io::Result<()> {
    // SAFETY: zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the kernel reads and writes one ifreq.
    socket::check(unsafe { libc::ioctl(fd.as_raw_fd(), SET_DEVICE, &raw mut request) }).map(drop)
}

/// Name and flags of the device that a descriptor has.
fn device_of(fd: BorrowedFd<'_>) -> io::Result<Option<(String, u32)>> {
    // SAFETY: zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one ifreq.
    match socket::check(unsafe { libc::ioctl(fd.as_raw_fd(), GET_DEVICE, &raw mut request) }) {
        Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return Ok(None),
        other => other?,
    };
    let name: Vec<u8> = request.ifr_name.iter().map(|byte| *byte as u8).collect();
    // SAFETY: the member that this request fills.
    let flags = unsafe { request.ifr_ifru.ifru_flags } as u16;
    Ok(Some((text(&name), flags.into())))
}

/// Flags for TUNSETIFF of a device as it was listed.
fn flags_of(data: &[crate::record::stasis::ns_net::v1::Attribute]) -> u32 {
    let has = |kind, flag| if find_number(data, kind) != 0 { flag } else { 0 };
    let plain = if find_number(data, attribute::PACKET_INFORMATION) == 0 { NO_PACKET_INFORMATION } else { 0 };
    find_number(data, attribute::TYPE)
        | plain
        | has(attribute::VNET_HEADER, VNET_HEADER)
        | has(attribute::MULTI_QUEUE, MULTI_QUEUE)
}

/// Makes the device, in the namespace of this thread. It has a carrier as long as the file is open.
pub(crate) fn make(device: &Device) -> Result<File> {
    let failed = |what: &'static str| {
        let name = device.name.clone();
        move |error| HookError::failed(format!("{what} of network device {name}"), error)
    };
    let file = OpenOptions::new().read(true).write(true).open(USUAL);
    let file = file.map_err(|error| HookError::failed(format!("opening {USUAL}"), error))?;
    let fd = file.as_fd();
    set(fd, SET_INDEX, device.index.cast_signed()).map_err(failed("choosing the number"))?;
    take(fd, &device.name, flags_of(&device.data)).map_err(failed("TUNSETIFF"))?;
    let number = |kind| crate::netlink::find(&device.data, kind).map(crate::netlink::number);
    for (kind, request) in [(attribute::OWNER, SET_OWNER), (attribute::GROUP, SET_GROUP)] {
        if let Some(id) = number(kind) {
            tell(fd, request, id).map_err(failed("setting the owner"))?;
        }
    }
    tell(fd, SET_PERSISTENT, 1).map_err(failed("TUNSETPERSIST"))?;
    Ok(file)
}

/// The kind of these descriptors.
pub(crate) struct Tuns;

impl Descriptor for Tuns {
    type Record = Tun;
    const KIND: &'static str = "tun";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::CharDevice { major: NUMBER.0, first: NUMBER.1, last: NUMBER.1 }]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        // What is opened with O_PATH has none.
        let device = device_of(fd).unwrap_or_default();
        if let Some((name, _)) = &device {
            let namespace = namespace_of(fd).and_then(|namespace| namespace.metadata());
            let namespace = namespace.map_err(|error| HookError::failed("TUNGETDEVNETNS", error))?.ino();
            HELD.lock().unwrap_or_else(PoisonError::into_inner).insert((namespace, name.clone()));
        }
        let name = device.map_or("no device yet".to_owned(), |(name, _)| name);
        Ok(Described {
            identity: handle.id.to_string().into(),
            description: format!("{} ({name})", handle.link).into(),
            ..Described::default()
        })
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Tun>> {
        let handle = socket::only_handle(object)?;
        let owned = host.open_handle(handle.id)?;
        let fd = owned.as_fd();
        let mut record = Tun {
            path: handle.link.as_bytes().to_vec(),
            open_flags: handle.status_flags & (libc::O_ACCMODE | libc::O_PATH) as u32,
            ..Tun::default()
        };
        let label = object.description.as_str();
        let failed = |what: &'static str| move |error| HookError::failed(what, error);
        if record.open_flags & libc::O_PATH as u32 != 0 {
            return Ok(Dumped::new(record));
        }
        let Some((name, flags)) = device_of(fd).map_err(failed("TUNGETIFF"))? else {
            return Ok(Dumped::new(record));
        };
        let refuse = |why: &str, remedy: &str| Err(HookError::unsupported(label, why, remedy));
        if flags & DETACHED != 0 {
            return refuse("its queue is detached from the device (TUNSETQUEUE)", "attach it, or close it");
        }
        let mut filter = [0_u8; 16];
        // SAFETY: the kernel writes one sock_fprog, of sixteen bytes.
        let asked = unsafe { libc::ioctl(fd.as_raw_fd(), GET_FILTER, filter.as_mut_ptr()) };
        if flags & TAP != 0 && asked == 0 && filter[..2] != [0, 0] {
            return refuse("a packet filter is attached to it", "detach the filter (TUNDETACHFILTER)");
        }
        let namespace = namespace_of(fd).map_err(failed("TUNGETDEVNETNS"))?;
        let proc = host.open_proc(socket::holder(host, object)?)?;
        let number = |path: &str| {
            std::fs::metadata(path).map(|meta| meta.ino()).map_err(failed("stat of a namespace"))
        };
        let its = namespace.metadata().map_err(failed("stat of a namespace"))?.ino();
        if its != number(&format!("/proc/self/fd/{}/ns/net", proc.as_raw_fd()))? {
            return refuse("its device is in another network namespace than its holder", "");
        }
        if its == number("/proc/self/ns/net")? && flags & PERSISTENT == 0 {
            let remedy = "make the device persistent, or run the program in a network namespace of its own";
            return refuse("its device is in the network namespace of stasis, and goes with it", remedy);
        }
        let asked = name.clone();
        let listed = socket::in_namespace(&namespace, move || {
            let found = devices::by_name(&mut Netlink::route()?, &asked).map_err(|refusal| refusal.error)?;
            Ok(found.map(|device| find_nested(&find_nested(&device.attributes, devices::link::INFO), 2)))
        });
        let data = listed.map_err(failed("looking for a tun device"))?.unwrap_or_default();
        // What is not told by both: TUNGETIFF shows one bit for two flags.
        record.flags = flags & KIND | flags_of(&data);
        record.persistent = flags & PERSISTENT != 0;
        record.device = name;
        record.send_buffer = get(fd, GET_SEND_BUFFER).map_err(failed("TUNGETSNDBUF"))?;
        record.header = get(fd, GET_HEADER).map_err(failed("TUNGETVNETHDRSZ"))?;
        record.little_endian = get(fd, GET_LITTLE_ENDIAN).map_err(failed("TUNGETVNETLE"))?;
        record.big_endian = get(fd, GET_BIG_ENDIAN).unwrap_or(0);
        if socket::poll(fd, libc::POLLIN).map_err(failed("poll"))? & libc::POLLIN != 0 {
            host.warn(&format!("{label}: packets that nobody has read yet are dropped"));
        }
        Ok(Dumped::new(record))
    }

    fn create(&self, _: &Host<'_>, _: &ObjectInfo, record: &Tun) -> Result<Vec<OwnedFd>> {
        let path = Path::new(OsStr::from_bytes(&record.path));
        let shown = path.display();
        let file = open(path, record).or_else(|error| open(Path::new(USUAL), record).map_err(|_| error));
        let file = file.map_err(|error| {
            HookError::failed(format!("opening {shown} as the device 10:200"), error)
                .remedy(format!("make it: mknod {shown} c 10 200"))
        })?;
        if record.device.is_empty() {
            return Ok(vec![file.into()]);
        }
        let name = &record.device;
        let failed = |what: &'static str| {
            move |error| HookError::failed(format!("{what} of network device {name}"), error)
        };
        let fd = file.as_fd();
        take(fd, name, record.flags).map_err(failed("TUNSETIFF"))?;
        if !record.persistent {
            tell(fd, SET_PERSISTENT, 0).map_err(failed("TUNSETPERSIST"))?;
        }
        set(fd, SET_SEND_BUFFER, record.send_buffer).map_err(failed("TUNSETSNDBUF"))?;
        set(fd, SET_HEADER, record.header).map_err(failed("TUNSETVNETHDRSZ"))?;
        if get(fd, GET_LITTLE_ENDIAN).is_ok_and(|value| value != record.little_endian) {
            set(fd, SET_LITTLE_ENDIAN, record.little_endian).map_err(failed("TUNSETVNETLE"))?;
        }
        if record.big_endian != 0 {
            set(fd, SET_BIG_ENDIAN, record.big_endian).map_err(failed("TUNSETVNETBE"))?;
        }
        Ok(vec![file.into()])
    }
}

/// Opens the device, and nothing else.
fn open(path: &Path, record: &Tun) -> io::Result<File> {
    let look = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
    let meta = look.metadata()?;
    if !meta.file_type().is_char_device() || meta.rdev() != libc::makedev(NUMBER.0, NUMBER.1) {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    let flags = record.open_flags.cast_signed();
    let access = flags & libc::O_ACCMODE;
    OpenOptions::new()
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        .custom_flags(flags & !libc::O_ACCMODE)
        .open(path)
}

/// Devices that descriptors of the tree have: namespace and name.
static HELD: Mutex<BTreeSet<(u64, String)>> = Mutex::new(BTreeSet::new());

/// The network namespace of the device that a descriptor has.
fn namespace_of(fd: BorrowedFd<'_>) -> io::Result<File> {
    // SAFETY: the request takes no argument and gives a new descriptor.
    let namespace = socket::check(unsafe { libc::ioctl(fd.as_raw_fd(), GET_NAMESPACE) })?;
    // SAFETY: as above.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(namespace) }))
}

/// Refuses a device that would go with a descriptor which is not in the tree.
pub(crate) fn check(device: &Device, namespace: u64) -> Result<()> {
    let relation = devices::named(&device.kind).map(|kind| kind.relation);
    let stays = relation != Some(devices::Relation::Descriptor)
        || find_number(&device.data, attribute::PERSISTENT) != 0;
    let held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
    if stays || held.contains(&(namespace, device.name.clone())) {
        return Ok(());
    }
    Err(HookError::unsupported(
        format!("network device {}", device.name),
        "it goes with a descriptor that nobody in the tree has",
        "dump a tree that has it, or make the device persistent",
    ))
}
