//! /dev/net/tun.

use crate::records::Tunnel;
use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector,
};
use std::{
    fs::OpenOptions,
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

/// The device's number (Documentation/admin-guide/devices.txt).
const MISC: u32 = 10;
const TUN: u32 = 200;

// include/uapi/linux/if_tun.h
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNGETSNDBUF: libc::c_ulong = 0x8004_54d3;
const TUNSETSNDBUF: libc::c_ulong = 0x4004_54d4;
const IFF_PERSIST: u32 = 0x0800;
/// Those that TUNSETIFF takes and that need no more: IFF_TUN, IFF_TAP, IFF_NO_PI.
const SIMPLE: u32 = 0x0001 | 0x0002 | 0x1000;

pub struct Tunnels;

/// Name and flags of the interface that a descriptor is attached to.
fn interface(fd: BorrowedFd<'_>) -> io::Result<Option<(String, u32)>> {
    // SAFETY: zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF fills in an ifreq.
    if unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut request) } < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::EBADFD) { Ok(None) } else { Err(error) };
    }
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned());
    // SAFETY: TUNGETIFF sets the flags of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(Some((
        String::from_utf8_lossy(&name.collect::<Vec<_>>()).into_owned(),
        u32::from(flags.cast_unsigned()),
    )))
}

impl Descriptor for Tunnels {
    type Record = Tunnel;
    const KIND: &'static str = "tunnel";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::CharDevice { major: MISC, first: TUN, last: TUN }]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        let refuse = |what: String, why, remedy| Err(HookError::unsupported(what, why, remedy));
        let attached = interface(fd).map_err(|error| HookError::failed("TUNGETIFF", error))?;
        let description = match &attached {
            None => "an unattached tunnel".to_owned(),
            Some((name, flags)) if flags & IFF_PERSIST == 0 => {
                let why = "the interface goes with its last descriptor";
                return refuse(format!("tunnel {name}"), why, "make it persistent (ip tuntap add)");
            }
            Some((name, flags)) if flags & !(SIMPLE | IFF_PERSIST) != 0 => {
                let why = "it has queues or headers that this plugin does not know";
                return refuse(format!("tunnel {name}"), why, "use a plain tun or tap device");
            }
            Some((name, _)) => format!("tunnel {name}"),
        };
        let identity = handle.id.to_string().into();
        Ok(Described { identity, description: description.into(), ..Described::default() })
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Tunnel>> {
        let fd = host.open_handle(object.handles[0].id)?;
        let fd = std::os::fd::AsFd::as_fd(&fd);
        let Some((interface, flags)) =
            interface(fd).map_err(|error| HookError::failed("TUNGETIFF", error))?
        else {
            return Ok(Dumped::new(Tunnel::default()));
        };
        let send_buffer = stasis_plugin_api::socket::ioctl_int(fd, TUNGETSNDBUF)
            .map_err(|error| HookError::failed("TUNGETSNDBUF", error))?;
        Ok(Dumped::new(Tunnel { interface, flags: flags & SIMPLE, send_buffer }))
    }

    fn create(&self, _: &Host<'_>, _: &ObjectInfo, record: &Tunnel) -> Result<Vec<OwnedFd>> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
        let file = file.map_err(|error| HookError::failed("open /dev/net/tun", error))?;
        if record.interface.is_empty() {
            return Ok(vec![file.into()]);
        }
        let failed = |what: &str| {
            HookError::failed(format!("{what} {}", record.interface), io::Error::last_os_error())
        };
        // SAFETY: zeros are a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(record.interface.bytes().take(libc::IFNAMSIZ - 1)) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (record.flags as u16).cast_signed();
        // Without the interface this would make a new one, which is not what the program had.
        // SAFETY: a name that ends with zero.
        if unsafe { libc::if_nametoindex(request.ifr_name.as_ptr()) } == 0 {
            return Err(failed("there is no interface").remedy("make it again: ip tuntap add"));
        }
        // SAFETY: TUNSETIFF reads an ifreq.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
            return Err(failed("TUNSETIFF"));
        }
        // SAFETY: TUNSETSNDBUF reads an int.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETSNDBUF, &raw const record.send_buffer) } < 0 {
            return Err(failed("TUNSETSNDBUF"));
        }
        Ok(vec![file.into()])
    }
}
