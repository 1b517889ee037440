//! What workloads with mounts of their own have in common.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::ctl::{Fail, Outcome};
use crate::sys;

/// For arguments of mount(2) that are not there.
pub const NONE: Option<&str> = None;

/// A workload changes mounts only where they are its own.
pub fn needs_own() -> Outcome {
    match std::process::id() {
        1 => Ok(()),
        _ => Err(Fail::Absent("needs a mount namespace of its own (flavours ns and user)".into())),
    }
}

/// Whether this is the initial user namespace.
pub fn is_real_root() -> Outcome<bool> {
    Ok(fs::read_to_string("/proc/self/uid_map")?.split_whitespace().eq(["0", "0", "4294967295"]))
}

/// A new tmpfs at a new directory.
pub fn tmpfs(place: &Path, options: &str) -> Outcome {
    fs::create_dir_all(place)?;
    Ok(mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), Some(options))?)
}

/// A bind mount of a file or directory.
pub fn bind(from: &Path, to: &Path) -> Outcome {
    Ok(mount(Some(from), to, NONE, MsFlags::MS_BIND, NONE)?)
}

/// Sets flags or the propagation of a mount.
pub fn change(place: &Path, flags: MsFlags) -> Outcome {
    Ok(mount(NONE, place, NONE, flags, NONE)?)
}

/// An attribute that only the owner of the user namespace may set, if it can be had here.
fn attribute_name() -> Outcome<CString> {
    let name = if is_real_root()? { "trusted.stasis" } else { "user.stasis" };
    Ok(CString::new(name).map_err(std::io::Error::other)?)
}

fn c_path(path: &Path) -> Outcome<CString> {
    Ok(CString::new(path.as_os_str().as_bytes()).map_err(std::io::Error::other)?)
}

/// Gives a file an extended attribute.
pub fn set_attribute(path: &Path, value: &[u8]) -> Outcome {
    let (path, name) = (c_path(path)?, attribute_name()?);
    // SAFETY: NUL-terminated strings, and a value of the length that is given.
    let set = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    sys::cvt(set)?;
    Ok(())
}

/// The same attribute.
pub fn attribute(path: &Path) -> Outcome<Vec<u8>> {
    let (path, name, mut value) = (c_path(path)?, attribute_name()?, vec![0; 64]);
    // SAFETY: NUL-terminated strings, and a buffer of the length that is given.
    let got = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(sys::cvt_long(got as i64)? as usize);
    Ok(value)
}

/// All mounts of this process with roots, options and groups. Numbers are replaced by ones that do not depend on when the mounts
/// were made.
pub fn shown() -> Outcome<Vec<String>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let mut lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(' ').collect()).collect();
    // What lies over another stays behind it.
    lines.sort_by_key(|fields| fields.get(4).map(|place| (*place).to_owned()));
    let mut groups: BTreeMap<String, usize> = BTreeMap::new();
    let mut all = Vec::new();
    for fields in lines {
        let mut kept = Vec::new();
        for field in fields.iter().skip(3) {
            match field.split_once(':') {
                Some((name @ ("shared" | "master"), number)) => {
                    let next = groups.len();
                    let group = *groups.entry(number.to_owned()).or_insert(next);
                    kept.push(format!("{name}:{group}"));
                }
                _ if field.starts_with("propagate_from") => {}
                _ => kept.push((*field).to_owned()),
            }
        }
        all.push(kept.join(" "));
    }
    Ok(all)
}
