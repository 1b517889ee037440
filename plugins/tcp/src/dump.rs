//! From a live socket to a record.

use crate::{
    CLOSE, ESTABLISHED, SKIP_IN_FLIGHT, connection,
    kernel::{self, Info, state},
    record::stasis::tcp::v1::{Option as Saved, Shape, Socket},
};
use stasis_plugin_api::{
    Dumped, HookError, Host, ObjectInfo, Result,
    socket::{
        self, diag, filter,
        options::{self, IPV4, IPV6, REUSE, SOCKET, Spec},
    },
};
use std::{
    fs,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

/// Options of multicast.
const MULTICAST: [(i32, i32); 8] = [
    (libc::IPPROTO_IP, libc::IP_MULTICAST_IF),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP),
    (libc::IPPROTO_IP, 49),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP),
    (libc::IPPROTO_IPV6, 29),
];

/// The tables of options for a domain.
pub(crate) fn tables(domain: i32, shape: Shape) -> &'static [&'static [Spec]] {
    use kernel::{OPTIONS, UNCONNECTED};
    let connected = matches!(shape, Shape::Connected | Shape::Ended);
    match (domain, connected) {
        (libc::AF_INET6, true) => &[IPV6, IPV4, SOCKET, OPTIONS],
        (libc::AF_INET6, false) => &[IPV6, IPV4, SOCKET, OPTIONS, UNCONNECTED],
        (_, true) => &[IPV4, SOCKET, OPTIONS],
        (_, false) => &[IPV4, SOCKET, OPTIONS, UNCONNECTED],
    }
}

pub(crate) fn dump(host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Socket>> {
    let handle = socket::only_handle(object)?;
    let label = object.description.as_str();
    let (owned, proc) = socket::open(host, object)?;
    let fd = owned.as_fd();
    let failed = |what: &'static str| move |error| HookError::failed(what, error);
    let info = kernel::info(fd)?;
    let events = socket::poll(fd, libc::POLLIN | libc::POLLPRI | libc::POLLRDHUP).map_err(failed("poll"))?;
    refuse_unseen(fd, &info, events, label)?;
    let domain = socket::get_int(fd, libc::SOL_SOCKET, libc::SO_DOMAIN).map_err(failed("SO_DOMAIN"))?;
    refuse_keys(fd, domain, handle.ino, label)?;
    let mut record = Socket {
        domain,
        local: socket::local_address(fd).map_err(failed("getsockname"))?,
        filter: filter::read(fd, label)?,
        filter_locked: filter::is_locked(fd),
        uid: socket::owner(fd, &proc)?,
        ..Socket::default()
    };
    let shape = shape(host, fd, &info, events, label, &record.local)?;
    record.shape = shape.into();
    match shape {
        Shape::Listener => record.backlog = info.backlog,
        Shape::Connecting => record.peer = connecting_to(&proc, handle.ino, label)?,
        _ => {}
    }
    let mut saved = options::read(fd, tables(domain, shape))?;
    saved.extend(options::read(fd, &[REUSE])?);
    // Streams have them, of no use and with differing defaults, but do not let anybody set them.
    saved.retain(|option| !MULTICAST.contains(&(option.level, option.name)));
    let option = |o: options::Saved| Saved { level: o.level, name: o.name, value: o.value };
    record.options = saved.into_iter().map(option).collect();
    if shape == Shape::Connected && !socket::may_administer(&proc)? {
        let why = "it is connected, and its net namespace belongs to a user namespace above its holder's";
        let remedy = "end the connection with --tcp-close, or give the tree a net namespace of its own";
        return Err(HookError::unsupported(label, why, remedy));
    }
    if shape == Shape::Connected {
        // Beyond what the peer's FIN brings about.
        let deaf = events & libc::POLLRDHUP != 0 && !state::fin_received(info.state);
        record.shutdown = deaf.into();
        if !host.is_dry_run() {
            connection::dump(host, object, handle, fd, &mut record)?;
        }
    }
    Ok(Dumped::new(record))
}

/// Refuses what cannot be looked at without taking it away, or not be brought about again.
fn refuse_unseen(fd: BorrowedFd<'_>, info: &Info, events: i16, label: &str) -> Result<()> {
    let refuse = |why: &str, remedy: &str| Err(HookError::unsupported(label, why, remedy));
    if events & libc::POLLERR != 0 {
        return refuse("an error waits to be read from it", "let the program read the error first");
    }
    if events & libc::POLLPRI != 0 && info.state != state::LISTEN {
        return refuse("urgent data wait to be read from it", "let the program read them first");
    }
    if kernel::has_upper_layer(fd) {
        return refuse("an upper layer (TCP_ULP, such as TLS) is attached", "");
    }
    Ok(())
}

/// Refuses sockets whose segments are signed: the keys can be seen in part only (TCP-MD5, RFC 2385), or are counted on (TCP-AO,
/// RFC 5925).
fn refuse_keys(fd: BorrowedFd<'_>, domain: i32, ino: u64, label: &str) -> Result<()> {
    const TCP_AO_INFO: i32 = 40;
    let refuse = |what: &str| {
        let why = format!("{what} is in use on it");
        Err(HookError::unsupported(label, why, "run the program without signed segments"))
    };
    if socket::get_option(fd, libc::IPPROTO_TCP, TCP_AO_INFO, 24).is_ok() {
        return refuse("TCP-AO");
    }
    let told = diag::inet(fd, domain, libc::IPPROTO_TCP, ino)?;
    if told.is_some_and(|told| told.has_md5_keys) { refuse("TCP-MD5") } else { Ok(()) }
}

fn shape(
    host: &Host<'_>,
    fd: BorrowedFd<'_>,
    info: &Info,
    events: i16,
    label: &str,
    local: &[u8],
) -> Result<Shape> {
    let refuse = |why: String, remedy: &str| Err(HookError::unsupported(label, why, remedy));
    match info.state {
        state::LISTEN if info.waiting > 0 && !host.has_option(SKIP_IN_FLIGHT) => refuse(
            format!("{} connections wait to be accepted", info.waiting),
            "let the program accept them first, or leave them out with --skip-in-flight",
        ),
        state::LISTEN => Ok(Shape::Listener),
        state::SYN_SENT => Ok(Shape::Connecting),
        state::CLOSE if events & libc::POLLRDHUP == 0 => Ok(Shape::Single),
        state::CLOSE => {
            let unread = socket::ioctl_int(fd, libc::FIONREAD);
            match unread.map_err(|error| HookError::failed("SIOCINQ", error))? {
                0 => Ok(Shape::Ended),
                unread => refuse(
                    format!("the connection is over, and {unread} bytes of it are not read yet"),
                    "let the program read them first",
                ),
            }
        }
        _ if host.has_option(CLOSE) => Ok(Shape::Ended),
        state if state::CONNECTED.contains(&state) && host.has_option(ESTABLISHED) => Ok(Shape::Connected),
        state if state::CONNECTED.contains(&state) => {
            let peer = socket::peer_address(fd).ok().flatten();
            let peer = peer.map_or_else(|| "its peer".to_owned(), |peer| socket::shown(&peer));
            refuse(
                format!("it is connected from {} to {peer}", socket::shown(local)),
                "keep the connection with --tcp-established, or end it with --tcp-close",
            )
        }
        state => refuse(format!("it is in TCP state {state}"), "try again in a moment"),
    }
}

/// Whom a socket is connecting to; getpeername(2) does not say so yet.
fn connecting_to(proc: &OwnedFd, ino: u64, label: &str) -> Result<Vec<u8>> {
    let find = |name: &str| {
        let text = fs::read_to_string(format!("/proc/self/fd/{}/net/{name}", proc.as_raw_fd())).ok()?;
        Some(socket::table_entry(&text, ino)?.remote)
    };
    find("tcp").or_else(|| find("tcp6")).ok_or_else(|| {
        HookError::unsupported(
            label,
            "it is just being connected to an unknown peer",
            "try again in a moment",
        )
    })
}
