//! As many connections as are asked for by the file `count`, from clients outside, all in one process.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::ctl::{Ctl, Outcome, same};

/// Where it listens.
pub const PORT: u16 = 7790;
/// How many there are.
pub const COUNT: usize = 10_000;

/// Sets up, waits, and answers once on every connection.
pub fn run(ctl: &Ctl) -> Outcome {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let listener = TcpListener::bind(("127.0.0.1", PORT))?;
    // A full queue would make clients wait for a second each.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096)?)?;
    ctl.announce("listening", b"")?;
    let mut clients: Vec<TcpStream> = Vec::with_capacity(COUNT);
    while clients.len() < COUNT {
        clients.push(listener.accept()?.0);
    }
    ctl.wait()?;
    let mut buffer = [0; 4];
    for client in &mut clients {
        client.read_exact(&mut buffer)?;
        client.write_all(&buffer)?;
    }
    same("connections", clients.len(), COUNT)
}
