//! TCP sockets that are not connected: listening ones of every kind, groups that share a port, bound and unbound ones
//! with options, and one whose connection is over.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use libc::{IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, SOL_SOCKET};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::net;

/// Options and values of the unbound socket.
const OPTIONS: [(i32, i32, i32); 14] = [
    (SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    (SOL_SOCKET, libc::SO_REUSEADDR, 1),
    (SOL_SOCKET, libc::SO_REUSEPORT, 1),
    (SOL_SOCKET, libc::SO_OOBINLINE, 1),
    (SOL_SOCKET, libc::SO_RCVLOWAT, 99),
    (IPPROTO_TCP, libc::TCP_NODELAY, 1),
    (IPPROTO_TCP, libc::TCP_KEEPIDLE, 77),
    (IPPROTO_TCP, libc::TCP_KEEPINTVL, 11),
    (IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 54_321),
    (IPPROTO_TCP, libc::TCP_MAXSEG, 1000),
    (IPPROTO_IP, libc::IP_TOS, 0x10),
    (IPPROTO_IP, libc::IP_TTL, 33),
    (IPPROTO_IP, libc::IP_FREEBIND, 1),
    (SOL_SOCKET, libc::SO_PRIORITY, 4),
];

/// A listener still answers: somebody connects and is accepted.
fn answers(listener: &TcpListener, to: SocketAddr) -> Outcome {
    let mut client = TcpStream::connect(to)?;
    let (mut served, _) = listener.accept()?;
    client.write_all(b"hello")?;
    let mut buffer = [0; 5];
    served.read_exact(&mut buffer)?;
    // Whoever closes first keeps its port busy for a minute.
    drop(client);
    same("end", served.read(&mut buffer)?, 0)?;
    same("what the listener got", &buffer, b"hello")
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let plain = net::listener("127.0.0.1:0", &[])?;
    let any = net::listener("0.0.0.0:0", &[(SOL_SOCKET, libc::SO_REUSEADDR, 1)])?;
    let free = net::listener("192.0.2.77:0", &[(IPPROTO_IP, libc::IP_FREEBIND, 1)])?;
    let dual = net::listener("[::]:0", &[])?;
    let v6only = [(IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)];
    let six = net::listener("[::]:0", &v6only)?;
    // The same port for the other family alone.
    let four = net::listener(&format!("0.0.0.0:{}", six.local_addr()?.port()), &[])?;
    let group = [(SOL_SOCKET, libc::SO_REUSEPORT, 1)];
    let first = net::listener("127.0.0.1:0", &group)?;
    let shared = first.local_addr()?;
    let second = net::listener(&shared.to_string(), &group)?;
    let device = net::socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    net::set_bytes(&device, SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo\0")?;

    let unbound = net::socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    for (level, name, value) in OPTIONS {
        net::set(&unbound, level, name, value)?;
    }
    let bound = net::socket(libc::AF_INET6, libc::SOCK_STREAM, 0)?;
    let address: SocketAddr = "[::1]:0".parse().map_err(std::io::Error::other)?;
    net::bind(&bound, address)?;
    let name = |fd: &OwnedFd| -> Outcome<u16> {
        Ok(TcpListener::from(fd.try_clone()?).local_addr()?.port())
    };
    let bound_port = name(&bound)?;
    let (mut over, peer) = net::tcp_pair("127.0.0.1:0")?;
    over.shutdown(Shutdown::Write)?;
    drop(peer);
    same("at the end", over.read(&mut [0; 8])?, 0)?;

    let addresses = [&plain, &any, &free, &dual, &six, &four, &first, &second].map(|l| l.local_addr());
    let addresses: Vec<SocketAddr> = addresses.into_iter().collect::<std::io::Result<_>>()?;
    // One of the group, and the plain one too, are in a child.
    let child = ctl.child("other", |ctl| {
        drop(first.try_clone()?);
        ctl.wait_as("other")?;
        same("address in the child", plain.local_addr()?, addresses[0])
    })?;
    ctl.await_ready("other")?;

    if ctl.wait()? {
        net::set(&unbound, IPPROTO_TCP, libc::TCP_KEEPIDLE, 78)?;
    }

    child.join()?;
    for (listener, address) in [&plain, &any, &free, &dual, &six, &four, &first, &second].into_iter().zip(addresses) {
        same("address", listener.local_addr()?, address)?;
    }
    for (level, option, value) in OPTIONS {
        same(&format!("option {level}, {option}"), net::get(&unbound, level, option)?, value)?;
    }
    same("v6only", net::get(&six, IPPROTO_IPV6, libc::IPV6_V6ONLY)?, 1)?;
    same("dual", net::get(&dual, IPPROTO_IPV6, libc::IPV6_V6ONLY)?, 0)?;
    same("reuse of any", net::get(&any, SOL_SOCKET, libc::SO_REUSEADDR)?, 1)?;
    same("reuse of plain", net::get(&plain, SOL_SOCKET, libc::SO_REUSEADDR)?, 0)?;
    same("group", net::get(&second, SOL_SOCKET, libc::SO_REUSEPORT)?, 1)?;
    let mut index = net::get(&device, SOL_SOCKET, 62)?;
    same("device", std::mem::take(&mut index), 1)?;
    same("bound port", name(&bound)?, bound_port)?;
    same("still at the end", over.read(&mut [0; 8])?, 0)?;
    ensure(over.write(b"x").is_err(), "an ended connection takes data")?;
    answers(&plain, plain.local_addr()?)?;
    answers(&any, ([127, 0, 0, 1], any.local_addr()?.port()).into())?;
    answers(&dual, ([127, 0, 0, 1], dual.local_addr()?.port()).into())?;
    answers(&six, (std::net::Ipv6Addr::LOCALHOST, six.local_addr()?.port()).into())?;
    answers(&four, ([127, 0, 0, 1], four.local_addr()?.port()).into())?;
    // A third may still join the group, and nobody else may take the port.
    drop(net::listener(&shared.to_string(), &group)?);
    ensure(TcpListener::bind(shared).is_err(), "the port of the group is free for everybody")
}
