//! fanotify(7): groups and their marks, all of which fdinfo shows (fs/notify/fdinfo.c, fanotify_show_fdinfo).
//!
//! Refused by name, as the kernel hides it: groups that grant permissions (which of their questions wait for an answer),
//! marks on mount namespaces, and groups with events that nobody has read.

use crate::{
    dump::{self, Listed},
    kernel,
    locate::Search,
    records::stasis::inotify::v1::{Group, Mark, Watch},
    restore,
};
use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector,
};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bits of `mflags` (include/uapi/linux/fanotify.h).
const SURVIVES: u32 = 0x40;
const EVICTABLE: u32 = 0x200;
const IGNORE: u32 = 0x400;

/// FAN_CLASS_CONTENT and FAN_CLASS_PRE_CONTENT.
const PERMISSION: u32 = 0x4 | 0x8;

pub struct Groups;

fn refused(why: &str, remedy: &str) -> HookError {
    HookError::unsupported("fanotify", why, remedy)
}

/// A mark as fdinfo has it.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Inode(Listed),
    Mount(u64),
    Filesystem(u64),
}

/// The group without places of marks, and the places.
fn listed(handle: &HandleInfo) -> Result<(Group, Vec<Place>)> {
    let invalid = |line: &str| HookError::invalid(format!("fdinfo line of a fanotify: {:?}", line.trim()));
    let mut lines = handle.fdinfo.lines().filter(|line| line.starts_with("fanotify "));
    let head = lines.next().unwrap_or_default();
    let field = |line: &str, name: &str| dump::number(line, name).ok_or_else(|| invalid(line));
    let mut group = Group {
        init_flags: field(head, "flags")? as u32,
        event_flags: field(head, "event-flags")? as u32,
        marks: Vec::new(),
    };
    let mut places = Vec::new();
    for line in lines {
        let (place, scope) = if let Some(id) = dump::number(line, "mnt_id") {
            (Place::Mount(id), libc::FAN_MARK_MOUNT)
        } else if dump::number(line, "ino").is_some() {
            (Place::Inode(dump::inode(line).ok_or_else(|| invalid(line))?), libc::FAN_MARK_INODE)
        } else if line.contains("mnt_ns:") {
            return Err(refused("it has a mark on a mount namespace", "let the program remove the mark"));
        } else {
            (Place::Filesystem(dump::device(field(line, "sdev")?)), libc::FAN_MARK_FILESYSTEM)
        };
        places.push(place);
        group.marks.push(Mark {
            scope,
            mask: field(line, "mask")?,
            ignored: field(line, "ignored_mask")?,
            flags: field(line, "mflags")? as u32,
            file: None,
        });
    }
    Ok((group, places))
}

fn group(host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Group>> {
    let handle = &object.handles[0];
    let (mut group, places) = listed(handle)?;
    let mut search = Search::new(host, handle)?;
    let inodes: Vec<Listed> = places
        .iter()
        .filter_map(|place| match place {
            Place::Inode(listed) => Some(listed.clone()),
            _ => None,
        })
        .collect();
    let mut found = search.find(&inodes)?.into_iter();
    let mut uses = Vec::new();
    for (mark, place) in group.marks.iter_mut().zip(places) {
        let mut mounted = |id, dev| -> Result<Watch> {
            let path = search.mount_point(id, dev)?;
            let path = path.ok_or_else(|| {
                refused(
                    "it has a mark on a mount that its task does not see",
                    "let the program remove the mark",
                )
            })?;
            Ok(Watch { path, mode: libc::S_IFDIR, ..Watch::default() })
        };
        mark.file = Some(match (place, mark.scope) {
            (Place::Mount(id), _) => mounted(Some(id), None)?,
            (Place::Filesystem(dev), _) => mounted(None, Some(dev))?,
            (Place::Inode(listed), _) => {
                // `find` gives a place for each.
                let place = found.next().ok_or_else(|| HookError::invalid("a mark without a place"))?;
                dump::record_of(listed, place, &mut uses)
            }
        });
    }
    Ok(Dumped { uses: uses.into(), ..Dumped::new(group) })
}

impl Descriptor for Groups {
    type Record = Group;
    const KIND: &'static str = "fanotify";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::AnonInode("[fanotify]".into())]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        let (group, places) = listed(handle)?;
        if group.init_flags & PERMISSION != 0 {
            let why = "it grants permissions, and the kernel hides which questions wait for an answer";
            return Err(refused(why, "stop the program that watches"));
        }
        if kernel::queued(fd).map_err(|error| HookError::failed("FIONREAD", error))? > 0 {
            return Err(refused("it has events that nobody has read", "dump when they are read"));
        }
        Ok(Described {
            identity: handle.id.to_string().into(),
            description: format!("fanotify with {} marks", places.len()).into(),
            ..Described::default()
        })
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Group>> {
        group(host, object)
    }

    fn create(&self, _: &Host<'_>, _: &ObjectInfo, record: &Group) -> Result<Vec<OwnedFd>> {
        // As given, since fdinfo shows them again; core sets close-on-exec for each number.
        let group = kernel::create_group(record.init_flags, record.event_flags);
        Ok(vec![group.map_err(|error| HookError::failed("fanotify_init", error))?])
    }

    fn settle(&self, host: &Host<'_>, object: &ObjectInfo, record: &Group) -> Result<()> {
        let group = host.open_handle(object.handles[0].id)?;
        for mark in &record.marks {
            let watch = mark.file.as_ref().ok_or_else(|| HookError::invalid("a mark without a file"))?;
            let target = restore::target(host, watch)?;
            let place = kernel::magic_link(target.as_fd());
            let add = |flags: u32, mask: u64| {
                let flags = libc::FAN_MARK_ADD | mark.scope | flags;
                kernel::mark(group.as_fd(), flags, mask, &place).map_err(|error| {
                    HookError::failed(format!("fanotify_mark of {}", restore::shown(watch)), error)
                })
            };
            let evictable = mark.flags & EVICTABLE;
            if mark.mask != 0 {
                add(evictable, mark.mask)?;
            }
            if mark.ignored != 0 {
                let kind = match mark.flags & IGNORE {
                    0 => libc::FAN_MARK_IGNORED_MASK,
                    ignore => ignore,
                };
                add(kind | evictable | mark.flags & SURVIVES, mark.ignored)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_plugin_api::testing::Kit;

    fn marks(number: i32) -> Vec<String> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
        let mut lines: Vec<String> =
            text.lines().filter(|line| line.starts_with("fanotify")).map(Into::into).collect();
        lines.sort();
        lines
    }

    #[test]
    fn marks_of_all_scopes_come_back() {
        let Ok(group) = kernel::create_group(libc::FAN_CLASS_NOTIF, libc::O_RDONLY as u32) else {
            eprintln!("skipped: fanotify_init needs CAP_SYS_ADMIN");
            return;
        };
        let directory = std::env::temp_dir().join(format!("stasis-fanotify-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let file = directory.join("file");
        std::fs::write(&file, "x").unwrap();
        let add = |flags, mask: u64, path: &std::path::Path| {
            kernel::mark(group.as_fd(), libc::FAN_MARK_ADD | flags, mask, path).unwrap();
        };
        add(0, libc::FAN_CLOSE_WRITE, &file);
        add(0, libc::FAN_MODIFY | libc::FAN_EVENT_ON_CHILD | libc::FAN_ONDIR, &directory);
        add(libc::FAN_MARK_IGNORED_MASK | libc::FAN_MARK_IGNORED_SURV_MODIFY, libc::FAN_OPEN, &file);
        add(libc::FAN_MARK_MOUNT | libc::FAN_MARK_IGNORED_MASK, libc::FAN_MODIFY, "/proc".as_ref());
        add(libc::FAN_MARK_FILESYSTEM, libc::FAN_CLOSE_WRITE, "/dev/shm".as_ref());
        let mut kit = Kit::new();
        kit.plugin(Groups);
        let number = kit.hold(group, Groups::KIND).unwrap();
        let before = marks(number);
        assert_eq!(before.len(), 5, "{before:?}");
        kit.dump().unwrap();
        kit.restore().unwrap();
        assert_eq!(marks(number), before);
        std::fs::write(&file, "y").unwrap();
        assert!(kernel::queued(kit.fd(number)).unwrap() > 0);
        let error = kit.dump().unwrap_err().to_string();
        assert!(error.contains("nobody has read"), "{error}");
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn permission_groups_are_refused() {
        let Ok(group) = kernel::create_group(libc::FAN_CLASS_CONTENT, 0) else { return };
        let mut kit = Kit::new();
        kit.plugin(Groups);
        kit.hold(group, Groups::KIND).unwrap();
        assert!(kit.dump().unwrap_err().to_string().contains("grants permissions"));
    }
}
