//! The traits that authors implement.

use crate::{
    Described, Dumped, DumpedNamespace, Event, HandleInfo, Host, NamespaceInfo, ObjectInfo, Result, Selector,
    SessionInfo, TaskInfo, VmaInfo,
};
use std::os::fd::{BorrowedFd, OwnedFd};

/// A kind of descriptor: an *object* (the pipe, the socket) and its *handles*, the open file descriptions that refer to
/// it. Core keeps number, close-on-exec, status flags, position, owner and signal of every handle.
pub trait Descriptor: Send + Sync + 'static {
    /// What the image keeps of one object.
    type Record: prost::Message + prost::Name + Default;
    /// Name of the kind.
    const KIND: &'static str;

    /// What this kind claims.
    fn selectors(&self) -> Vec<Selector>;

    /// Kinds whose objects must be created first.
    fn after(&self) -> Vec<&'static str> {
        Vec::new()
    }

    /// For [`Selector::Predicate`] only: whether this kind takes the handle. Read-only, and asked for most descriptors of a tree: what
    /// cannot be told by the link needs a duplicate from [`Host::open_handle`]. It is also asked about mapped files that nobody may
    /// have open, which have no handle number (0).
    fn claims(&self, _host: &Host<'_>, _handle: &HandleInfo) -> bool {
        false
    }

    /// Says which object a handle refers to. Read-only. `fd` is a duplicate in this process.
    fn describe(&self, host: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described>;

    /// Writes the record of an object, with all its handles known. Consumes nothing.
    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Self::Record>>;

    /// Takes out what can only be read by consuming it; runs last, only if the tree is to be killed.
    fn commit(&self, _host: &Host<'_>, _object: &ObjectInfo) -> Result<()> {
        Ok(())
    }

    /// Makes the object: one descriptor per entry of `object.handles`, in that order; then the auxiliary ones, if `dump`
    /// announced any ([`Dumped::auxiliaries`]).
    fn create(&self, host: &Host<'_>, object: &ObjectInfo, record: &Self::Record) -> Result<Vec<OwnedFd>>;

    /// Every object exists.
    fn link(&self, _host: &Host<'_>, _object: &ObjectInfo, _record: &Self::Record) -> Result<()> {
        Ok(())
    }

    /// Every descriptor is at its final number in every task.
    fn settle(&self, _host: &Host<'_>, _object: &ObjectInfo, _record: &Self::Record) -> Result<()> {
        Ok(())
    }
}

/// Finds the object behind a session's controlling terminal, even if no descriptor refers to it any more. The object
/// belongs to the [`Descriptor`] kind of the same name in the same plugin.
pub trait Session: Send + Sync + 'static {
    /// Name of the kind, the same as that of the plugin's [`Descriptor`].
    const KIND: &'static str;
    /// [`Selector::Terminal`]s.
    fn selectors(&self) -> Vec<Selector>;
    /// The object behind the terminal, or `None` if the session's terminal is outside the tree and may stay there.
    fn describe(&self, host: &Host<'_>, session: &SessionInfo) -> Result<Option<Described>>;
}

/// A namespace type.
pub trait Namespace: Send + Sync + 'static {
    /// What the image keeps of one namespace.
    type Record: prost::Message + prost::Name + Default;
    /// Name of the type, as in `/proc/PID/ns`.
    const KIND: &'static str;
    /// `CLONE_NEW*`.
    const CLONE_FLAG: u64;
    /// Namespace types that must be set up before this one.
    fn after(&self) -> Vec<&'static str> {
        Vec::new()
    }
    /// Writes the record of a namespace.
    fn dump(&self, host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<Self::Record>>;
    /// Runs in the command, outside, when the first task was cloned into the new namespace and waits: id maps, say.
    fn prepare(&self, _host: &Host<'_>, _record: &Self::Record, _host_pid: i32) -> Result<()> {
        Ok(())
    }
    /// Runs in the first task inside, before any other task is forked: mounts, say.
    fn enter(&self, _host: &Host<'_>, _record: &Self::Record) -> Result<()> {
        Ok(())
    }
    /// Runs in the first task inside when all descriptors of all tasks are settled.
    fn finish(&self, _host: &Host<'_>, _record: &Self::Record) -> Result<()> {
        Ok(())
    }
}

/// A mapping that is neither plain memory nor a plain file.
pub trait Mapping: Send + Sync + 'static {
    /// What the image keeps of one mapping.
    type Record: prost::Message + prost::Name + Default;
    /// Name of the kind.
    const KIND: &'static str;
    /// [`Selector::Mapping`], [`Selector::CharDevice`] or [`Selector::Predicate`].
    fn selectors(&self) -> Vec<Selector>;
    /// For [`Selector::Predicate`] only: whether this kind takes the mapping. Read-only.
    fn claims(&self, _host: &Host<'_>, _vma: &VmaInfo) -> bool {
        false
    }
    /// Writes the record of a mapping. Its contents, too, are the plugin's: core keeps none of its pages.
    fn dump(&self, host: &Host<'_>, vma: &VmaInfo) -> Result<Self::Record>;
    /// Maps it, in the task, at exactly `vma.start` (a temporary place; core moves it home with mremap(2)). All descriptors
    /// exist and are linked. Of `vma` there are the task, the place, protection and offset.
    fn map(&self, host: &Host<'_>, vma: &VmaInfo, record: &Self::Record) -> Result<()>;
}

/// State of a task that core does not know.
pub trait Task: Send + Sync + 'static {
    /// What the image keeps of one task.
    type Record: prost::Message + prost::Name + Default;
    /// Name of the kind.
    const KIND: &'static str;
    /// The record of a task, or `None` if it has no such state.
    fn dump(&self, host: &Host<'_>, task: &TaskInfo) -> Result<Option<Self::Record>>;
    /// Runs in the task, after settle.
    fn restore(&self, host: &Host<'_>, task: &TaskInfo, record: &Self::Record) -> Result<()>;
}

/// Runs at fixed points of every dump and restore, in the command process.
pub trait Lifecycle: Send + Sync + 'static {
    /// Name of the kind.
    const KIND: &'static str;
    /// An error ends the dump or restore, except at [`Event::Aborted`] and [`Event::Resumed`], where it is a warning.
    fn event(&self, host: &Host<'_>, event: Event) -> Result<()>;
}
