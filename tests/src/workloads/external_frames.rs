//! A persistent tun interface of the sandbox's network namespace, and a packet socket on it with a mapped ring: frames that
//! nobody has handled, and the place where the kernel goes on. And a tun descriptor that is attached to nothing.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::ctl::{Ctl, Outcome, ensure, poll_until, same};
use crate::sys;

/// The interface.
pub const NAME: &str = "stasistun";

const BLOCK: u32 = 4096;
const FRAME: u32 = 2048;
const FRAMES: u32 = 16;
/// struct tpacket2_hdr: status, length, snaplen, mac and net, ...
const USER: u32 = 1;

// include/uapi/linux/if_tun.h
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const IFF_TUN_NO_PI: i16 = 0x1001;

fn request() -> libc::ifreq {
    // SAFETY: zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
        *to = from.cast_signed();
    }
    request
}

fn tunnel() -> io::Result<OwnedFd> {
    std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").map(Into::into)
}

fn attach(tunnel: &OwnedFd) -> io::Result<()> {
    let mut wanted = request();
    wanted.ifr_ifru.ifru_flags = IFF_TUN_NO_PI;
    // SAFETY: both ioctls read what they are given; the socket is new.
    unsafe {
        sys::cvt(libc::ioctl(tunnel.as_raw_fd(), TUNSETIFF, &raw mut wanted))?;
        sys::cvt(libc::ioctl(tunnel.as_raw_fd(), TUNSETPERSIST, 1))?;
        let socket = OwnedFd::from_raw_fd(sys::cvt(libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0))?);
        let mut up = request();
        up.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
        sys::cvt(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut up))?;
    }
    Ok(())
}

/// A packet socket for IPv4 on the interface, with a ring.
fn packets() -> io::Result<(OwnedFd, *mut u8)> {
    // SAFETY: all arguments live through their calls.
    unsafe {
        let fd = OwnedFd::from_raw_fd(sys::cvt(libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0))?);
        let set = |name: i32, value: &[u32]| {
            let length = size_of_val(value) as libc::socklen_t;
            sys::cvt(libc::setsockopt(fd.as_raw_fd(), libc::SOL_PACKET, name, value.as_ptr().cast(), length))
        };
        set(libc::PACKET_VERSION, &[1])?;
        set(libc::PACKET_RX_RING, &[BLOCK, FRAMES * FRAME / BLOCK, FRAME, FRAMES])?;
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = 0x0800u16.to_be();
        address.sll_ifindex = libc::if_nametoindex(request().ifr_name.as_ptr()) as i32;
        let length = size_of_val(&address) as libc::socklen_t;
        sys::cvt(libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length))?;
        let size = (FRAMES * FRAME) as usize;
        let place = libc::mmap(std::ptr::null_mut(), size, sys::RW, libc::MAP_SHARED, fd.as_raw_fd(), 0);
        if place == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok((fd, place.cast()))
    }
}

/// An IPv4 packet with one byte of contents, to nobody.
fn packet(mark: u8) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 21, 0, 0, 0, 0, 1, 253, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2];
    packet.push(mark);
    packet
}

struct Ring(*mut u8);

impl Ring {
    fn status(&self, frame: u32) -> *mut u32 {
        // SAFETY: a frame of the ring.
        unsafe { self.0.add((frame % FRAMES * FRAME) as usize).cast() }
    }

    fn is_filled(&self, frame: u32) -> bool {
        // SAFETY: the kernel writes it meanwhile.
        unsafe { self.status(frame).read_volatile() & USER != 0 }
    }

    /// The mark of a frame, which goes back to the kernel.
    fn take(&self, frame: u32) -> Outcome<u8> {
        poll_until("a frame arrives", || self.is_filled(frame))?;
        // SAFETY: tp_net is the half word after three words and tp_mac; the packet is within the frame.
        unsafe {
            let net = self.status(frame).cast::<u16>().add(7).read_volatile();
            let mark = self.status(frame).cast::<u8>().add(usize::from(net) + 20).read_volatile();
            self.status(frame).write_volatile(0);
            Ok(mark)
        }
    }
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (tunnel, unattached) = (tunnel()?, tunnel()?);
    attach(&tunnel)?;
    let (socket, ring) = packets()?;
    let ring = Ring(ring);
    for mark in 0..20 {
        sys::write(&tunnel, &packet(mark))?;
        if mark < 18 {
            same("a packet", ring.take(u32::from(mark))?, mark)?;
        }
    }
    poll_until("the last two arrive", || ring.is_filled(19))?;
    let numbers = [tunnel.as_raw_fd(), unattached.as_raw_fd(), socket.as_raw_fd()];

    if ctl.wait()? {
        drop(tunnel);
        return ensure(false, "no tunnel");
    }

    for mark in [18, 19] {
        ensure(ring.is_filled(mark.into()), "a frame is gone")?;
        same("a packet from before", ring.take(mark.into())?, mark)?;
    }
    for mark in 20..60 {
        sys::write(&tunnel, &packet(mark))?;
        same("a packet from after", ring.take(u32::from(mark))?, mark)?;
    }
    attach(&unattached).err().map_or_else(|| ensure(false, "attached twice"), |_| Ok(()))?;
    same("the numbers", [tunnel.as_raw_fd(), unattached.as_raw_fd(), socket.as_fd().as_raw_fd()], numbers)
}
