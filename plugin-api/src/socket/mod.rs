//! What plugins for sockets share: raw calls, one table of options, queues of datagrams, packets put back.
//!
//! Everything works on a descriptor in the calling process, which on dump is a duplicate of the tree's.

pub mod datagrams;
pub mod diag;
pub mod filter;
pub mod inject;
pub mod multicast;
pub mod options;

use crate::{Descriptor, HandleInfo, HookError, Host, ObjectInfo, Result};
use std::{
    fs::{self, File},
    io,
    net::IpAddr,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

/// `SIOCGSKNS` (linux/sockios.h): the net namespace of a socket.
const SIOCGSKNS: libc::c_ulong = 0x894c;

/// An option, of at most `size` bytes; the kernel says how many it has.
pub fn get_option(fd: BorrowedFd<'_>, level: i32, name: i32, size: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0u8; size];
    let mut length = size as libc::socklen_t;
    let place = value.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most `length` bytes to a buffer of that size.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, place, &raw mut length) })?;
    value.truncate(length as usize);
    Ok(value)
}

/// An option that is an `int`.
pub fn get_int(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let value = get_option(fd, level, name, 4)?;
    value.try_into().map(i32::from_ne_bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Sets an option.
pub fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let length = value.len() as libc::socklen_t;
    // SAFETY: the kernel reads `value.len()` bytes from the slice.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), length) }).map(drop)
}

/// Sets an option that is an `int`.
pub fn set_int(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_option(fd, level, name, &value.to_ne_bytes())
}

/// Makes a socket that execve(2) closes.
pub fn socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The `sockaddr` that it is bound to.
pub fn local_address(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    address(|place, length| {
        // SAFETY: as `address` promises.
        unsafe { libc::getsockname(fd.as_raw_fd(), place, length) }
    })
}

/// The `sockaddr` that it is connected to, if it is.
pub fn peer_address(fd: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    let result = address(|place, length| {
        // SAFETY: as `address` promises.
        unsafe { libc::getpeername(fd.as_raw_fd(), place, length) }
    });
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => Ok(None),
        other => other.map(Some),
    }
}

/// `ask` gets room for an address and its length.
fn address(ask: impl FnOnce(*mut libc::sockaddr, *mut libc::socklen_t) -> i32) -> io::Result<Vec<u8>> {
    let mut place = [0u8; 128];
    let mut length = place.len() as libc::socklen_t;
    check(ask(place.as_mut_ptr().cast(), &raw mut length))?;
    Ok(place.get(..length as usize).unwrap_or(&place).to_vec())
}

/// bind(2) to a `sockaddr`.
pub fn bind(fd: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    let length = address.len() as libc::socklen_t;
    // SAFETY: the kernel reads `address.len()` bytes.
    check(unsafe { libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), length) }).map(drop)
}

/// connect(2) to a `sockaddr`.
pub fn connect(fd: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    let length = address.len() as libc::socklen_t;
    // SAFETY: the kernel reads `address.len()` bytes.
    check(unsafe { libc::connect(fd.as_raw_fd(), address.as_ptr().cast(), length) }).map(drop)
}

/// listen(2).
pub fn listen(fd: BorrowedFd<'_>, backlog: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::listen(fd.as_raw_fd(), backlog) }).map(drop)
}

/// shutdown(2).
pub fn shutdown(fd: BorrowedFd<'_>, how: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::shutdown(fd.as_raw_fd(), how) }).map(drop)
}

/// An ioctl(2) that gives a number, e.g. `SIOCINQ`.
pub fn ioctl_int(fd: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<i32> {
    let mut value = 0;
    // SAFETY: used with requests that write one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) })?;
    Ok(value)
}

/// poll(2) without waiting.
pub fn poll(fd: BorrowedFd<'_>, events: i16) -> io::Result<i16> {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one valid entry.
    check(unsafe { libc::poll(&raw mut entry, 1, 0) })?;
    Ok(entry.revents)
}

/// The result of a system call that gives -1 for an error.
pub fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The port of a `sockaddr_in` or `sockaddr_in6`; 0 for anything else.
pub fn port(address: &[u8]) -> u16 {
    match (family(address), address.get(2..4)) {
        (libc::AF_INET | libc::AF_INET6, Some(port)) => u16::from_be_bytes([port[0], port[1]]),
        _ => 0,
    }
}

/// The address family of a `sockaddr`, or `AF_UNSPEC`.
pub fn family(address: &[u8]) -> i32 {
    match address.get(..2) {
        Some(family) => i32::from(u16::from_ne_bytes([family[0], family[1]])),
        None => libc::AF_UNSPEC,
    }
}

/// The host of an internet `sockaddr`.
pub fn host(address: &[u8]) -> Option<std::net::IpAddr> {
    let bytes = |from: usize, to: usize| address.get(from..to);
    match family(address) {
        libc::AF_INET => <[u8; 4]>::try_from(bytes(4, 8)?).ok().map(Into::into),
        libc::AF_INET6 => <[u8; 16]>::try_from(bytes(8, 24)?).ok().map(Into::into),
        _ => None,
    }
}

/// An internet `sockaddr` for messages: `192.0.2.1:80`.
pub fn shown(address: &[u8]) -> String {
    match host(address) {
        Some(host) => std::net::SocketAddr::new(host, port(address)).to_string(),
        None => format!("an address of family {}", family(address)),
    }
}

/// What a table such as /proc/net/tcp, udp or raw says of a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableEntry {
    /// The peer, as a `sockaddr`; all zeros if there is none.
    pub remote: Vec<u8>,
    /// net/tcp_states.h, also for sockets of other protocols.
    pub state: u32,
}

/// The entry of inode `ino` in the text of such a table.
pub fn table_entry(text: &str, ino: u64) -> Option<TableEntry> {
    text.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.get(9)?.parse() != Ok(ino) {
            return None;
        }
        Some(TableEntry {
            remote: table_address(words.get(2)?)?,
            state: u32::from_str_radix(words.get(3)?, 16).ok()?,
        })
    })
}

/// `HOST:PORT` in hexadecimal; the host in words of 32 bits in the machine's byte order.
fn table_address(text: &str) -> Option<Vec<u8>> {
    let (host, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?.to_be_bytes();
    let word = |at: usize| u32::from_str_radix(host.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    let host: Vec<u8> = (0..host.len()).step_by(8).map(word).collect::<Option<Vec<_>>>()?.concat();
    let mut address = match host.len() {
        4 => (libc::AF_INET as u16).to_ne_bytes().to_vec(),
        16 => (libc::AF_INET6 as u16).to_ne_bytes().to_vec(),
        _ => return None,
    };
    address.extend(port);
    if host.len() == 16 {
        address.extend([0; 4]);
    }
    address.extend(&host);
    address.resize(if host.len() == 16 { 28 } else { 16 }, 0);
    Some(address)
}

/// A task whose namespaces are those of the object; an object that is only in flight is taken for the root's.
pub fn holder(host: &Host<'_>, object: &ObjectInfo) -> Result<i32> {
    let of_handles = object.handles.iter().find_map(|handle| handle.holders.first()).map(|holder| holder.pid);
    let of_tree = || host.tasks().first().map(|task| task.pid);
    of_handles.or_else(of_tree).ok_or_else(|| HookError::invalid("the tree has no task"))
}

/// The net namespace of a socket.
pub fn namespace(fd: BorrowedFd<'_>) -> Result<File> {
    // SAFETY: the request takes no argument.
    let result = check(unsafe { libc::ioctl(fd.as_raw_fd(), SIOCGSKNS) });
    let fd = result.map_err(|e| HookError::failed("SIOCGSKNS", e).remedy("needs CAP_NET_ADMIN"))?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Does something in a net namespace, by a thread that enters it and ends.
pub fn in_namespace<T: Send + 'static>(
    namespace: &File,
    job: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    if namespace.metadata()?.ino() == fs::metadata("/proc/self/ns/net")?.ino() {
        return job();
    }
    let namespace = namespace.try_clone()?;
    let enter = move || {
        // SAFETY: changes this thread alone, which ends below.
        check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) })?;
        job()
    };
    std::thread::spawn(enter).join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
}

/// Whether a task whose /proc/PID is `proc` can have CAP_NET_ADMIN in its net namespace when it is restored: that is owned by its
/// user namespace or one below (user_namespaces(7)), or its user namespace is ours, so that it is restored with our powers.
pub fn may_administer(proc: &OwnedFd) -> Result<bool> {
    const NS_GET_USERNS: libc::c_ulong = 0xb701;
    const NS_GET_PARENT: libc::c_ulong = 0xb702;
    let failed = |error| HookError::failed("looking at the owner of a net namespace", error);
    let open = |name: &str| File::open(format!("/proc/self/fd/{}/ns/{name}", proc.as_raw_fd()));
    let number = |file: &File| Ok::<_, HookError>(file.metadata().map_err(failed)?.ino());
    let above = |file: &File, request| {
        // SAFETY: the requests take no argument.
        let fd = check(unsafe { libc::ioctl(file.as_raw_fd(), request) })?;
        // SAFETY: the kernel just gave us this descriptor.
        Ok::<_, io::Error>(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
    };
    let user = number(&open("user").map_err(failed)?)?;
    if user == fs::metadata("/proc/self/ns/user").map_err(failed)?.ino() {
        return Ok(true);
    }
    let mut owner = above(&open("net").map_err(failed)?, NS_GET_USERNS);
    // Above ours nothing can be seen (EPERM).
    while let Ok(namespace) = owner {
        if number(&namespace)? == user {
            return Ok(true);
        }
        owner = above(&namespace, NS_GET_PARENT);
    }
    Ok(false)
}

/// Refuses a socket of another net namespace than that of its holder, whose /proc/PID is `proc`.
fn check_namespace(fd: BorrowedFd<'_>, proc: &OwnedFd, label: &str) -> Result<()> {
    let failed = |error| HookError::failed("stat of a net namespace", error);
    let socket = namespace(fd)?.metadata().map_err(failed)?.ino();
    let path = format!("/proc/self/fd/{}/ns/net", proc.as_raw_fd());
    let task = fs::metadata(path).map_err(failed)?.ino();
    if socket == task {
        return Ok(());
    }
    let why = format!("it belongs to net:[{socket}], and its holder is in net:[{task}]");
    Err(HookError::unsupported(label, why, ""))
}

/// The owner of a socket (fstat(2)) as an id of the user namespace of the task whose /proc/PID is `proc`. The kernel
/// lets sockets of one owner alone share a port.
pub fn owner(fd: BorrowedFd<'_>, proc: &OwnedFd) -> Result<Option<u32>> {
    let failed = |error| HookError::failed("reading the owner of a socket", error);
    let file = fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(failed)?;
    let map = format!("/proc/self/fd/{}/uid_map", proc.as_raw_fd());
    Ok(inside(&fs::read_to_string(map).map_err(failed)?, file.uid()))
}

/// An id of our user namespace as one of the namespace that an id map (user_namespaces(7)) belongs to.
pub fn inside(map: &str, outside: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u32>().ok());
        let (first, start, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let offset = outside.checked_sub(start).filter(|offset| *offset < count)?;
        first.checked_add(offset)
    })
}

/// Gives a socket to its owner.
pub fn give_to(fd: BorrowedFd<'_>, uid: u32) -> Result<()> {
    let is = fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    if is.is_ok_and(|file| file.uid() == uid) {
        return Ok(());
    }
    std::os::unix::fs::fchown(fd, Some(uid), None)
        .map_err(|error| HookError::failed(format!("giving a socket to uid {uid}"), error))
}

/// The one handle of a socket.
pub fn only_handle(object: &ObjectInfo) -> Result<&HandleInfo> {
    match &object.handles[..] {
        [handle] => Ok(handle),
        handles => Err(HookError::invalid(format!("a socket with {} handles", handles.len()))),
    }
}

/// A socket of the frozen tree, and /proc/PID of a task that has it and is in the socket's own net namespace; refused if there is none.
pub fn open(host: &Host<'_>, object: &ObjectInfo) -> Result<(OwnedFd, OwnedFd)> {
    let fd = host.open_handle(only_handle(object)?.id)?;
    let proc = host.open_proc(holder(host, object)?)?;
    check_namespace(fd.as_fd(), &proc, object.description.as_str())?;
    Ok((fd, proc))
}

/// An address from its octets, as records have them.
pub fn ip_address(octets: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(octets).ok().map(IpAddr::from);
    v4().or_else(|| <[u8; 16]>::try_from(octets).ok().map(IpAddr::from))
}

/// What [`Descriptor::describe`] says of a socket that is an object of its own.
pub fn describe<D: Descriptor>(handle: &HandleInfo) -> crate::Described {
    crate::Described {
        identity: handle.ino.to_string().into(),
        description: format!("socket:[{}] ({})", handle.ino, D::KIND).into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remote_addresses_of_the_tables() {
        let line =
            "   0: 0100007F:C350 0200007F:0050 02 00000001:00000000 01:0000005F 00000000  0  0 4711 2 0";
        let entry = table_entry(line, 4711).unwrap();
        assert_eq!((shown(&entry.remote).as_str(), entry.state), ("127.0.0.2:80", 2));
        assert_eq!(table_entry(line, 4712), None);
        let line = "   0: 00000000000000000000000001000000:C350 B80D0120000000000000000001000000:0050 02 00000001:00000000 01:0000005F 00000000  0  0 1 2 0";
        assert_eq!(shown(&table_entry(line, 1).unwrap().remote), "[2001:db8::1]:80");
    }
}
