//! What a process of another pid namespace is told. A process that has ended has its number there from nobody else.

use crate::sys::PeerCredentials;
use stasis_plugin_api::{HookError, Result};
use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// SO_PEERCRED as it is seen in a pid namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PeerInside {
    /// 0 if the process never was there.
    pub pid: i32,
    /// Whether a process has that number now.
    pub lives: bool,
}

/// Asks by a process that enters the namespace, asks, and ends. It takes one of the namespace's numbers.
pub(crate) fn peer_inside(socket: BorrowedFd<'_>, namespace: io::Result<File>) -> Result<PeerInside> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| HookError::failed(what, error)
    };
    let namespace = namespace.map_err(failed("opening the tree's pid namespace"))?;
    let (mut answer, question) = pipe().map_err(failed("pipe"))?;
    let socket = socket.as_raw_fd();
    // A thread of its own, for its children shall be there, and not those of others.
    let asked = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: changes where children of this thread are born, which ends below.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWPID) } < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the child makes system calls only, which may be done after a fork with threads.
            match unsafe { libc::fork() } {
                0 => answer_and_end(socket, question.as_raw_fd()),
                ..0 => Err(io::Error::last_os_error()),
                child => {
                    let mut status = 0;
                    // SAFETY: waits for our own child.
                    unsafe { libc::waitpid(child, &raw mut status, 0) };
                    Ok(())
                }
            }
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the asking thread panicked")))
    });
    asked.map_err(failed("entering the tree's pid namespace"))?;
    drop(question);
    let mut said = [0; 8];
    answer.read_exact(&mut said).map_err(failed("asking in the tree's pid namespace"))?;
    let [pid, lives] =
        [0, 4].map(|at| i32::from_ne_bytes([said[at], said[at + 1], said[at + 2], said[at + 3]]));
    Ok(PeerInside { pid, lives: lives != 0 })
}

fn pipe() -> io::Result<(File, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors, which are new.
    unsafe {
        if libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((File::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

/// In the forked child: no memory is allocated.
fn answer_and_end(socket: RawFd, to: RawFd) -> ! {
    let mut peer = PeerCredentials { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: PeerCredentials is laid out as ucred, three words; the calls take pointers to live variables.
    unsafe {
        let room = (&raw mut peer).cast();
        if libc::getsockopt(socket, libc::SOL_SOCKET, libc::SO_PEERCRED, room, &raw mut length) == 0 {
            let lives =
                peer.pid > 0 && (libc::kill(peer.pid, 0) == 0 || *libc::__errno_location() == libc::EPERM);
            let said = [peer.pid, i32::from(lives)];
            libc::write(to, said.as_ptr().cast(), 8);
        }
        libc::_exit(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::{fd::AsFd, unix::net::UnixStream};

    #[test]
    fn our_own_namespace_shows_us() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (socket, _peer) = UnixStream::pair().unwrap();
        let seen = peer_inside(socket.as_fd(), File::open("/proc/self/ns/pid")).unwrap();
        assert_eq!(seen, PeerInside { pid: std::process::id() as i32, lives: true });
    }
}
