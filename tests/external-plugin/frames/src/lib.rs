//! A stasis plugin for programs that handle packets themselves: tun and tap devices, and packet sockets with a mapped ring.
//!
//! A descriptor of /dev/net/tun is attached again to its interface, which must be persistent, since others go with their last
//! descriptor. A packet socket gets a new ring, which is brought to the same frame as the old one; the mapping of the ring,
//! wherever a task has it, brings back the frames that the program has not handled yet. Packets that pass between dump and restore
//! are lost, as on any network.

mod diag;
mod ring;
mod socket;
mod tunnel;

use stasis_plugin_api::{export_plugin, register};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
    pub use frames::v1::*;
}

register!(descriptor: tunnel::Tunnels);
register!(descriptor: socket::Sockets);
register!(mapping: ring::Rings);
export_plugin! { name: "frames", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
