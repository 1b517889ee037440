//! Tun and tap devices with their descriptors: one that goes with it, one that stays, and a descriptor of none yet.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use nix::sched::{CloneFlags, unshare};

use super::net_namespace::ip;
use crate::ctl::{Ctl, Fail, Outcome, ensure, poll_until, same};
use crate::sys::cvt;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETSNDBUF: libc::c_ulong = 0x4004_54d4;
const TUNGETSNDBUF: libc::c_ulong = 0x8004_54d3;
const TUN: i16 = 1;
const TAP: i16 = 2;
const NO_PI: i16 = 0x1000;

fn open() -> Outcome<File> {
    if !Path::new("/dev/net/tun").exists() {
        return Err(Fail::Absent("/dev/net/tun".into()));
    }
    match OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        // In a user namespace, where the machine lets root alone have it.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Err(Fail::Absent("/dev/net/tun".into())),
        other => Ok(other?),
    }
}

fn take(file: &File, name: &str, flags: i16) -> Outcome {
    // SAFETY: zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: the kernel reads and writes one ifreq.
    cvt(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
    Ok(())
}

fn send_buffer(file: &File, set: Option<i32>) -> Outcome<i32> {
    let mut value = set.unwrap_or_default();
    let request = if set.is_some() { TUNSETSNDBUF } else { TUNGETSNDBUF };
    // SAFETY: one int.
    cvt(unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) })?;
    Ok(value)
}

/// A packet that leaves by the device comes out of the descriptor.
fn passes(file: &mut File, header: usize) -> Outcome {
    nix::fcntl::fcntl(file.as_fd(), nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
    let socket = UdpSocket::bind("10.9.0.1:0")?;
    let mut found = false;
    poll_until("a packet comes out of a tun device", || {
        let _ = socket.send_to(b"through the tunnel", ("10.9.0.2", 7));
        let mut buffer = [0; 2000];
        while let Ok(length) = file.read(&mut buffer) {
            // The header of the device, IPv4, UDP.
            let packet = buffer.get(header..length).unwrap_or_default();
            found |= packet.first() == Some(&0x45) && packet.get(28..) == Some(b"through the tunnel");
        }
        found
    })
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    unshare(CloneFlags::CLONE_NEWNET)?;
    let (mut tun, tap, none) = (open()?, open()?, open()?);
    take(&tun, "tun7", TUN)?;
    take(&tap, "tap7", TAP | NO_PI)?;
    // SAFETY: no pointer.
    cvt(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETPERSIST, 1) })?;
    send_buffer(&tap, Some(77_000))?;
    // The header is two words of flags and protocol.
    for line in ["link set tun7 up", "addr add 10.9.0.1/24 dev tun7", "link set tap7 address 02:00:00:00:00:77"] {
        ip(line)?;
    }
    // The kernel calls a carrier UNKNOWN that was never without.
    let shown = |arguments| Ok::<_, Fail>(ip(arguments)?.replace("UNKNOWN", "UP").replace(" tentative", ""));
    let look = || Ok::<_, Fail>([shown("-d link show tun7")?, shown("-d link show tap7")?, shown("addr show tun7")?]);
    let before = look()?;

    if ctl.wait()? {
        take(&none, "tun8", TUN)?;
    }

    same("the devices", look()?, before)?;
    same("the send buffer", send_buffer(&tap, None)?, 77_000)?;
    passes(&mut tun, 4)?;
    // SAFETY: room for one ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes it.
    let asked = unsafe { libc::ioctl(none.as_raw_fd(), TUNGETIFF, &raw mut request) };
    ensure(asked < 0, "the third descriptor has a device")?;
    drop((tun, tap));
    // They go a moment after their descriptors.
    poll_until("a device goes with its descriptor", || ip("link show tun7").is_err())?;
    ensure(ip("link show tap7").is_ok(), "the persistent device went with its descriptor")
}
