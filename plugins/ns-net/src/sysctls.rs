//! The settings of a network namespace below /proc/sys/net, and what they must be while it is being filled.

use crate::record::stasis::ns_net::v1::Sysctl;
use stasis_plugin_api::{HookError, Result};
use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

const ROOT: &str = "/proc/sys/net";
/// No such file is longer.
const LONGEST: usize = 1 << 20;

/// What is not itself while addresses are made: without a search for others who have them, without addresses that the kernel
/// makes by itself.
const MEANWHILE: [(&str, &[u8]); 2] = [("accept_dad", b"0"), ("use_tempaddr", b"0")];
/// Likewise, of each device. It gets its own value by netlink, which, unlike this file, makes no addresses.
const GENERATION: &str = "addr_gen_mode";

/// Files that read as something else than what was written, or whose reading is no setting.
const NOT_SETTINGS: [&str; 2] = ["ipv4/route/flush", "ipv6/route/flush"];

/// All that can be read and written, of the namespace that this thread is in.
pub(crate) fn read() -> Result<Vec<Sysctl>> {
    let mut found = Vec::new();
    let walked = walk(Path::new(ROOT), &mut found);
    walked.map_err(|error| HookError::failed(format!("reading {ROOT}"), error))?;
    found.sort_by(|one, other| order(&one.path).cmp(&order(&other.path)));
    Ok(found)
}

fn walk(directory: &Path, found: &mut Vec<Sysctl>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let (path, meta) = (entry.path(), entry.metadata()?);
        if meta.is_dir() {
            walk(&path, found)?;
            continue;
        }
        let Some(name) = path.strip_prefix(ROOT).ok().and_then(Path::to_str) else { continue };
        if meta.permissions().mode() & 0o600 != 0o600 || NOT_SETTINGS.contains(&name) {
            continue;
        }
        // Some have no value yet (a secret that was never set), and say so by an error.
        if let Ok(mut value) = fs::read(&path) {
            value.truncate(value.trim_ascii_end().len());
            found.push(Sysctl { path: name.to_owned(), value });
        }
    }
    Ok(())
}

/// `all` and `default` change others, so they come first; what forwards changes both.
fn order(path: &str) -> (u8, &str) {
    let rank = match path {
        "ipv4/ip_forward" => 0,
        _ if path.contains("/conf/all/") => 1,
        _ if path.contains("/conf/default/") || path.contains("/neigh/default/") => 2,
        _ => 3,
    };
    (rank, path)
}

/// Where a setting is, if it is one that a setting can be.
fn place(sysctl: &Sysctl) -> Result<PathBuf> {
    let fits = !sysctl.path.is_empty()
        && sysctl.path.split('/').all(|part| !matches!(part, "" | "." | ".."))
        && sysctl.value.len() <= LONGEST;
    match fits {
        true => Ok(Path::new(ROOT).join(&sysctl.path)),
        false => Err(HookError::invalid(format!("the image names a setting {:?}", sysctl.path))),
    }
}

/// The value that a setting has until all is in place.
fn meanwhile(path: &str) -> Option<&'static [u8]> {
    let (device, name) = path.strip_prefix("ipv6/conf/")?.split_once('/')?;
    if name == GENERATION && !matches!(device, "all" | "default") {
        return Some(b"1");
    }
    MEANWHILE.iter().find(|(one, _)| *one == name).map(|(_, value)| *value)
}

/// Before there are addresses.
pub(crate) fn begin(sysctls: &[Sysctl]) -> Result<()> {
    sysctls.iter().try_for_each(|sysctl| set(sysctl, meanwhile(&sysctl.path).unwrap_or(&sysctl.value)))
}

/// When all is in place.
pub(crate) fn finish(sysctls: &[Sysctl]) -> Result<()> {
    let held_back = sysctls
        .iter()
        .filter(|sysctl| meanwhile(&sysctl.path).is_some() && !sysctl.path.ends_with(GENERATION));
    held_back.into_iter().try_for_each(|sysctl| set(sysctl, &sysctl.value))
}

/// What is so already is not written.
fn set(sysctl: &Sysctl, value: &[u8]) -> Result<()> {
    let path = place(sysctl)?;
    let is_so = |value: &[u8]| fs::read(&path).is_ok_and(|read| read.trim_ascii_end() == value);
    if is_so(value) {
        return Ok(());
    }
    match fs::write(&path, value) {
        Ok(()) => Ok(()),
        Err(error) => {
            let value = String::from_utf8_lossy(value);
            let what = format!("setting {} to {value:?} in the new network namespace", path.display());
            Err(HookError::failed(what, error)
                .remedy("this kernel may lack the setting, or take other values"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_all_devices_come_first() {
        let mut paths = [
            "ipv4/conf/a/forwarding",
            "ipv4/conf/default/forwarding",
            "ipv4/conf/all/forwarding",
            "ipv4/ip_forward",
        ];
        paths.sort_by(|one, other| order(one).cmp(&order(other)));
        assert_eq!(paths[0], "ipv4/ip_forward");
        assert_eq!(paths[3], "ipv4/conf/a/forwarding");
    }

    #[test]
    fn what_leads_out_of_the_directory_is_no_setting() {
        for path in ["", "..", "../kernel/panic", "/etc/passwd", "ipv4//x"] {
            let sysctl = Sysctl { path: path.into(), value: vec![] };
            assert!(place(&sysctl).is_err(), "{path}");
        }
        assert_eq!(meanwhile("ipv6/conf/eth0/accept_dad"), Some(&b"0"[..]));
        assert_eq!(meanwhile("ipv4/conf/eth0/accept_dad"), None);
        assert_eq!(meanwhile("ipv6/conf/all/addr_gen_mode"), None);
        assert!(meanwhile("ipv6/conf/eth0/addr_gen_mode").is_some());
    }

    #[test]
    fn settings_are_read() {
        let found = read().unwrap();
        assert!(found.iter().any(|sysctl| sysctl.path == "ipv4/conf/lo/forwarding"));
    }
}
