//! Whether mounts are as they were.

use crate::{
    mountinfo::Line,
    record::stasis::ns_mnt::v1::{Class, Mount},
};
use stasis_plugin_api::{HookError, Result};
use std::collections::BTreeMap;

/// What a mount is known by, in messages too.
fn shown(mountpoint: &str, fstype: &str, root: Option<&str>, options: &str) -> String {
    let mut options: Vec<&str> = options.split(',').collect();
    options.sort_unstable();
    let root = root.map_or(String::new(), |root| format!("{root}, "));
    format!("{mountpoint} ({fstype}, {root}{})", options.join(","))
}

/// Every mount must be there, with its flags and groups, and no other. `moved`: the root is another directory now.
pub(crate) fn compare(current: &[Line], wanted: &[&Mount], moved: bool) -> Result<()> {
    let mut left: Vec<&Line> = current.iter().collect();
    // Numbers of groups are others than they were, but the same ones for the same.
    let mut groups: BTreeMap<u32, u32> = BTreeMap::new();
    for mount in wanted {
        // Elsewhere, the source may be another place of another file system.
        let elsewhere = mount.class() == Class::Named || mount.removed != 0 || moved;
        // Cgroup namespaces have names of their own for the root of a cgroup mount.
        let renamed = mount.class() == Class::External || mount.fstype.starts_with("cgroup");
        let root = (!elsewhere && !renamed).then_some(mount.root.as_str());
        let fstype = if elsewhere { "" } else { mount.fstype.as_str() };
        let name = shown(&mount.mountpoint, fstype, root, &mount.options);
        let of = |line: &Line| {
            let fstype = if elsewhere { "" } else { line.fstype.as_str() };
            shown(&line.mountpoint, fstype, root.and(Some(&line.root)), &line.options)
        };
        let Some(at) = left.iter().position(|line| of(line) == name) else {
            return Err(HookError::invalid(format!("mount {name} could not be made as it was")));
        };
        let line = left.remove(at);
        let pairs = [(mount.group, line.tag("shared")), (mount.master, line.tag("master"))];
        for (was, is) in pairs.map(|(was, is)| (was, is.unwrap_or_default())) {
            let known = *groups.entry(was).or_insert(is);
            if (was == 0) != (is == 0) || known != is {
                return Err(HookError::invalid(format!(
                    "mount {name} is not in the peer groups in which it was"
                )));
            }
        }
    }
    match left.first() {
        None => Ok(()),
        Some(line) => {
            let name = shown(&line.mountpoint, &line.fstype, Some(&line.root), &line.options);
            Err(HookError::invalid(format!("mount {name} is left, which the image does not have")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mountinfo;

    fn mount(mountpoint: &str, group: u32, master: u32) -> Mount {
        Mount {
            mountpoint: mountpoint.into(),
            root: "/".into(),
            fstype: "tmpfs".into(),
            options: "rw,relatime".into(),
            group,
            master,
            ..Mount::default()
        }
    }

    #[test]
    fn differences_are_named() {
        let lines = "27 1 0:4 / / relatime,rw shared:7 - tmpfs x rw
28 27 0:4 / /a relatime,rw shared:8 master:7 - tmpfs x rw
";
        let current = mountinfo::parse(lines).unwrap();
        let (root, slave) = (mount("/", 3, 0), mount("/a", 4, 3));
        compare(&current, &[&root, &slave], false).unwrap();
        let said = |wanted: &[&Mount]| compare(&current, wanted, false).unwrap_err().what;
        assert!(said(&[&root]).contains("/a (tmpfs") && said(&[&root]).contains("is left"));
        assert!(said(&[&root, &slave, &mount("/b", 0, 0)]).contains("/b (tmpfs"));
        assert!(said(&[&root, &mount("/a", 3, 0)]).contains("peer groups"));
        assert!(said(&[&mount("/", 0, 0), &slave]).contains("peer groups"));
    }
}
