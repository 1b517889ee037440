//! Socket calls of workloads.

use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Makes a socket.
pub fn socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the descriptor is new.
    unsafe {
        let fd = libc::socket(domain, kind, protocol);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// An option that is an int.
pub fn get(fd: impl AsFd, level: i32, name: i32) -> io::Result<i32> {
    let (mut value, mut length) = (0i32, 4);
    let place = (&raw mut value).cast();
    // SAFETY: the kernel writes at most four bytes.
    let result = unsafe { libc::getsockopt(fd.as_fd().as_raw_fd(), level, name, place, &raw mut length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Sets an option that is an int.
pub fn set(fd: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_bytes(fd, level, name, &value.to_ne_bytes())
}

/// Sets an option.
pub fn set_bytes(fd: impl AsFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let length = value.len() as libc::socklen_t;
    // SAFETY: the kernel reads the slice.
    let result =
        unsafe { libc::setsockopt(fd.as_fd().as_raw_fd(), level, name, value.as_ptr().cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A `sockaddr`.
fn raw(address: SocketAddr) -> Vec<u8> {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut place = (family as u16).to_ne_bytes().to_vec();
    place.extend(address.port().to_be_bytes());
    match address.ip() {
        IpAddr::V4(host) => place.extend(host.octets()),
        IpAddr::V6(host) => place.extend([&[0; 4][..], &host.octets()].concat()),
    }
    place.resize(28, 0);
    place
}

/// bind(2).
pub fn bind(fd: &OwnedFd, address: SocketAddr) -> io::Result<()> {
    let place = raw(address);
    // SAFETY: the kernel reads the vector.
    let result = unsafe { libc::bind(fd.as_raw_fd(), place.as_ptr().cast(), place.len() as libc::socklen_t) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// connect(2).
pub fn connect(fd: impl AsFd, address: SocketAddr) -> io::Result<()> {
    let (place, fd) = (raw(address), fd.as_fd().as_raw_fd());
    // SAFETY: the kernel reads the vector.
    let result = unsafe { libc::connect(fd, place.as_ptr().cast(), place.len() as libc::socklen_t) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// shutdown(2) of any socket.
pub fn shutdown(fd: impl AsFd, how: Shutdown) -> io::Result<()> {
    let how = match how {
        Shutdown::Read => libc::SHUT_RD,
        Shutdown::Write => libc::SHUT_WR,
        Shutdown::Both => libc::SHUT_RDWR,
    };
    // SAFETY: no pointers.
    let result = unsafe { libc::shutdown(fd.as_fd().as_raw_fd(), how) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets options, binds and (for streams) listens.
pub fn bound(kind: i32, address: SocketAddr, options: &[(i32, i32, i32)]) -> io::Result<OwnedFd> {
    use nix::sys::socket::{Backlog, listen};
    let domain = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let fd = socket(domain, kind, 0)?;
    for &(level, name, value) in options {
        set(&fd, level, name, value)?;
    }
    bind(&fd, address)?;
    if kind == libc::SOCK_STREAM {
        listen(&fd, Backlog::new(7)?)?;
    }
    Ok(fd)
}

/// A listening socket.
pub fn listener(address: &str, options: &[(i32, i32, i32)]) -> io::Result<TcpListener> {
    let address = address.parse().map_err(io::Error::other)?;
    bound(libc::SOCK_STREAM, address, options).map(Into::into)
}

/// A UDP socket.
pub fn udp(address: &str, options: &[(i32, i32, i32)]) -> io::Result<UdpSocket> {
    let address = address.parse().map_err(io::Error::other)?;
    let socket = UdpSocket::from(bound(libc::SOCK_DGRAM, address, options)?);
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Both ends of a connection over the loopback device: the one that connected, and the accepted one.
pub fn tcp_pair(address: &str) -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind(address)?;
    let one = TcpStream::connect(listener.local_addr()?)?;
    Ok((one, listener.accept()?.0))
}
