//! A root directory that nobody else sees, to bind sockets there: an address keeps the text that was given, wherever
//! that text led. So a socket gets a name whose file is gone, or is another socket's, and no file of the tree is touched.

use nix::{
    fcntl::{OFlag, open},
    sched::{CloneFlags, unshare},
    sys::stat::Mode,
    unistd::{chroot, fchdir, unlink},
};
use stasis_plugin_api::{HookError, Result};
use std::{
    fs::DirBuilder,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::DirBuilderExt},
    },
    path::{Component, Path, PathBuf},
};

/// `FSCONFIG_CMD_CREATE` (linux/mount.h).
const FSCONFIG_CMD_CREATE: u32 = 6;

fn descriptor(result: libc::c_long, what: &str) -> Result<OwnedFd> {
    if result < 0 {
        return Err(HookError::failed(what, io::Error::last_os_error())
            .remedy("a socket with a removed or shared file needs CAP_SYS_ADMIN in the mount namespace"));
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// An empty tmpfs that is mounted nowhere (fsopen(2), fsmount(2)).
fn unseen_mount() -> Result<OwnedFd> {
    // SAFETY: a string that ends with NUL.
    let result = unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), 1) };
    let filesystem = descriptor(result, "fsopen of tmpfs")?;
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: this command takes neither key nor value.
    let result = unsafe {
        libc::syscall(libc::SYS_fsconfig, filesystem.as_raw_fd(), FSCONFIG_CMD_CREATE, null, null, 0)
    };
    if result < 0 {
        return Err(HookError::failed("fsconfig of tmpfs", io::Error::last_os_error()));
    }
    // SAFETY: integers only.
    let result = unsafe { libc::syscall(libc::SYS_fsmount, filesystem.as_raw_fd(), 1, 0) };
    descriptor(result, "fsmount of tmpfs")
}

/// Goes back when dropped.
struct Back {
    root: OwnedFd,
    directory: OwnedFd,
}

impl Back {
    fn remember() -> Result<Self> {
        let open = |path: &str| {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            open(path, flags, Mode::empty()).map_err(|errno| HookError::failed(format!("open {path}"), errno))
        };
        Ok(Self { root: open("/")?, directory: open(".")? })
    }
}

impl Drop for Back {
    fn drop(&mut self) {
        // Both were this process' own a moment ago, and it has the same powers still.
        let back =
            fchdir(self.root.as_fd()).and_then(|()| chroot(".")).and_then(|()| fchdir(&self.directory));
        debug_assert!(back.is_ok(), "going back to the root directory: {back:?}");
    }
}

/// Binds a socket to an address that is a path, in a root directory of its own, and gives the file (O_PATH).
pub(crate) fn bind(socket: BorrowedFd<'_>, address: &[u8]) -> Result<OwnedFd> {
    // Of this thread alone; where there is no other, this does nothing.
    unshare(CloneFlags::CLONE_FS)
        .map_err(|errno| HookError::failed("unshare of the root directory", errno))?;
    let mount = unseen_mount()?;
    let back = Back::remember()?;
    let enter = fchdir(mount.as_fd()).and_then(|()| chroot("."));
    enter.map_err(|errno| HookError::failed("chroot", errno))?;
    let path = crate::name::path(address).unwrap_or_default();
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let mut above = PathBuf::new();
    for part in path.parent().into_iter().flat_map(Path::components) {
        above.push(part);
        if matches!(part, Component::Normal(_)) {
            let made = DirBuilder::new().mode(0o755).create(&above);
            match made {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(HookError::failed("mkdir", error));
                }
                _ => {}
            }
        }
    }
    crate::sys::bind(socket, address).map_err(|error| HookError::failed("bind", error))?;
    let file = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
    let file = file.map_err(|errno| HookError::failed("open of a socket's file", errno))?;
    // The descriptor leads there all the same, and a later dump sees that the name has no file.
    unlink(path).map_err(|errno| HookError::failed("unlink of a socket's file", errno))?;
    drop(back);
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

    #[test]
    fn a_name_without_a_file_in_the_tree() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let new = || socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).unwrap();
        for address in [&b"/no/such/../directory/x\0"[..], b"relative/x\0"] {
            let (one, other) = (new(), new());
            let before = std::env::current_dir().unwrap();
            let file = bind(one.as_fd(), address).unwrap();
            assert_eq!(crate::sys::local_address(one.as_fd()).unwrap(), address);
            assert_eq!(std::env::current_dir().unwrap(), before);
            crate::sys::connect(other.as_fd(), &crate::sys::address_of(file.as_fd())).unwrap();
            assert_eq!(crate::sys::peer_address(other.as_fd()).unwrap(), address);
        }
    }
}
