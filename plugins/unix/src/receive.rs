//! The receive queue of a socket that is being dumped.

use crate::{
    census::Socket,
    queue::{self, Message},
    sys,
};
use stasis_plugin_api::{HookError, Host, Result, UndoStep};
use std::os::fd::BorrowedFd;

/// Has the guardian put back what a look at the queue changes, should this process be killed meanwhile.
fn keep_options(host: &Host<'_>, fd: BorrowedFd<'_>) -> Result<()> {
    let option = |name: i32, what: &'static str| {
        let value = sys::get_int(fd, name).map_err(|error| HookError::failed(what, error))?;
        let value = value.to_ne_bytes().as_slice().into();
        Ok::<_, HookError>(UndoStep::SetOption { level: libc::SOL_SOCKET, name, value })
    };
    let steps = [
        option(libc::SO_PASSCRED, "reading SO_PASSCRED")?,
        option(libc::SO_PEEK_OFF, "reading SO_PEEK_OFF")?,
    ];
    host.undo(fd, &steps)
}

/// What waits to be received, in order.
pub(crate) fn receive_queue(
    host: &Host<'_>,
    fd: BorrowedFd<'_>,
    socket: &Socket,
    label: &str,
) -> Result<Vec<Message>> {
    if socket.listening {
        return Ok(Vec::new());
    }
    let diag = &socket.diag;
    let state = sys::poll(fd).map_err(|error| HookError::failed("poll", error))?;
    if state & libc::POLLIN == 0 && diag.receive_queue == 0 {
        return Ok(Vec::new());
    }
    if state & libc::POLLPRI != 0 {
        return Err(HookError::unsupported(
            label,
            "out-of-band data is in its queue",
            "let the program read it first",
        ));
    }
    if socket.kind == libc::SOCK_STREAM {
        keep_options(host, fd)?;
        return queue::peek_stream(fd, diag.receive_queue as usize);
    }
    if state & libc::POLLERR != 0 {
        // Any look at the queue would report the error, and so take it away from the program.
        return Err(HookError::unsupported(
            label,
            "an error is pending on a message socket",
            "let the program read from the socket first",
        ));
    }
    keep_options(host, fd)?;
    let silent = socket.kind == libc::SOCK_SEQPACKET && diag.shutdown & 1 != 0;
    queue::peek_messages(fd, silent.then_some(diag.receive_queue as usize))
}
