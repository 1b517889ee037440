//! Process and user ids, ours and those of the tree's own namespaces.

use crate::{
    EXTERNAL_SOCKETS, diag,
    namespace::{self, PeerInside},
    record::stasis::unix::v1::Credentials,
    sys::PeerCredentials,
};
use stasis_plugin_api::{Actor, HookError, Host, ObjectInfo, Result, namespace::IdMap};
use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
};

/// A task whose namespaces are those of an object, and ways to ask for them.
pub(crate) struct Context<'a, 'h> {
    pub host: &'a Host<'h>,
    holder: i32,
    proc: File,
}

impl<'a, 'h> Context<'a, 'h> {
    /// Of the first task that holds the object; those that are only in flight are taken for the root's.
    pub fn new(host: &'a Host<'h>, object: &ObjectInfo) -> Result<Self> {
        let holder = object.handles.iter().find_map(|handle| handle.holders.first()).map(|holder| holder.pid);
        let holder = holder.or_else(|| host.tasks().first().map(|task| task.pid));
        let holder = holder.ok_or_else(|| HookError::invalid("the tree has no task"))?;
        Ok(Self { host, holder, proc: File::from(host.open_proc(holder)?) })
    }

    /// A file in the holder's `/proc/PID`.
    pub fn path(&self, file: &str) -> String {
        format!("/proc/self/fd/{}/{file}", self.proc.as_raw_fd())
    }

    /// A socket lives in the network namespace in which it was made.
    pub fn check_network(&self, fd: BorrowedFd<'_>, label: &str) -> Result<()> {
        let stat = |result: io::Result<fs::Metadata>| {
            result.map(|stat| stat.ino()).map_err(|error| HookError::failed("stat of a net namespace", error))
        };
        let socket = stat(diag::namespace(fd)?.metadata())?;
        let task = stat(fs::metadata(self.path("ns/net")))?;
        if socket == task {
            return Ok(());
        }
        let why = format!("it belongs to net:[{socket}], and its holder {} is in net:[{task}]", self.holder);
        Err(HookError::unsupported(
            label,
            why,
            "close it, or dump a tree whose tasks are all in its namespace",
        ))
    }

    /// A user or group id within the tree; `map` is `uid_map` or `gid_map`.
    pub fn id(&self, map: &str, outside: u32, label: &str) -> Result<u32> {
        let path = self.path(map);
        let text = fs::read_to_string(&path)
            .map_err(|error| HookError::failed(format!("reading {map} of task {}", self.holder), error))?;
        IdMap::parse(&text).inside(outside).ok_or_else(|| {
            let why = format!(
                "id {outside} of its creator, sender or file does not exist in the tree's user namespace"
            );
            HookError::unsupported(label, why, "dump the tree together with that user namespace")
        })
    }

    /// What a process number of ours is within the tree.
    fn task(&self, host_pid: i32) -> Option<i32> {
        self.host.tasks().iter().find(|task| task.host_pid == host_pid).map(|task| task.pid)
    }

    /// As whom a hook must run so that SO_PEERCRED is what it was; `None` if any process will do.
    pub fn creator(
        &self,
        fd: BorrowedFd<'_>,
        peer: PeerCredentials,
        label: &str,
    ) -> Result<Option<(Actor, Credentials)>> {
        if !peer.is_known() {
            return Ok(None);
        }
        match self.known_creator(fd, peer, label) {
            Ok(creator) => Ok(Some(creator)),
            Err(error) if self.host.has_option(EXTERNAL_SOCKETS) => {
                self.host
                    .warn(&format!("{}; after restore SO_PEERCRED will show a task of the tree", error.what));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn known_creator(
        &self,
        fd: BorrowedFd<'_>,
        peer: PeerCredentials,
        label: &str,
    ) -> Result<(Actor, Credentials)> {
        let PeerCredentials { pid, uid, gid } = peer;
        let uid = self.id("uid_map", uid, label)?;
        let gid = self.id("gid_map", gid, label)?;
        let refuse = |what: &str| {
            let why = format!("SO_PEERCRED of it is process {pid}, {what}");
            let remedy = format!(
                "dump a tree that holds that process, or give --{EXTERNAL_SOCKETS} to have a task of the tree there"
            );
            Err(HookError::unsupported(label, why, remedy))
        };
        let actor = if let Some(task) = self.task(pid) {
            Actor::task(task)
        } else if self.host.tasks().iter().any(|task| task.host_pid != task.pid) {
            match namespace::peer_inside(fd, File::open(self.path("ns/pid")))? {
                PeerInside { pid: 0, .. } => return refuse("which is not in the tree's pid namespace"),
                PeerInside { lives: true, .. } => return refuse("which is not part of the tree"),
                PeerInside { pid, .. } => Actor::stand_in(pid),
            }
        } else if pid <= 0 || fs::exists(format!("/proc/{pid}")).unwrap_or(true) {
            return refuse("which is not part of the tree");
        } else {
            Actor::stand_in(pid)
        };
        Ok((actor.with_ids(uid, gid), Credentials { pid: actor.pid, uid, gid }))
    }

    /// Credentials of a queued message. `wanted`: its receiver will be shown them.
    pub fn sender(&self, sender: PeerCredentials, wanted: bool, label: &str) -> Result<Option<Credentials>> {
        // 0: the message was sent without, and the kernel filled in nobody.
        if sender.pid == 0 {
            return Ok(None);
        }
        let known = || -> Result<Credentials> {
            let pid = self.task(sender.pid).ok_or_else(|| {
                let why = format!("a message from process {}, outside the tree, is in its queue", sender.pid);
                HookError::unsupported(label, why, "let the program read it first")
            })?;
            let uid = self.id("uid_map", sender.uid, label)?;
            let gid = self.id("gid_map", sender.gid, label)?;
            Ok(Credentials { pid, uid, gid })
        };
        match known() {
            Ok(credentials) => Ok(Some(credentials)),
            Err(error) if wanted => Err(error),
            // The receiver has not asked for credentials (SO_PASSCRED).
            Err(_) => Ok(None),
        }
    }
}
