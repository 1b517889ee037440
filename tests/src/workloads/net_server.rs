//! The echo server of `tcp_server` on every address, for tests that connect its net namespace with theirs.

use std::net::TcpListener;

use super::tcp_server::{PORT, serve_all};
use crate::ctl::{Ctl, Outcome};

/// Sets up, waits. What it did, its clients know.
pub fn run(ctl: &Ctl) -> Outcome {
    serve_all(TcpListener::bind(("::", PORT))?);
    ctl.wait().map(drop)
}
