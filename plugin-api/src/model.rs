//! The nouns that core and plugins share. All of them cross the ABI, hence `RString` and `RVec`, which behave like
//! `String` and `Vec`. Process ids are those of the innermost pid namespace of the task, as the image keeps them.

use crate::{HookError, Result};
use abi_stable::{
    StableAbi,
    std_types::{RSlice, RString, RVec},
};

/// Which resources a kind claims. Data, so that dispatch is a look-up and `stasis plugins` can print it.
#[repr(u8)]
#[derive(StableAbi, Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Selector {
    /// A descriptor whose link is `anon_inode:NAME`; the name as it stands there, e.g. `[eventfd]`.
    AnonInode(RString),
    /// A descriptor on a file system with this magic (statfs(2)).
    Filesystem(u64),
    /// A descriptor of this file type (`S_IFIFO`, ...), if no more special selector claims it.
    FileType(u32),
    /// A socket; -1 for any type or protocol (socket(7): `SO_DOMAIN`, `SO_TYPE`, `SO_PROTOCOL`).
    Socket {
        /// Address family, e.g. `AF_UNIX`.
        domain: i32,
        /// e.g. `SOCK_STREAM`, or -1.
        kind: i32,
        /// e.g. `IPPROTO_TCP`, or -1.
        protocol: i32,
    },
    /// Character devices of this major number and a range of minor numbers (inclusive).
    CharDevice {
        /// Major number.
        major: u32,
        /// First minor number.
        first: u32,
        /// Last minor number.
        last: u32,
    },
    /// Block devices, likewise.
    BlockDevice {
        /// Major number.
        major: u32,
        /// First minor number.
        first: u32,
        /// Last minor number.
        last: u32,
    },
    /// Paths that start with this prefix.
    PathPrefix(RString),
    /// A namespace type, named as in `/proc/PID/ns`.
    Namespace(RString),
    /// Sessions whose controlling terminal has this major number.
    Terminal(u32),
    /// A mapping of a file whose path (in `/proc/PID/maps`) starts with this.
    Mapping(RString),
    /// Whatever `claims` says, asked after all data selectors.
    Predicate,
}

/// One resource kind of a plugin.
#[repr(C)]
#[derive(StableAbi, Debug, Clone)]
pub struct KindDeclaration {
    /// Name, unique within the plugin; part of image records.
    pub name: RString,
    /// What it claims.
    pub selectors: RVec<Selector>,
    /// Kinds (of any plugin) whose objects must be created before its own.
    pub after: RVec<RString>,
    /// Full protobuf name of its record message; empty if it has none.
    pub message: RString,
    /// For namespaces: the `CLONE_NEW*` flag; otherwise 0.
    pub clone_flag: u64,
}

/// An option that a plugin declares; given on the command line as `--NAME[=VALUE]`.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Copy)]
pub struct OptionDeclaration {
    /// Without the dashes.
    pub name: RSlice<'static, u8>,
    /// One line for `--help`.
    pub help: RSlice<'static, u8>,
    /// Whether it takes a value.
    pub takes_value: bool,
    /// Whether the value may be left out; the option is then the empty string.
    pub value_optional: bool,
}

impl OptionDeclaration {
    /// A switch without value.
    pub const fn switch(name: &'static str, help: &'static str) -> Self {
        Self {
            name: RSlice::from_slice(name.as_bytes()),
            help: RSlice::from_slice(help.as_bytes()),
            takes_value: false,
            value_optional: false,
        }
    }

    /// An option with a value.
    pub const fn value(name: &'static str, help: &'static str) -> Self {
        Self { takes_value: true, ..Self::switch(name, help) }
    }

    /// An option that is given as `--NAME` or `--NAME=VALUE`.
    pub const fn optional_value(name: &'static str, help: &'static str) -> Self {
        Self { value_optional: true, ..Self::value(name, help) }
    }
}

/// Who a plugin is and what it claims.
#[repr(C)]
#[derive(StableAbi, Debug, Clone)]
pub struct PluginDeclaration {
    /// Name, as used by `--plugins`.
    pub name: RString,
    /// Version of the plugin itself.
    pub version: RString,
    /// Options it declares.
    pub options: RVec<OptionDeclaration>,
    /// Serialized `google.protobuf.FileDescriptorSet` of its records.
    pub records: RVec<u8>,
}

/// A task and descriptor number that refer to an open file description.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Process.
    pub pid: i32,
    /// Descriptor number.
    pub fd: i32,
    /// Close-on-exec.
    pub cloexec: bool,
}

/// An open file description, as core found it (on dump) or has it in the image (on restore: no link, fdinfo or stat).
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Default)]
pub struct HandleInfo {
    /// Number of the handle in this image.
    pub id: u32,
    /// `/proc/PID/fd/N` as a link.
    pub link: RString,
    /// Contents of `/proc/PID/fdinfo/N` (proc(5)).
    pub fdinfo: RString,
    /// `st_dev`.
    pub dev: u64,
    /// `st_ino`.
    pub ino: u64,
    /// `st_mode`.
    pub mode: u32,
    /// `st_rdev`.
    pub rdev: u64,
    /// Open flags without `O_CLOEXEC`.
    pub status_flags: u32,
    /// File position.
    pub position: u64,
    /// Who holds it; empty if it is only in flight.
    pub holders: RVec<Holder>,
    /// What `describe` said.
    pub role: u32,
}

impl HandleInfo {
    /// The text after `NAME:` in fdinfo (proc(5), proc_pid_fdinfo(5)), without the blanks around it.
    pub fn field(&self, name: &str) -> Result<&str> {
        self.fdinfo
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
            .ok_or_else(|| HookError::invalid(format!("fdinfo has no field {name}")))
    }
}

/// What `describe` found.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Default)]
pub struct Described {
    /// Identity of the object within its kind: handles with the same identity belong to one object.
    pub identity: RString,
    /// Which handle of the object this is (e.g. 0 the read end, 1 the write end); the plugin's own numbering.
    pub role: u32,
    /// For messages, e.g. `pipe:[4711]`.
    pub description: RString,
    /// Descriptors (owned, of the calling process) that this object holds in flight; core takes and closes them.
    pub in_flight: RVec<i32>,
}

/// An object with all its handles.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Default)]
pub struct ObjectInfo {
    /// Number of the object in this image.
    pub id: u32,
    /// What `describe` called it (on dump).
    pub identity: RString,
    /// Its handles.
    pub handles: RVec<HandleInfo>,
    /// On dump: the handles it holds in flight, in the order `describe` gave them.
    pub in_flight: RVec<u32>,
    /// For messages.
    pub description: RString,
}

/// In which process a restore phase of an object runs.
#[repr(u8)]
#[derive(StableAbi, Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ActorKind {
    /// The first task that holds one of its handles.
    #[default]
    Any,
    /// The task with pid `pid`.
    Task,
    /// The session leader `pid`, after setsid and before its children are forked (create only).
    SessionLeader,
    /// Pid `pid`, which is no task of the image: a helper with that pid, which must be free.
    StandIn,
}

/// In which process, and with which ids, a restore phase runs: the kernel remembers the doer of many operations.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Actor {
    /// Kind of process.
    pub kind: ActorKind,
    /// Its pid, unless any.
    pub pid: i32,
    /// Effective uid while the hook runs (user namespace of the task), or -1 to leave it.
    pub uid: i64,
    /// Effective gid, or -1.
    pub gid: i64,
}

impl Actor {
    /// Any task.
    pub const ANY: Self = Self { kind: ActorKind::Any, pid: 0, uid: -1, gid: -1 };
    /// Task `pid`.
    pub const fn task(pid: i32) -> Self {
        Self { kind: ActorKind::Task, pid, ..Self::ANY }
    }
    /// Session leader `pid`, before it forks.
    pub const fn session_leader(pid: i32) -> Self {
        Self { kind: ActorKind::SessionLeader, pid, ..Self::ANY }
    }
    /// A helper with pid `pid`.
    pub const fn stand_in(pid: i32) -> Self {
        Self { kind: ActorKind::StandIn, pid, ..Self::ANY }
    }
    /// The same with these effective ids.
    #[must_use]
    pub const fn with_ids(self, uid: u32, gid: u32) -> Self {
        Self { uid: uid as i64, gid: gid as i64, ..self }
    }
}

/// What `dump` gives for an object. `R` is the kind's record, or its bytes across the ABI.
#[repr(C)]
#[derive(StableAbi, Debug, Clone)]
pub struct Dumped<R> {
    /// The record.
    pub record: R,
    /// Version of the record's meaning; given back on restore.
    pub version: u32,
    /// Handles whose objects must be created before this one.
    pub after: RVec<u32>,
    /// Handles that `link` or `settle` will ask for.
    pub uses: RVec<u32>,
    /// Where `create` runs.
    pub create_as: Actor,
    /// Where `link` runs.
    pub link_as: Actor,
    /// Where `settle` runs.
    pub settle_as: Actor,
    /// How many descriptors `create` makes beyond one per handle. They belong to no task of the tree: other hooks get
    /// them by [`Host::open_auxiliary`](crate::Host::open_auxiliary), and they are closed when all objects are settled.
    pub auxiliaries: u32,
}

impl<R> Dumped<R> {
    /// A record that depends on nothing and is created by any holder.
    pub fn new(record: R) -> Self {
        Self {
            record,
            version: 1,
            after: RVec::new(),
            uses: RVec::new(),
            create_as: Actor::ANY,
            link_as: Actor::ANY,
            settle_as: Actor::ANY,
            auxiliaries: 0,
        }
    }

    /// The same with another record type.
    pub fn map<S>(self, f: impl FnOnce(R) -> S) -> Dumped<S> {
        let Self { record, version, after, uses, create_as, link_as, settle_as, auxiliaries } = self;
        Dumped { record: f(record), version, after, uses, create_as, link_as, settle_as, auxiliaries }
    }
}

/// A task, as far as plugins need to know it.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Default)]
pub struct TaskInfo {
    /// Process id.
    pub pid: i32,
    /// Parent.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// Pid as stasis sees it. On restore 0, except in lifecycle hooks from [`Event::Restored`] on, and that of the root
    /// at [`Event::Cloned`].
    pub host_pid: i32,
    /// Command name.
    pub name: RString,
}

/// A session with a controlling terminal.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Default)]
pub struct SessionInfo {
    /// Session id.
    pub sid: i32,
    /// Whether the leader is a task of the tree.
    pub leader_in_tree: bool,
    /// Device number of the terminal (`makedev`).
    pub terminal: u64,
    /// Foreground process group, or -1.
    pub foreground: i32,
}

/// A namespace with at least one task of the tree in it, other than the one stasis itself is in.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Default)]
pub struct NamespaceInfo {
    /// Number in this image.
    pub id: u32,
    /// Type, as in `/proc/PID/ns`.
    pub kind: RString,
    /// Inode number of the namespace.
    pub ino: u64,
    /// Tasks in it.
    pub members: RVec<i32>,
}

/// What `dump` gives for a namespace.
#[repr(C)]
#[derive(StableAbi, Debug, Clone)]
pub struct DumpedNamespace<R> {
    /// The record.
    pub record: R,
    /// Version of its meaning.
    pub version: u32,
}

/// A mapping that a plugin may claim.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Default)]
pub struct VmaInfo {
    /// Process that has it.
    pub pid: i32,
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// `PROT_*`.
    pub prot: u32,
    /// Whether it is MAP_SHARED.
    pub shared: bool,
    /// Offset in bytes.
    pub offset: u64,
    /// `st_dev` of the file.
    pub dev: u64,
    /// `st_ino` of the file.
    pub ino: u64,
    /// Path as in `/proc/PID/maps`.
    pub path: RString,
}

/// Points in the life of a dump or restore at which Lifecycle hooks run.
#[repr(u8)]
#[derive(StableAbi, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Dump: nothing is stopped yet.
    BeforeFreeze,
    /// Dump: the whole tree is stopped.
    Frozen,
    /// Dump: the image is complete.
    Dumped,
    /// Dump: the tree is about to run on.
    BeforeResume,
    /// Restore: nothing is created yet.
    BeforeRestore,
    /// Restore: the process tree exists.
    Forked,
    /// Restore: everything is in place, nothing runs yet.
    Restored,
    /// Restore: the tree runs.
    Resumed,
    /// Dump or restore failed; always runs.
    Aborted,
    /// `stasis unlock`: the image is given up, and what its dump kept outside for a restore must go.
    Unlock,
    /// Restore: the root task exists, and waits; its id maps are written. All others will be forked by it.
    Cloned,
}

/// Something the guardian does with a descriptor, whatever happens to the command and its plugins: see [`Host::undo`](crate::Host::undo).
#[repr(u8)]
#[derive(StableAbi, Debug, Clone, PartialEq, Eq)]
pub enum UndoStep {
    /// setsockopt(2).
    SetOption {
        /// e.g. `SOL_SOCKET`
        level: i32,
        /// Number of the option.
        name: i32,
        /// Its value.
        value: RVec<u8>,
    },
    /// write(2) of these bytes, once.
    Write(RVec<u8>),
    /// unlinkat(2) with `AT_REMOVEDIR` of this name in the directory; a directory that is in use by processes that are just
    /// ending is tried again for a moment.
    RemoveDirectory(RString),
    /// The other way round: write(2) of these bytes, once, if the tree is killed, when all its tasks are gone and before any descriptor is
    /// closed. Nothing if it runs on.
    WriteWhenKilled(RVec<u8>),
    /// A system call that takes numbers only, for what has no descriptor.
    Syscall {
        /// Number.
        number: i64,
        /// Arguments.
        arguments: [u64; 6],
    },
}
