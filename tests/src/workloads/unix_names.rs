//! Names: relative to a directory that is not the working directory any more, removed, moved, chosen by the kernel, in use
//! by a newer socket; with their modes.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};

use libc::{SOCK_DGRAM, SOCK_STREAM};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::{sys, unix};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    fs::create_dir_all(ctl.work("deep/er"))?;
    std::env::set_current_dir(ctl.work("deep"))?;
    let relative = unix::listener(SOCK_STREAM, b"er/socket\0", 3)?;
    let (client, accepted) = (unix::client(SOCK_STREAM, b"er/socket\0")?, unix::accept(&relative)?);
    fs::set_permissions(ctl.work("deep/er/socket"), fs::Permissions::from_mode(0o640))?;
    std::env::set_current_dir("/")?;
    // Its file is gone, but who is connected still knows the name.
    let removed_name = unix::path(&ctl.work("removed"));
    let removed = unix::listener(SOCK_STREAM, &removed_name, 3)?;
    let removed_client = unix::client(SOCK_STREAM, &removed_name)?;
    let removed_accepted = unix::accept(&removed)?;
    fs::remove_file(ctl.work("removed"))?;
    // Its file is another's now.
    let taken_name = unix::path(&ctl.work("taken"));
    let older = unix::named(SOCK_DGRAM, &taken_name)?;
    let to_older = unix::client(SOCK_DGRAM, &taken_name)?;
    fs::remove_file(ctl.work("taken"))?;
    let newer = unix::named(SOCK_DGRAM, &taken_name)?;
    // The file was moved.
    let moved_name = unix::path(&ctl.work("moved"));
    let moved = unix::named(SOCK_DGRAM, &moved_name)?;
    // The listener itself is closed.
    let closed_name = unix::path(&ctl.work("closed"));
    let closed = unix::listener(SOCK_STREAM, &closed_name, 3)?;
    let (orphans_client, orphans) = (unix::client(SOCK_STREAM, &closed_name)?, unix::accept(&closed)?);
    drop(closed);
    let chosen = unix::named(SOCK_DGRAM, &[])?;
    let chosen_name = unix::name(&chosen)?;
    let unbound = unix::new(SOCK_STREAM)?;

    if ctl.wait()? {
        drop(newer);
        return unix::connect(unix::new(SOCK_DGRAM)?, &taken_name).map_err(Into::into);
    }

    same("relative name", unix::name(&relative)?, b"er/socket\0".to_vec())?;
    let file = fs::metadata(ctl.work("deep/er/socket"))?;
    ensure(file.file_type().is_socket(), "the relative name leads to a socket")?;
    same("its mode", file.permissions().mode() & 0o7777, 0o640)?;
    let newcomer = unix::client(SOCK_STREAM, &unix::path(&ctl.work("deep/er/socket")))?;
    unix::send(&newcomer, &[], b"hello", &[])?;
    same("a newcomer", unix::data(unix::accept(&relative)?)?, b"hello".to_vec())?;
    for (client, accepted, name) in [
        (&client, &accepted, b"er/socket\0".to_vec()),
        (&removed_client, &removed_accepted, removed_name.clone()),
        (&orphans_client, &orphans, closed_name),
    ] {
        same("name of the peer", unix::peer_name(client)?, name.clone())?;
        same("name of the accepted", unix::name(accepted)?, name)?;
        unix::send(client, &[], b"question", &[])?;
        same("question", unix::data(accepted)?, b"question".to_vec())?;
    }
    ensure(!ctl.work("removed").exists(), "a file that was removed has come back")?;
    same("removed name", unix::name(&removed)?, removed_name)?;
    for (sender, receiver) in [(&to_older, &older), (&unix::client(SOCK_DGRAM, &taken_name)?, &newer)] {
        same("taken name", unix::name(receiver)?, taken_name.clone())?;
        unix::send(sender, &[], b"for you", &[])?;
        same("for you", unix::data(receiver)?, b"for you".to_vec())?;
    }
    let to_moved = unix::client(SOCK_DGRAM, &moved_name)?;
    unix::send(&to_moved, &[], b"found", &[])?;
    same("found", unix::data(&moved)?, b"found".to_vec())?;
    same("chosen name", unix::name(&chosen)?, chosen_name.clone())?;
    unix::send(unix::client(SOCK_DGRAM, &chosen_name)?, &[], b"chosen", &[])?;
    same("chosen", unix::data(&chosen)?, b"chosen".to_vec())?;
    same("unbound", unix::name(&unbound)?, Vec::new())?;
    let refused = unix::send(&unbound, &[], b"x", &[]);
    same("unconnected", sys::errno_of(&refused), libc::ENOTCONN)
}
