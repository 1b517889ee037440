//! Processes that share their descriptor table (CLONE_FILES), in two generations, and one that has a copy of it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use super::tree_shared_fs::{fork_with, join};
use crate::ctl::{Ctl, Outcome, changed, ensure, poll_until, same};

/// Whether the caller has a descriptor of this number.
fn has(number: i32) -> bool {
    // SAFETY: an integer argument.
    unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
}

/// A file by a descriptor that belongs to the whole table.
fn borrow(number: i32) -> std::mem::ManuallyDrop<File> {
    // SAFETY: never dropped, so it closes nothing.
    std::mem::ManuallyDrop::new(unsafe { File::from_raw_fd(number) })
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut file = File::options().read(true).write(true).create_new(true).open(ctl.work("file"))?;
    file.write_all(b"0123456789")?;
    file.seek(SeekFrom::Start(3))?;
    let unlinked = File::create_new(ctl.work("unlinked"))?;
    std::fs::remove_file(ctl.work("unlinked"))?;
    let (mut reader, mut writer) = std::io::pipe()?;
    writer.write_all(b"in the pipe")?;
    let listener = UnixListener::bind(ctl.work("socket"))?;
    let mut client = UnixStream::connect(ctl.work("socket"))?;
    let (mut server, _) = listener.accept()?;
    client.write_all(b"under way")?;
    let low: OwnedFd = file.try_clone()?.into();
    let high = 700;
    // SAFETY: integer arguments; the number is free.
    ensure(unsafe { libc::dup2(low.as_raw_fd(), high) } == high, "dup2")?;

    let marks = ctl.dir().join("work");
    let number = || -> Outcome<i32> {
        let text = std::fs::read_to_string(ctl.work("number"))?;
        text.parse().map_err(|_| changed(format!("{text:?} is no number")))
    };
    let sharer = fork_with(libc::CLONE_FILES, || {
        let grandchild = fork_with(libc::CLONE_FILES, || {
            ensure(!ctl.wait_as("grandchild")?, "spoilt")?;
            ensure(has(high), "the grandchild has lost a descriptor")?;
            let made = File::create(marks.join("made"))?.into_raw_fd();
            borrow(made).write_all(b"by the grandchild")?;
            // SAFETY: of the table that all share; whoever owned it here never runs again.
            unsafe { libc::close(high) };
            std::fs::write(marks.join("number.new"), made.to_string())?;
            Ok(std::fs::rename(marks.join("number.new"), marks.join("number"))?)
        })?;
        let copy = fork_with(0, || {
            ctl.wait_as("copy")?;
            poll_until("the grandchild has made a file", || marks.join("number").exists())?;
            let number = number()?;
            ensure(has(high), "a copied table lost what was closed in the other")?;
            let link = std::fs::read_link(format!("/proc/self/fd/{number}"));
            ensure(!link.is_ok_and(|link| link.ends_with("made")), "a copied table got what was opened in the other")
        })?;
        ctl.wait_as("sharer")?;
        join(grandchild)?;
        ensure(!has(high), "the sharer still has what the grandchild closed")?;
        join(copy)
    })?;
    for name in ["sharer", "grandchild", "copy"] {
        ctl.await_ready(name)?;
    }

    ctl.wait()?;

    join(sharer)?;
    let number = number()?;
    same("the file that the grandchild made", std::fs::read_to_string(format!("/proc/self/fd/{number}"))?.as_str(), "by the grandchild")?;
    ensure(!has(high), "the parent still has what the grandchild closed")?;
    let mut rest = String::new();
    file.read_to_string(&mut rest)?;
    same("the file from its offset on", rest.as_str(), "3456789")?;
    let mut bytes = [0; 11];
    reader.read_exact(&mut bytes)?;
    same("the pipe", &bytes, b"in the pipe")?;
    let mut bytes = [0; 9];
    server.read_exact(&mut bytes)?;
    same("the socket", &bytes, b"under way")?;
    ensure(unlinked.metadata()?.len() == 0, "the unlinked file")
}
