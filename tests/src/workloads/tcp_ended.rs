//! Connections that end with the dump (--tcp-close): reads give what there is to the end, writes fail. And a listener with connections
//! that nobody has accepted (--skip-in-flight).

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::ctl::{Ctl, Outcome, same};
use crate::net;

/// Where it listens.
pub const PORT: u16 = 7789;

/// Sets up, waits, checks that the connection is over and the listener is at work.
pub fn run(ctl: &Ctl) -> Outcome {
    let listener = net::listener(&format!("127.0.0.1:{PORT}"), &[])?;
    let (mut one, other) = net::tcp_pair("127.0.0.1:0")?;
    ctl.wait()?;
    one.set_read_timeout(Some(Duration::from_secs(5)))?;
    same("bytes read", one.read(&mut [0; 9])?, 0)?;
    let broken = one.write(b"more").map_err(|error| error.kind());
    same("a write", broken, Err(ErrorKind::BrokenPipe))?;
    drop(other);
    listener.set_nonblocking(true)?;
    let waiting = listener.accept().map(drop).map_err(|error| error.kind());
    same("connections that wait", waiting, Err(ErrorKind::WouldBlock))?;
    let mut client = TcpStream::connect(("127.0.0.1", PORT))?;
    client.write_all(b"new")?;
    let mut buffer = [0; 3];
    listener.set_nonblocking(false)?;
    listener.accept()?.0.read_exact(&mut buffer)?;
    same("from a new client", &buffer, b"new")
}
