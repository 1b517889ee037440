//! An echo server on [`PORT`], a thread for each client; for tests whose clients are outside the tree.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use crate::ctl::{Ctl, Outcome};

/// Where it listens.
pub const PORT: u16 = 7788;

fn serve(mut client: TcpStream) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = client.read(&mut buffer) {
        if client.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

/// Accepts clients for as long as the process lives.
pub fn serve_all(listener: TcpListener) {
    std::thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            std::thread::spawn(move || serve(client));
        }
    });
}

/// Sets up, waits. What it did, its clients know.
pub fn run(ctl: &Ctl) -> Outcome {
    serve_all(TcpListener::bind(("127.0.0.1", PORT))?);
    ctl.wait().map(drop)
}
