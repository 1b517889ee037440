//! Tasks in the middle of calls that last: wait, read of an empty pipe, write to a full one, sigsuspend.

use std::io::{Read, Write};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use crate::ctl::{Ctl, Outcome, ensure, pause, same};
use crate::sys;

extern "C" fn nothing(_signal: i32) {}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    // SAFETY: the handler does nothing.
    unsafe { libc::signal(libc::SIGUSR1, nothing as *const () as usize) };
    let waiting = ctl.child("waiting", |ctl| {
        let inner = ctl.child("waited for", |ctl| ctl.wait_for_request().map(drop))?;
        ctl.announce("ready.waiting", b"")?;
        inner.join()
    })?;
    let (reader, to_reader) = sys::pipe(0)?;
    let reading = ctl.child("reading", |ctl| {
        ctl.announce("ready.reading", b"")?;
        let mut got = [0; 5];
        let n = std::fs::File::from(reader.try_clone()?).read(&mut got)?;
        same("what the reader got", &got[..n], &b"hello"[..])
    })?;
    let (from_writer, writer) = sys::pipe(0)?;
    let writing = ctl.child("writing", |ctl| {
        ctl.announce("ready.writing", b"")?;
        Ok(std::fs::File::from(writer.try_clone()?).write_all(&sys::bytes(91, 100_000))?)
    })?;
    let suspended = ctl.child("suspended", |ctl| {
        ctl.announce("ready.suspended", b"")?;
        // SAFETY: waits for a signal.
        let result = unsafe { libc::pause() };
        let errno = std::io::Error::last_os_error().raw_os_error();
        same("end of pause", (result, errno), (-1, Some(libc::EINTR)))
    })?;
    for name in ["waiting", "reading", "writing", "suspended"] {
        ctl.await_ready(name)?;
    }
    pause(Duration::from_millis(50));

    let sabotage = ctl.wait()?;

    waiting.join()?;
    sys::write(&to_reader, if sabotage { b"HELLO" } else { b"hello" })?;
    reading.join()?;
    kill(suspended.pid, Signal::SIGUSR1)?;
    suspended.join()?;
    // The writer itself is the last one that has this end.
    drop(writer);
    let mut all = Vec::new();
    std::fs::File::from(from_writer).read_to_end(&mut all)?;
    ensure(all == sys::bytes(91, 100_000), &format!("{} bytes arrived, of 100000, or others", all.len()))?;
    writing.join()
}
