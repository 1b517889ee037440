//! Connections to a redis server outside of the tree, at `work/redis.sock`: an idle one held twice, and one with replies that
//! nobody has read.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use crate::ctl::{Ctl, Outcome, ensure, poll_until, same};
use crate::sys;

/// What the server has answered: a number, a status, a string with line ends, nothing, an error.
const REPLIES: &[u8] = b":1\r\n+OK\r\n$10\r\nsome\r\ntext\r\n$-1\r\n-ERR unknown\r\n";

fn ask(stream: &mut UnixStream, request: &str, answer: &str) -> Outcome {
    stream.write_all(request.as_bytes())?;
    let mut buffer = vec![0; answer.len()];
    stream.read_exact(&mut buffer)?;
    same(request, String::from_utf8_lossy(&buffer).as_ref(), answer)
}

fn waiting(stream: &UnixStream) -> Outcome<usize> {
    let mut length = 0i32;
    // SAFETY: FIONREAD writes one int.
    sys::cvt(unsafe { libc::ioctl(stream.as_raw_fd(), libc::FIONREAD, &raw mut length) })?;
    Ok(length as usize)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let server = ctl.work("redis.sock");
    let mut idle = UnixStream::connect(&server)?;
    let mut same_one = idle.try_clone()?;
    let mut busy = UnixStream::connect(&server)?;
    busy.set_nonblocking(true)?;
    ask(&mut idle, "INCR idle\r\n", ":1\r\n")?;
    busy.write_all(b"INCR busy\r\nSET text \"some\\r\\ntext\"\r\nGET text\r\nGET nothing\r\n")?;
    busy.write_all(b"EVAL \"return {err='ERR unknown'}\" 0\r\n")?;
    poll_until("the replies wait", || waiting(&busy).is_ok_and(|length| length == REPLIES.len()))?;
    let (before, numbers) = (server.clone(), [idle.as_raw_fd(), same_one.as_raw_fd(), busy.as_raw_fd()]);

    if ctl.wait()? {
        fs::remove_file(&server)?;
    }

    let mut replies = vec![0; REPLIES.len()];
    busy.read_exact(&mut replies)?;
    same("the replies", String::from_utf8_lossy(&replies).as_ref(), &*String::from_utf8_lossy(REPLIES))?;
    ensure(busy.read(&mut [0]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock), "more replies")?;
    busy.set_nonblocking(false)?;
    ask(&mut busy, "INCR busy\r\n", ":2\r\n")?;
    ask(&mut same_one, "INCR idle\r\n", ":2\r\n")?;
    ask(&mut idle, "INCR idle\r\n", ":3\r\n")?;
    let peer = idle.peer_addr()?;
    same("the server", peer.as_pathname(), Some(before.as_path()))?;
    same("the numbers", [idle.as_raw_fd(), same_one.as_raw_fd(), busy.as_raw_fd()], numbers)
}
