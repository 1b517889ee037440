//! A server with three clients in the same tree, by a path and by an abstract name: names, SO_PEERCRED of both sides, data
//! in both directions, and the listeners still listen.

use std::os::fd::OwnedFd;
use std::path::Path;

use libc::{SOCK_SEQPACKET, SOCK_STREAM};

use crate::ctl::{Ctl, Outcome, ensure, poll_until, same};
use crate::{sys, unix};

const PLACES: [(&str, i32); 4] = [
    ("path", SOCK_STREAM),
    ("abstract", SOCK_STREAM),
    ("packets", SOCK_SEQPACKET),
    ("abstract_packets", SOCK_SEQPACKET),
];

fn address(ctl: &Ctl, number: usize) -> Vec<u8> {
    let name = PLACES[number].0;
    match name.starts_with("abstract") {
        true => format!("\0stasis-{name}-{}", ctl.work("").display()).into_bytes(),
        false => unix::path(Path::new(&ctl.work(name))),
    }
}

/// Each client connects everywhere; one of them is bound, too.
fn client(ctl: &Ctl, who: usize, server: i32) -> Outcome {
    let mut sockets = Vec::new();
    for (number, (name, kind)) in PLACES.into_iter().enumerate() {
        let socket = unix::new(kind)?;
        if who == 0 {
            unix::bind(&socket, &unix::path(&ctl.work(&format!("client.{name}"))))?;
        }
        unix::connect(&socket, &address(ctl, number))?;
        unix::send(&socket, &[], format!("early {who}").as_bytes(), &[])?;
        sockets.push(socket);
    }
    let name = format!("client{who}");
    poll_until("the server has answered", || {
        sockets.iter().all(|socket| matches!(sys::readiness(socket, libc::POLLIN), Ok(1)))
    })?;
    ctl.wait_as(&name)?;
    for (number, socket) in sockets.iter().enumerate() {
        same("name of the peer", unix::peer_name(socket)?, address(ctl, number))?;
        same("the client's SO_PEERCRED", unix::peer_pid(socket)?, server)?;
        same("answer", unix::data(socket)?, format!("answer {who}").into_bytes())?;
        if who == 0 {
            let own = unix::path(&ctl.work(&format!("client.{}", PLACES[number].0)));
            same("the client's own name", unix::name(socket)?, own)?;
        }
        unix::send(socket, &[], format!("late {who}").as_bytes(), &[])?;
    }
    Ok(())
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let me = std::process::id() as i32;
    let mut listeners = Vec::new();
    for (number, (_, kind)) in PLACES.into_iter().enumerate() {
        listeners.push(unix::listener(kind, &address(ctl, number), 5 + number as i32)?);
    }
    let mut clients = Vec::new();
    let mut accepted: Vec<(usize, usize, i32, OwnedFd)> = Vec::new();
    for who in 0..3 {
        // Each has all of the server's descriptors, too.
        let child = ctl.child(&format!("client{who}"), |ctl| client(ctl, who, me))?;
        for (number, listener) in listeners.iter().enumerate() {
            poll_until("a client comes", || matches!(sys::readiness(listener, libc::POLLIN), Ok(1)))?;
            let socket = unix::accept(listener)?;
            unix::send(&socket, &[], format!("answer {who}").as_bytes(), &[])?;
            accepted.push((who, number, child.pid.as_raw(), socket));
        }
        ctl.await_ready(&format!("client{who}"))?;
        clients.push(child);
    }

    if ctl.wait()? {
        unix::data(&accepted[1].3)?;
    }

    for child in clients {
        child.join()?;
    }
    for (who, number, pid, socket) in &accepted {
        let place = PLACES[*number].0;
        same(&format!("SO_PEERCRED at {place}"), unix::peer_pid(socket)?, *pid)?;
        same(&format!("name at {place}"), unix::name(socket)?, address(ctl, *number))?;
        let (early, late) = (format!("early {who}"), format!("late {who}"));
        match PLACES[*number].1 {
            SOCK_STREAM => same("stream", unix::data(socket)?, (early + &late).into_bytes())?,
            _ => {
                same("first packet", unix::data(socket)?, early.into_bytes())?;
                same("second packet", unix::data(socket)?, late.into_bytes())?;
            }
        }
        ensure(unix::data(socket)?.is_empty(), "a connection whose client has ended is not at its end")?;
    }
    for (number, listener) in listeners.iter().enumerate() {
        let socket = unix::client(PLACES[number].1, &address(ctl, number))?;
        same("SO_PEERCRED of a new client", unix::peer_pid(&socket)?, me)?;
        unix::send(&socket, &[], b"new", &[])?;
        same("a new connection", unix::data(unix::accept(listener)?)?, b"new".to_vec())?;
    }
    Ok(())
}
