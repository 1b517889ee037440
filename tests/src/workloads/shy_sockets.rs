//! A listening and a connected TCP socket, and a bound UDP one.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};

use crate::ctl::{Ctl, Outcome, same};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (mut server, _) = listener.accept()?;
    let udp = UdpSocket::bind("127.0.0.1:0")?;
    client.write_all(b"hello")?;
    let address = udp.local_addr()?;

    if ctl.wait()? {
        client.write_all(b"!")?;
        drop(server);
        return Err(crate::ctl::changed("spoilt".into()));
    }

    let mut got = [0; 5];
    server.read_exact(&mut got)?;
    same("data", &got, b"hello")?;
    same("address", udp.local_addr()?, address)?;
    let _again = TcpStream::connect(listener.local_addr()?)?;
    Ok(())
}
