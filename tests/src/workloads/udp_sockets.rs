//! UDP sockets: queues read half, with their senders; connected ones; options; several at one port; memberships.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use libc::{IPPROTO_IP, IPPROTO_IPV6, SOL_SOCKET};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::net;

fn next(socket: &UdpSocket) -> io::Result<(Vec<u8>, SocketAddr)> {
    let mut buffer = vec![0; 65_536];
    let (length, from) = socket.recv_from(&mut buffer)?;
    buffer.truncate(length);
    Ok((buffer, from))
}

fn empty(socket: &UdpSocket) -> bool {
    next(socket).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let four = net::udp("127.0.0.1:0", &[])?;
    let any = net::udp("0.0.0.0:0", &[(IPPROTO_IP, libc::IP_PKTINFO, 1)])?;
    let six = net::udp("[::1]:0", &[(IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)])?;
    let dual = net::udp("[::]:0", &[(IPPROTO_IPV6, libc::IPV6_V6ONLY, 0)])?;
    let sender = net::udp("127.0.0.1:0", &[])?;
    let sender_six = net::udp("[::1]:0", &[])?;
    let to = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    for data in [&b"already read"[..], b"one", b"", &[7; 40_000]] {
        sender.send_to(data, four.local_addr()?)?;
    }
    next(&four)?;
    let any_port = any.local_addr()?.port();
    sender.send_to(b"to any", to(any_port))?;
    sender.send_to(b"to another", (Ipv4Addr::new(127, 0, 0, 9), any_port))?;
    sender_six.send_to(b"to six", six.local_addr()?)?;
    sender_six.send_to(b"dual six", (Ipv6Addr::LOCALHOST, dual.local_addr()?.port()))?;
    sender.send_to(b"dual four", to(dual.local_addr()?.port()))?;

    let connected = net::udp("127.0.0.1:0", &[])?;
    connected.connect(sender.local_addr()?)?;
    sender.send_to(b"from the peer", connected.local_addr()?)?;
    connected.send(b"to the peer")?;

    // It may not send any more, but still hears.
    let mute = net::udp("127.0.0.1:0", &[])?;
    mute.connect(sender.local_addr()?)?;
    net::shutdown(&mute, std::net::Shutdown::Write)?;

    // Two at one port: the connected one has a queue of its own.
    let group = [(SOL_SOCKET, libc::SO_REUSEADDR, 1), (SOL_SOCKET, libc::SO_REUSEPORT, 1)];
    let first = net::udp("127.0.0.1:0", &group)?;
    let second = net::udp(&first.local_addr()?.to_string(), &group)?;
    second.connect(sender.local_addr()?)?;
    sender.send_to(b"for the second", second.local_addr()?)?;

    let options = net::udp("0.0.0.0:0", &[])?;
    options.set_broadcast(true)?;
    options.set_multicast_ttl_v4(9)?;
    options.set_multicast_loop_v4(false)?;
    net::set(&options, SOL_SOCKET, libc::SO_PEEK_OFF, 3)?;
    net::set(&options, SOL_SOCKET, libc::SO_RCVBUF, 50_000)?;

    let member = net::udp("0.0.0.0:0", &[])?;
    let group_address = Ipv4Addr::new(239, 7, 7, 7);
    member.join_multicast_v4(&group_address, &Ipv4Addr::LOCALHOST)?;
    let member_port = member.local_addr()?.port();

    let sockets = [&four, &any, &six, &dual, &sender, &connected, &first, &second, &options, &member];
    let addresses = sockets.map(|socket| socket.local_addr().ok());
    let (from, from_six) = (sender.local_addr()?, sender_six.local_addr()?);

    if ctl.wait()? {
        next(&four)?;
    }

    same("addresses", sockets.map(|socket| socket.local_addr().ok()), addresses)?;
    for data in [&b"one"[..], b"", &[7; 40_000]] {
        ensure(next(&four)? == (data.to_vec(), from), "the queue has changed")?;
    }
    same("any", next(&any)?, (b"to any".to_vec(), from))?;
    same("any", next(&any)?, (b"to another".to_vec(), from))?;
    same("six", next(&six)?, (b"to six".to_vec(), from_six))?;
    same("dual", next(&dual)?, (b"dual six".to_vec(), from_six))?;
    let mapped = SocketAddr::from((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), from.port()));
    same("dual", next(&dual)?, (b"dual four".to_vec(), mapped))?;
    same("peer", connected.peer_addr()?, from)?;
    same("connected", next(&connected)?, (b"from the peer".to_vec(), from))?;
    same("sender", next(&sender)?, (b"to the peer".to_vec(), connected.local_addr()?))?;
    same("second", next(&second)?, (b"for the second".to_vec(), from))?;
    for (name, socket) in [("four", &four), ("any", &any), ("dual", &dual), ("first", &first), ("sender", &sender)] {
        ensure(empty(socket), &format!("{name} has more in its queue"))?;
    }
    same("broadcast", options.broadcast()?, true)?;
    same("ttl", options.multicast_ttl_v4()?, 9)?;
    same("loop", options.multicast_loop_v4()?, false)?;
    same("peek offset", net::get(&options, SOL_SOCKET, libc::SO_PEEK_OFF)?, 3)?;
    same("buffer", net::get(&options, SOL_SOCKET, libc::SO_RCVBUF)?, 100_000)?;
    same("reuse", net::get(&four, SOL_SOCKET, libc::SO_REUSEADDR)?, 0)?;
    same("a send that was shut down", mute.send(b"x").map_err(|error| error.kind()), Err(io::ErrorKind::BrokenPipe))?;
    sender.send_to(b"to the mute", mute.local_addr()?)?;
    same("mute", next(&mute)?, (b"to the mute".to_vec(), from))?;
    // They go on working.
    sender.send_to(b"again", four.local_addr()?)?;
    same("again", next(&four)?, (b"again".to_vec(), from))?;
    net::set_bytes(&sender, IPPROTO_IP, libc::IP_MULTICAST_IF, &Ipv4Addr::LOCALHOST.octets())?;
    sender.send_to(b"to the group", (group_address, member_port))?;
    same("group", next(&member)?, (b"to the group".to_vec(), from))?;
    member.leave_multicast_v4(&group_address, &Ipv4Addr::LOCALHOST)?;
    Ok(())
}
