//! TCP connections that are on their way: LAST_ACK, CLOSING, SYN_SENT. They are held there by filters that drop what arrives
//! (socket(7), SO_ATTACH_FILTER); when those are taken off, each comes to its end.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use libc::{IPPROTO_TCP, SOL_SOCKET};

use crate::ctl::{Ctl, Fail, Outcome, ensure, poll_until, same};
use crate::net;
use crate::sys::{self, errno_of};

const SYN_SENT: u8 = 2;
const FIN_WAIT2: u8 = 5;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;

fn state(socket: impl AsFd) -> u8 {
    net::get(socket, IPPROTO_TCP, libc::TCP_INFO).map_or(0, |value| value.to_ne_bytes()[0])
}

/// Drops everything that arrives at a socket: `ret #0`.
fn drop_all(socket: impl AsFd) -> Outcome {
    let mut program = [libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 }];
    let filter = libc::sock_fprog { len: 1, filter: program.as_mut_ptr() };
    // SAFETY: sock_fprog is plain data; its padding is not looked at.
    let bytes = unsafe { std::slice::from_raw_parts((&raw const filter).cast::<u8>(), size_of_val(&filter)) };
    net::set_bytes(socket, SOL_SOCKET, libc::SO_ATTACH_FILTER, bytes)
        .map_err(|error| Fail::Absent(format!("attaching a filter: {error}")))
}

fn let_pass(socket: impl AsFd) -> Outcome {
    Ok(net::set(socket, SOL_SOCKET, libc::SO_DETACH_FILTER, 0)?)
}

fn reaches(what: &str, socket: impl AsFd, wanted: u8) -> Outcome {
    poll_until(what, || state(&socket) == wanted)
}

/// The end of what a peer has sent, after these words.
fn ends_with(stream: &mut TcpStream, words: &str) -> Outcome {
    stream.set_read_timeout(Some(Duration::from_secs(15)))?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    same("last words", said.as_str(), words)
}

/// A connect(2) under way, to a listener that hears nothing of it.
fn connecting(to: SocketAddr) -> Outcome<OwnedFd> {
    let domain = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let socket = net::socket(domain, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
    let stream = TcpStream::from(socket);
    same("connect", errno_of(&net::connect(&stream, to)), libc::EINPROGRESS)?;
    Ok(stream.into())
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    // Our FIN does not get through, theirs did.
    let (mut last_ack, mut of_last_ack) = net::tcp_pair("127.0.0.1:0")?;
    of_last_ack.write_all(b"peer's last words")?;
    of_last_ack.shutdown(Shutdown::Write)?;
    reaches("CLOSE_WAIT", &last_ack, CLOSE_WAIT)?;
    reaches("FIN_WAIT2", &of_last_ack, FIN_WAIT2)?;
    drop_all(&of_last_ack)?;
    last_ack.write_all(b"never heard")?;
    last_ack.shutdown(Shutdown::Write)?;
    reaches("LAST_ACK", &last_ack, LAST_ACK)?;
    // Both have sent a FIN, and only the peer's got through.
    let (mut closing, mut of_closing) = net::tcp_pair("[::1]:0")?;
    drop_all(&of_closing)?;
    closing.write_all(b"mine")?;
    closing.shutdown(Shutdown::Write)?;
    of_closing.write_all(b"theirs")?;
    of_closing.shutdown(Shutdown::Write)?;
    reaches("CLOSING", &closing, CLOSING)?;
    let listeners = ["127.0.0.1:0", "[::1]:0"].map(TcpListener::bind);
    let mut connects = Vec::new();
    for listener in listeners {
        let listener = listener?;
        drop_all(&listener)?;
        let connecting = connecting(listener.local_addr()?)?;
        same("a connect under way", state(&connecting), SYN_SENT)?;
        connects.push((listener, connecting));
    }

    let sabotage = ctl.wait()?;

    same("states", (state(&last_ack), state(&closing)), (LAST_ACK, CLOSING))?;
    same("state of the peer", state(&of_last_ack), FIN_WAIT2)?;
    let_pass(&of_last_ack)?;
    let_pass(&of_closing)?;
    if sabotage {
        of_last_ack.shutdown(Shutdown::Read)?;
        last_ack.shutdown(Shutdown::Read)?;
        last_ack.read_exact(&mut [0; 4])?;
    }
    ends_with(&mut of_last_ack, "never heard")?;
    ends_with(&mut last_ack, "peer's last words")?;
    ends_with(&mut of_closing, "mine")?;
    ends_with(&mut closing, "theirs")?;
    reaches("the end", &last_ack, CLOSE)?;
    for (listener, connecting) in connects {
        ensure(sys::readiness(&connecting, libc::POLLOUT)? == 0, "connected without an answer")?;
        let_pass(&listener)?;
        poll_until("the connection is made", || {
            sys::readiness(&connecting, libc::POLLOUT).is_ok_and(|ready| ready != 0)
        })?;
        same("error of the connect", net::get(&connecting, SOL_SOCKET, libc::SO_ERROR)?, 0)?;
        let mut stream = TcpStream::from(connecting);
        stream.write_all(b"hello")?;
        drop(stream);
        ends_with(&mut listener.accept()?.0, "hello")?;
    }
    Ok(())
}
