//! TCP connections with both ends in the tree: megabytes unread, unacknowledged and unsent, half closed in every way, in
//! two tasks, over IPv4, IPv6 and mapped addresses.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use libc::{IPPROTO_TCP, SOL_SOCKET};

use crate::ctl::{Ctl, Outcome, changed, ensure, same};
use crate::{net, sys};

const ESTABLISHED: u8 = 1;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE_WAIT: u8 = 8;

/// The state in `struct tcp_info`.
fn state(stream: &TcpStream) -> Outcome<u8> {
    Ok(net::get(stream, IPPROTO_TCP, libc::TCP_INFO)?.to_ne_bytes()[0])
}

/// Writes until nothing fits any more; gives how much that was.
fn stuff(stream: &mut TcpStream, seed: u64) -> Outcome<usize> {
    let data = sys::bytes(seed, 1 << 16);
    stream.set_nonblocking(true)?;
    let mut total = 0;
    loop {
        match stream.write(&data[total % data.len()..]) {
            Ok(length) => total += length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error.into()),
        }
    }
    stream.set_nonblocking(false)?;
    Ok(total)
}

/// Reads exactly what [`stuff`] wrote, from an offset on.
fn unstuff(stream: &mut TcpStream, seed: u64, from: usize, to: usize) -> Outcome {
    let data = sys::bytes(seed, 1 << 16);
    let mut buffer = vec![0; 1 << 16];
    let mut at = from;
    while at < to {
        let place = at % data.len();
        let length = (data.len() - place).min(to - at);
        stream.read_exact(&mut buffer[..length])?;
        if buffer[..length] != data[place..place + length] {
            return Err(changed(format!("data differ somewhere after byte {at} of {to}")));
        }
        at += length;
    }
    Ok(())
}

/// A question and its answer.
fn talk(one: &mut TcpStream, other: &mut TcpStream) -> Outcome {
    one.write_all(b"ping")?;
    let mut buffer = [0; 4];
    other.read_exact(&mut buffer)?;
    same("ping", &buffer, b"ping")?;
    other.write_all(b"pong")?;
    one.read_exact(&mut buffer)?;
    same("pong", &buffer, b"pong")
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let listener = net::listener("127.0.0.1:0", &[(SOL_SOCKET, libc::SO_REUSEADDR, 1)])?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (mut server, _) = listener.accept()?;
    client.set_nodelay(true)?;
    net::set(&client, SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    talk(&mut client, &mut server)?;
    let ends = (client.local_addr()?, client.peer_addr()?);

    let (mut six, mut six_peer) = net::tcp_pair("[::1]:0")?;
    six.write_all(b"over six")?;
    let dual = net::listener("[::]:0", &[(SOL_SOCKET, libc::SO_REUSEADDR, 1)])?;
    let mut mapped = TcpStream::connect(("127.0.0.1", dual.local_addr()?.port()))?;
    let (mut mapped_peer, _) = dual.accept()?;
    mapped_peer.write_all(b"over mapped")?;

    let (mut full, mut half_read) = net::tcp_pair("127.0.0.1:0")?;
    let total = stuff(&mut full, 11)?;
    unstuff(&mut half_read, 11, 0, 1000)?;
    ensure(total > 1 << 20, "too little fits into a connection")?;

    let (mut done, mut reading) = net::tcp_pair("127.0.0.1:0")?;
    done.write_all(b"my last words")?;
    done.shutdown(Shutdown::Write)?;
    reading.write_all(b"go on")?;
    let (mut stuck, mut stuck_peer) = net::tcp_pair("127.0.0.1:0")?;
    let stuck_total = stuff(&mut stuck, 12)?;
    stuck.shutdown(Shutdown::Write)?;
    let (mut deaf, _deaf_peer) = net::tcp_pair("127.0.0.1:0")?;
    deaf.shutdown(Shutdown::Read)?;
    let states = |list: [&TcpStream; 6]| -> Outcome<Vec<u8>> { list.into_iter().map(state).collect() };
    let expected = vec![ESTABLISHED, ESTABLISHED, FIN_WAIT2, CLOSE_WAIT, FIN_WAIT1, ESTABLISHED];
    same("states", states([&client, &full, &done, &reading, &stuck, &deaf])?, expected.clone())?;

    let (mut far, near) = net::tcp_pair("127.0.0.1:0")?;
    let child = ctl.child("other", |ctl| {
        let mut near = near;
        near.write_all(b"from the child")?;
        ctl.wait_as("other")?;
        let mut buffer = [0; 5];
        near.read_exact(&mut buffer)?;
        same("in the child", &buffer, b"hello")?;
        near.write_all(b"bye").map_err(Into::into)
    })?;
    ctl.await_ready("other")?;

    if ctl.wait()? {
        half_read.read_exact(&mut [0; 17])?;
    }

    for stream in [&client, &six, &mapped, &half_read, &reading, &stuck_peer, &far] {
        // A lost connection must not hang the check.
        stream.set_read_timeout(Some(std::time::Duration::from_secs(20)))?;
    }
    far.write_all(b"hello")?;
    let mut words = String::new();
    far.read_to_string(&mut words)?;
    same("far", words.as_str(), "from the childbye")?;
    child.join()?;
    // The child had copies of all ends.
    same("ends", (client.local_addr()?, client.peer_addr()?), ends)?;
    same("states", states([&client, &full, &done, &reading, &stuck, &deaf])?, expected)?;
    same("nodelay", client.nodelay()?, true)?;
    same("keepalive", net::get(&client, SOL_SOCKET, libc::SO_KEEPALIVE)?, 1)?;
    talk(&mut client, &mut server)?;
    let mut buffer = [0; 64];
    let length = six_peer.read(&mut buffer)?;
    same("six", &buffer[..length], b"over six")?;
    talk(&mut six, &mut six_peer)?;
    let length = mapped.read(&mut buffer)?;
    same("mapped", &buffer[..length], b"over mapped")?;
    talk(&mut mapped, &mut mapped_peer)?;

    unstuff(&mut half_read, 11, 1000, total)?;
    talk(&mut full, &mut half_read)?;
    unstuff(&mut stuck_peer, 12, 0, stuck_total)?;
    same("end of the stuck one", stuck_peer.read(&mut buffer)?, 0)?;
    stuck_peer.write_all(b"got it")?;
    let length = stuck.read(&mut buffer)?;
    same("the stuck one reads", &buffer[..length], b"got it")?;
    let mut words = Vec::new();
    reading.read_to_end(&mut words)?;
    same("last words", words, b"my last words".to_vec())?;
    reading.write_all(b"!")?;
    drop(reading);
    let mut words = String::new();
    done.read_to_string(&mut words)?;
    same("what the half closed one reads", words.as_str(), "go on!")?;
    same("the deaf one", deaf.read(&mut buffer)?, 0)?;
    let again = TcpStream::connect(listener.local_addr()?)?;
    drop((again, TcpListener::accept(&listener)?));
    same("reuse", net::get(&listener, SOL_SOCKET, libc::SO_REUSEADDR)?, 1)?;
    same("reuse of the accepted one", net::get(&server, SOL_SOCKET, libc::SO_REUSEADDR)?, 1)
}
