//! Everything the tree holds, as far as it is known: what hooks are shown, and what becomes records.

use super::host::PidFds;
use crate::{
    files::table::{Entry, Handles},
    image::records::{FileLock, PathRef},
    tree::{Process, Tree},
};
use nix::errno::Errno;
use stasis_plugin_api::{HandleInfo, Holder, ObjectInfo, SessionInfo, TaskInfo};
use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    os::fd::OwnedFd,
};

/// An object as `describe` told of it.
#[derive(Debug)]
pub struct ObjectDraft {
    /// Number in the image, from 1.
    pub id: u32,
    /// Plugin that claims it.
    pub plugin: String,
    /// Kind within the plugin.
    pub kind: String,
    /// What makes it the same object.
    pub identity: String,
    /// Its open file descriptions, as indices.
    pub handles: Vec<usize>,
    /// Those it holds in flight.
    pub in_flight: Vec<usize>,
    /// For messages.
    pub description: String,
}

/// Who knows a handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// Core: a regular file or directory.
    Path,
    /// Nobody: the user gives a descriptor for it when it is restored.
    External,
    /// Nobody, and the user wants it left out, or /dev/null in its place.
    LeftOut { null: bool },
    /// Nobody: the dump fails.
    Refused,
    /// A plugin: index of the object, and which handle of it this is.
    Object { index: usize, role: u32 },
}

/// What the tree holds.
#[derive(Debug, Default)]
pub struct Inventory {
    /// The processes.
    pub tree: Tree,
    /// Their tables, by pid as stasis sees it.
    pub tables: BTreeMap<i32, Vec<Entry>>,
    /// Open file descriptions.
    pub handles: Handles,
    /// Who knows each of them, by index.
    pub claims: Vec<Claim>,
    /// Files of core's own, by index of the handle.
    pub paths: HashMap<usize, PathRef>,
    /// Keys of what is external, by index of the handle.
    pub external: HashMap<usize, String>,
    /// Locks on open file descriptions, by index of the handle.
    pub locks: HashMap<usize, Vec<FileLock>>,
    /// Objects of plugins.
    pub objects: Vec<ObjectDraft>,
    by_number: HashMap<(i32, i32), usize>,
    by_identity: HashMap<(String, String, String), usize>,
    image_pids: HashMap<i32, i32>,
    pidfds: PidFds,
    /// fdinfo changes from read to read for some kinds; hooks shall see one and the same text throughout a dump.
    infos: RefCell<HashMap<usize, HandleInfo>>,
}

impl Inventory {
    /// An inventory of all descriptor tables.
    pub fn new(tree: Tree, tables: BTreeMap<i32, Vec<Entry>>, handles: Handles) -> Self {
        let entries = tables.iter().flat_map(|(&pid, table)| table.iter().map(move |entry| (pid, entry)));
        let by_number = entries.map(|(pid, entry)| ((pid, entry.number), entry.handle)).collect();
        let image_pids = tree.processes.iter().map(|process| (process.host_pid, process.pid)).collect();
        Self {
            tree,
            tables,
            handles,
            claims: Vec::new(),
            paths: HashMap::new(),
            external: HashMap::new(),
            locks: HashMap::new(),
            objects: Vec::new(),
            by_number,
            by_identity: HashMap::new(),
            image_pids,
            pidfds: PidFds::default(),
            infos: RefCell::default(),
        }
    }

    /// The object of this identity, made if it is new.
    pub fn object(&mut self, plugin: &str, kind: &str, identity: &str, description: &str) -> usize {
        let next = self.objects.len();
        let key = (plugin.to_string(), kind.to_string(), identity.to_string());
        let index = *self.by_identity.entry(key).or_insert(next);
        if index == next {
            self.objects.push(ObjectDraft {
                id: next as u32 + 1,
                plugin: plugin.into(),
                kind: kind.into(),
                identity: identity.into(),
                handles: Vec::new(),
                in_flight: Vec::new(),
                description: if description.is_empty() {
                    format!("{kind} {identity}")
                } else {
                    description.into()
                },
            });
        }
        index
    }

    /// Notes the locks of a handle.
    pub fn keep_locks(&mut self, index: usize, locks: Vec<FileLock>) {
        if !locks.is_empty() {
            self.locks.insert(index, locks);
        }
    }

    /// Handles are numbered from 1 in the image.
    pub fn handle_id(index: usize) -> u32 {
        index as u32 + 1
    }

    /// What hooks are shown of a handle.
    pub fn handle_info(&self, id: u32) -> Option<HandleInfo> {
        let index = (id as usize).checked_sub(1)?;
        let handle = self.handles.all.get(index)?;
        let role = match self.claims.get(index) {
            Some(Claim::Object { role, .. }) => *role,
            _ => 0,
        };
        if let Some(info) = self.infos.borrow().get(&index) {
            return Some(HandleInfo { role, ..info.clone() });
        }
        let holders = handle.holders.iter().map(|&(pid, fd, cloexec)| Holder {
            pid: self.image_pids.get(&pid).copied().unwrap_or(pid),
            fd,
            cloexec,
        });
        let facts = &handle.facts;
        let info = HandleInfo {
            id,
            link: String::from_utf8_lossy(&facts.link).as_ref().into(),
            fdinfo: facts.info.as_str().into(),
            dev: facts.stat.st_dev,
            ino: facts.stat.st_ino,
            mode: facts.stat.st_mode,
            rdev: facts.stat.st_rdev,
            status_flags: facts.status_flags,
            position: facts.position,
            holders: holders.collect(),
            role,
        };
        self.infos.borrow_mut().insert(index, info.clone());
        Some(info)
    }

    /// Which handle number `fd` of process `pid` (of the image) is.
    pub fn handle_at(&self, pid: i32, fd: i32) -> Option<u32> {
        let host_pid = self.tree.by_pid(pid)?.host_pid;
        self.by_number.get(&(host_pid, fd)).map(|&index| Self::handle_id(index))
    }

    /// A handle of the file with this device and inode number.
    pub fn handle_of(&self, dev: u64, ino: u64) -> Option<u32> {
        self.handles.of_file(dev, ino).map(Self::handle_id)
    }

    /// Whether a handle will not be in the image as it is.
    pub fn is_left_out(&self, id: u32) -> bool {
        let claim = (id as usize).checked_sub(1).and_then(|index| self.claims.get(index));
        matches!(claim, Some(Claim::LeftOut { .. }))
    }

    /// A duplicate of a handle in this process.
    pub fn open_handle(&self, id: u32) -> Result<OwnedFd, Errno> {
        let handle =
            (id as usize).checked_sub(1).and_then(|index| self.handles.all.get(index)).ok_or(Errno::EBADF)?;
        match &handle.in_flight {
            Some(fd) => {
                fd.try_clone().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE)))
            }
            None => {
                let (pid, number) = handle.subject();
                let process = self.tree.processes.iter().find(|process| process.host_pid == pid);
                self.pidfds.get(process.map_or(pid, Process::worker), pid, number)
            }
        }
    }

    /// What hooks are shown of an object.
    pub fn object_info(&self, index: usize) -> ObjectInfo {
        let object = &self.objects[index];
        ObjectInfo {
            id: object.id,
            identity: object.identity.as_str().into(),
            handles: object
                .handles
                .iter()
                .filter_map(|&handle| self.handle_info(Self::handle_id(handle)))
                .collect(),
            in_flight: object.in_flight.iter().map(|&handle| Self::handle_id(handle)).collect(),
            description: object.description.as_str().into(),
        }
    }

    /// What hooks are shown of the tasks.
    pub fn tasks(&self) -> Vec<TaskInfo> {
        let info = |process: &Process| TaskInfo {
            pid: process.pid,
            ppid: process.ppid,
            pgid: process.pgid,
            sid: process.sid,
            host_pid: process.host_pid,
            name: process.name.as_str().into(),
        };
        self.tree.living().map(info).collect()
    }

    /// Sessions with a controlling terminal, each once.
    pub fn sessions(&self) -> Vec<SessionInfo> {
        use crate::proc::status::StatField;
        let mut sessions: BTreeMap<i32, SessionInfo> = BTreeMap::new();
        for process in self.tree.living() {
            let field = |field| process.stat.get(field).unwrap_or_default() as i32;
            let terminal = field(StatField::TtyNr);
            if terminal == 0 {
                continue;
            }
            let foreground = field(StatField::Tpgid);
            let leader = self.tree.by_pid(process.sid);
            sessions.entry(process.sid).or_insert_with(|| SessionInfo {
                sid: process.sid,
                leader_in_tree: leader.is_some_and(|leader| leader.sid == process.sid && !leader.zombie),
                terminal: decode_terminal(terminal as u32),
                // proc(5) gives it as stasis sees it.
                foreground: self.image_pids.get(&foreground).copied().unwrap_or(foreground),
            });
        }
        sessions.into_values().collect()
    }
}

/// The kernel's `new_encode_dev` (include/linux/kdev_t.h), as in stat(5), to `makedev`.
fn decode_terminal(encoded: u32) -> u64 {
    let major = (encoded & 0xfff00) >> 8;
    let minor = (encoded & 0xff) | ((encoded >> 12) & 0xfff00);
    libc::makedev(major, minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_numbers_are_decoded() {
        assert_eq!(decode_terminal(0x8803), libc::makedev(136, 3));
        assert_eq!(decode_terminal(0x0010_8800 | 0x05), libc::makedev(136, 0x105));
    }
}
