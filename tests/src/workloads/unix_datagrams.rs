//! Datagram sockets: senders of every kind in a queue, connected ones, a pair that was bound, peers that are gone.

use std::os::fd::AsRawFd;

use libc::SOCK_DGRAM;

use crate::ctl::{Ctl, Outcome, changed, same};
use crate::{sys, unix};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let me = std::process::id() as i32;
    let at = |name: &str| unix::path(&ctl.work(name));
    let hidden = |name: &str| format!("\0stasis-{name}-{}", ctl.work("").display()).into_bytes();
    let server = unix::named(SOCK_DGRAM, &at("server"))?;
    unix::set_option(&server, libc::SO_PASSCRED, &1i32.to_ne_bytes())?;
    let mut expected = Vec::new();
    // Senders that live, that are closed, that have no name.
    let living = unix::named(SOCK_DGRAM, &hidden("living"))?;
    let closed = unix::named(SOCK_DGRAM, &at("closed"))?;
    let nameless = unix::new(SOCK_DGRAM)?;
    for (socket, sender) in
        [(&living, hidden("living")), (&closed, at("closed")), (&nameless, Vec::new()), (&living, hidden("living"))]
    {
        let text = format!("message {}", expected.len()).into_bytes();
        unix::send(socket, &at("server"), &text, &[server.as_raw_fd()])?;
        expected.push((text, sender, 1));
    }
    unix::send(&living, &at("server"), b"", &[])?;
    expected.push((Vec::new(), hidden("living"), 0));
    drop((closed, nameless));
    // Connected, one of them to another's other name.
    let connected = unix::new(SOCK_DGRAM)?;
    unix::connect(&connected, &at("server"))?;
    let quiet = unix::named(SOCK_DGRAM, &at("quiet"))?;
    unix::connect(&quiet, &hidden("living"))?;
    // Its service is gone, and the file, too.
    let gone = unix::named(SOCK_DGRAM, &at("gone"))?;
    let lost = unix::new(SOCK_DGRAM)?;
    unix::connect(&lost, &at("gone"))?;
    drop(gone);
    std::fs::remove_file(ctl.work("gone"))?;
    // A pair of which one end got a name later, and what its other end sent.
    let (left, right) = unix::pair(SOCK_DGRAM)?;
    unix::bind(&left, &at("left"))?;
    unix::send(&left, &[], b"to the right", &[])?;
    let (orphan, ended) = unix::pair(SOCK_DGRAM)?;
    unix::send(&ended, &[], b"last words", &[])?;
    drop(ended);
    let child = ctl.child("other", |ctl| {
        ctl.wait_as("other")?;
        unix::send(&connected, &[], b"from the child", &[]).map(drop).map_err(Into::into)
    })?;
    ctl.await_ready("other")?;

    if ctl.wait()? {
        unix::receive(&server)?;
    }

    let other = child.pid.as_raw();
    child.join()?;
    expected.push((b"from the child".to_vec(), Vec::new(), 0));
    for (number, (text, sender, fds)) in expected.iter().enumerate() {
        let message = unix::receive(&server)?;
        same("text", &message.data, text)?;
        same("descriptors", message.fds.len(), *fds)?;
        if number + 1 < expected.len() {
            same("sender", &message.sender, sender)?;
            same("pid of the sender", message.pid, Some(me))?;
        } else {
            same("pid of the child", message.pid, Some(other))?;
        }
    }
    unix::send(&connected, &[], b"again", &[])?;
    same("again", unix::data(&server)?, b"again".to_vec())?;
    unix::send(&quiet, &[], b"quietly", &[])?;
    let quietly = unix::receive(&living)?;
    same("quietly", (quietly.data, quietly.sender), (b"quietly".to_vec(), at("quiet")))?;
    same("name of who is gone", unix::peer_name(&lost)?, at("gone"))?;
    let refused = unix::send(&lost, &[], b"x", &[]);
    same("a message to nobody", sys::errno_of(&refused), libc::ECONNREFUSED)?;
    let right_message = unix::receive(&right)?;
    same("to the right", (right_message.data, right_message.sender), (b"to the right".to_vec(), at("left")))?;
    same("SO_PEERCRED of a pair", unix::peer_pid(&right)?, me)?;
    unix::send(&right, &[], b"to the left", &[])?;
    same("to the left", unix::data(&left)?, b"to the left".to_vec())?;
    same("last words", unix::data(&orphan)?, b"last words".to_vec())?;
    match unix::send(&orphan, &[], b"x", &[]) {
        Err(error) if error.raw_os_error() == Some(libc::ECONNREFUSED) => Ok(()),
        other => Err(changed(format!("a message to a closed end: {other:?}"))),
    }
}
