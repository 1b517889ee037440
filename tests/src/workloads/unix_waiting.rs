//! Connections that are not accepted yet, from the server itself and from a child.

use libc::{SOCK_SEQPACKET, SOCK_STREAM};

use crate::ctl::{Ctl, Outcome, same};
use crate::{sys, unix};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    play(ctl, &[])
}

/// The same; `early` is what each client has sent already.
pub fn play(ctl: &Ctl, early: &[u8]) -> Outcome {
    let path = unix::path(&ctl.work("socket"));
    let hidden = format!("\0stasis-waiting-{}", ctl.work("").display()).into_bytes();
    let places = [(SOCK_STREAM, path), (SOCK_SEQPACKET, hidden)];
    let mut waiting = Vec::new();
    for (kind, address) in &places {
        let listener = unix::listener(*kind, address, 9)?;
        let client = unix::client(*kind, address)?;
        if !early.is_empty() {
            unix::send(&client, &[], early, &[])?;
        }
        waiting.push((listener, client));
    }
    let child = ctl.child("client", |ctl| {
        let client = unix::client(SOCK_STREAM, &places[0].1)?;
        ctl.wait_as("client")?;
        unix::send(&client, &[], b"from the child", &[]).map(drop).map_err(Into::into)
    })?;
    ctl.await_ready("client")?;

    if ctl.wait()? {
        unix::accept(&waiting[1].0)?;
    }

    let other = child.pid.as_raw();
    child.join()?;
    let mut seen = false;
    for ((listener, client), (_, address)) in waiting.iter().zip(&places) {
        unix::send(client, &[], b"late", &[])?;
        let mut expected = vec![[early, b"late"].concat()];
        if early.is_empty() {
            expected = vec![b"late".to_vec()];
        } else if address[0] == 0 {
            expected = vec![early.to_vec(), b"late".to_vec()];
        }
        let mut accepted = unix::accept(listener)?;
        if unix::peer_pid(&accepted)? == other {
            // Restored tasks may come in another order.
            same("from the child", unix::data(&accepted)?, b"from the child".to_vec())?;
            seen = true;
            accepted = unix::accept(listener)?;
        }
        for text in expected {
            same("what the client sent", unix::data(&accepted)?, text)?;
        }
        unix::send(&accepted, &[], b"welcome", &[])?;
        same("welcome", unix::data(client)?, b"welcome".to_vec())?;
        same("name of the listener", unix::peer_name(client)?, address.clone())?;
    }
    if !seen {
        same("from the child", unix::data(unix::accept(&waiting[0].0)?)?, b"from the child".to_vec())?;
    }
    let none = unix::accept(&waiting[0].0);
    same("nobody else", sys::errno_of(&none), libc::EAGAIN)
}
