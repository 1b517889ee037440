//! Names of sockets: what the address says, and where its file is.

use crate::{
    credentials::Context,
    record::stasis::unix::v1::{Name, Node},
    sys,
};
use stasis_plugin_api::{HookError, Result};
use std::{
    fs,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

/// The path in an address; `None` for an abstract name and for none at all.
pub(crate) fn path(address: &[u8]) -> Option<&[u8]> {
    let end = address.iter().position(|byte| *byte == 0).unwrap_or(address.len());
    (end > 0).then(|| &address[..end])
}

/// The path in the address of a process outside, for reconnecting.
pub(crate) fn absolute_path(address: &[u8]) -> Option<String> {
    let path = path(address)?;
    let text = std::str::from_utf8(path).ok()?;
    text.starts_with('/').then(|| text.to_owned())
}

/// How an address is shown in messages.
pub(crate) fn shown(address: &[u8]) -> String {
    match path(address) {
        Some(path) => String::from_utf8_lossy(path).into_owned(),
        None => format!("@{}", String::from_utf8_lossy(address.get(1..).unwrap_or_default())),
    }
}

/// The name of a bound socket. The address is what the program said, perhaps relative to a directory that is none of
/// its own any more; the kernel knows the file itself (SIOCUNIXFILE, net/unix/af_unix.c).
pub(crate) fn read(
    context: &Context<'_, '_>,
    fd: BorrowedFd<'_>,
    address: &[u8],
    label: &str,
) -> Result<Option<Name>> {
    if address.is_empty() {
        return Ok(None);
    }
    let node = match path(address) {
        Some(_) => node(context, fd, label)?,
        None => None,
    };
    Ok(Some(Name { address: address.to_vec(), node }))
}

/// The file of a socket; `None` if it was removed.
fn node(context: &Context<'_, '_>, fd: BorrowedFd<'_>, label: &str) -> Result<Option<Node>> {
    let file = sys::bound_file(fd).map_err(|error| HookError::failed("SIOCUNIXFILE", error))?;
    let link = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let failed = |error| HookError::failed(format!("looking at the file of {label}"), error);
    let stat = fs::metadata(&link).map_err(failed)?;
    if stat.nlink() == 0 {
        return Ok(None);
    }
    // In the mount namespace of its own, wherever that is.
    let place = fs::read_link(&link).map_err(failed)?;
    let refuse = |why: String, remedy: &str| Err(HookError::unsupported(label, why, remedy));
    let Ok(path) = std::str::from_utf8(place.as_os_str().as_bytes()) else {
        return refuse("its path is not valid UTF-8".to_owned(), "bind it to another name");
    };
    let seen = context.path("root");
    let root = fs::read_link(&seen).map_err(failed)?;
    // A root directory that was changed is below the one in which the path begins.
    let from_root = Path::new(path).strip_prefix(&root).unwrap_or(Path::new(path));
    let from_root: PathBuf = from_root.components().filter(|part| part.as_os_str() != "/").collect();
    match fs::symlink_metadata(Path::new(&seen).join(from_root)) {
        Ok(found) if (found.dev(), found.ino()) == (stat.dev(), stat.ino()) => {}
        // The kernel shows a name that was removed while a hard link keeps the file.
        _ if path.ends_with(" (deleted)") => return Ok(None),
        _ => {
            return refuse(
                format!("its file {path} cannot be reached by its holder"),
                "let a task that sees the file hold the socket",
            );
        }
    }
    let (uid, gid) = (context.id("uid_map", stat.uid(), label)?, context.id("gid_map", stat.gid(), label)?);
    let mode = stat.mode() & 0o7777;
    Ok(Some(Node { path: path.to_owned(), mode, uid, gid, dev: stat.dev(), ino: stat.ino() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_shown() {
        assert_eq!(path(b"/run/a\0"), Some(&b"/run/a"[..]));
        assert_eq!(path(b"\0abstract"), None);
        assert_eq!(path(b""), None);
        assert_eq!(shown(b"\x0000001"), "@00001");
        assert_eq!(absolute_path(b"relative\0"), None);
        assert_eq!(absolute_path(b"/dev/log\0").as_deref(), Some("/dev/log"));
    }
}
