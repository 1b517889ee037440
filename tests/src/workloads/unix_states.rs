//! Half-closed and closed connections, pending resets, socket options, filters, and lines that are not read yet.

use std::os::fd::{AsRawFd, OwnedFd};

use libc::{SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::{sys, unix};

fn shut(fd: &OwnedFd, how: i32) -> std::io::Result<()> {
    // SAFETY: no pointers.
    sys::cvt(unsafe { libc::shutdown(fd.as_raw_fd(), how) }).map(drop)
}

/// Options with values that no socket has by itself.
#[rustfmt::skip]
const OPTIONS: [(i32, &[u8]); 12] = [
    (libc::SO_SNDBUF, &30_000i32.to_ne_bytes()), (libc::SO_RCVBUF, &50_000i32.to_ne_bytes()),
    (libc::SO_PASSCRED, &1i32.to_ne_bytes()), (libc::SO_PRIORITY, &5i32.to_ne_bytes()),
    (libc::SO_RCVLOWAT, &3i32.to_ne_bytes()), (libc::SO_PEEK_OFF, &2i32.to_ne_bytes()),
    (libc::SO_TIMESTAMP, &1i32.to_ne_bytes()), (libc::SO_KEEPALIVE, &1i32.to_ne_bytes()),
    (34 /* SO_PASSSEC */, &1i32.to_ne_bytes()), (76 /* SO_PASSPIDFD */, &1i32.to_ne_bytes()),
    (libc::SO_LINGER, &[1, 0, 0, 0, 7, 0, 0, 0]),
    (66 /* SO_RCVTIMEO_NEW */, &[9, 0, 0, 0, 0, 0, 0, 0, 0, 0x12, 0x0a, 0, 0, 0, 0, 0]),
];

fn options(socket: &OwnedFd) -> Vec<Option<Vec<u8>>> {
    // Not every kernel has each of them, and room for 16 bytes shows all of any.
    OPTIONS.iter().map(|(name, _)| unix::option(socket, *name, 16).ok()).collect()
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let address = unix::path(&ctl.work("socket"));
    let listener = unix::listener(SOCK_STREAM, &address, 9)?;
    let connection = || Ok::<_, std::io::Error>((unix::client(SOCK_STREAM, &address)?, unix::accept(&listener)?));
    // Half-closed, in either direction.
    let (half, half_peer) = connection()?;
    unix::send(&half, &[], b"all I had", &[])?;
    shut(&half, libc::SHUT_WR)?;
    let (deaf, deaf_peer) = unix::pair(SOCK_STREAM)?;
    shut(&deaf, libc::SHUT_RD)?;
    let mute = unix::new(SOCK_DGRAM)?;
    shut(&mute, libc::SHUT_WR)?;
    // Closed, with and without something that was never read.
    let (reset, closed) = connection()?;
    unix::send(&closed, &[], b"before the end", &[])?;
    unix::send(&reset, &[], b"unread", &[])?;
    drop(closed);
    let (lost_client, closed) = connection()?;
    drop(closed);
    let (closed, lost_accepted) = connection()?;
    unix::send(&closed, &[], b"bye", &[])?;
    drop(closed);
    let (lost_packet, closed) = unix::pair(SOCK_SEQPACKET)?;
    unix::send(&closed, &[], b"one", &[])?;
    unix::send(&closed, &[], b"two", &[])?;
    drop(closed);
    // Options and a filter that cuts datagrams to three bytes.
    let (odd, odd_peer) = unix::pair(SOCK_STREAM)?;
    for (name, value) in OPTIONS {
        match unix::set_option(&odd, name, value) {
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {}
            result => result?,
        }
    }
    unix::send(&odd_peer, &[], b"abcdef", &[])?;
    let set = options(&odd);
    let (cut, cut_peer) = unix::pair(SOCK_DGRAM)?;
    let mut program = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: 3 }];
    let filter = libc::sock_fprog { len: 1, filter: program.as_mut_ptr() };
    // SAFETY: plain data of that size.
    let bytes = unsafe { std::slice::from_raw_parts((&raw const filter).cast::<u8>(), size_of_val(&filter)) };
    unix::send(&cut_peer, &[], b"whole", &[])?;
    unix::set_option(&cut, libc::SO_ATTACH_FILTER, bytes)?;
    // Much that waits.
    let much = sys::bytes(7, 1_000_000);
    let (full, full_peer) = unix::pair(SOCK_STREAM)?;
    let mut sent = 0;
    while let Ok(n) = unix::send(&full_peer, &[], &much[sent..], &[]) {
        sent += n;
    }

    if ctl.wait()? {
        shut(&deaf_peer, libc::SHUT_WR)?;
        unix::data(&cut)?;
    }

    same("all I had", unix::data(&half_peer)?, b"all I had".to_vec())?;
    ensure(unix::data(&half_peer)?.is_empty(), "a half-closed connection is at its end")?;
    unix::send(&half_peer, &[], b"the other way", &[])?;
    same("the other way", unix::data(&half)?, b"the other way".to_vec())?;
    same("half", sys::errno_of(&unix::send(&half, &[], b"x", &[])), libc::EPIPE)?;
    same("deaf", sys::errno_of(&unix::send(&deaf_peer, &[], b"x", &[])), libc::EPIPE)?;
    unix::send(&deaf, &[], b"speaks", &[])?;
    same("speaks", unix::data(&deaf_peer)?, b"speaks".to_vec())?;
    same("mute", sys::errno_of(&unix::send(&mute, &address, b"x", &[])), libc::EPIPE)?;

    same("name of who closed", unix::peer_name(&reset)?, address.clone())?;
    same("before the end", sys::read(&reset, 14)?, b"before the end".to_vec())?;
    same("reset", sys::errno_of(&sys::read(&reset, 1)), libc::ECONNRESET)?;
    ensure(unix::data(&reset)?.is_empty(), "after a reset comes the end")?;
    ensure(unix::data(&lost_client)?.is_empty(), "a client whose server closed is at its end")?;
    same("name of who closed", unix::peer_name(&lost_client)?, address.clone())?;
    same("bye", unix::data(&lost_accepted)?, b"bye".to_vec())?;
    ensure(unix::data(&lost_accepted)?.is_empty(), "a server whose client closed is at its end")?;
    same("name of the accepted", unix::name(&lost_accepted)?, address)?;
    for text in [&b"one"[..], b"two", b""] {
        same("packet", unix::data(&lost_packet)?, text.to_vec())?;
    }

    same("options", options(&odd), set)?;
    let mut two = [0u8; 2];
    let peek = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: room for two bytes.
    sys::cvt_long(unsafe { libc::recv(odd.as_raw_fd(), two.as_mut_ptr().cast(), 2, peek) } as i64)?;
    same("what is seen from offset 2", &two, b"cd")?;
    same("whole", unix::data(&cut)?, b"whole".to_vec())?;
    unix::send(&cut_peer, &[], b"whole", &[])?;
    same("cut by the filter", unix::data(&cut)?, b"who".to_vec())?;

    let mut got = Vec::new();
    while got.len() < sent {
        let part = unix::data(&full)?;
        ensure(!part.is_empty(), "the end came too early")?;
        got.extend(part);
    }
    ensure(got == much[..sent], "what was sent came out otherwise")
}
