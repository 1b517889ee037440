//! Everything an author of a `stasis` resource plugin needs.
//!
//! A plugin is a `cdylib` that depends on this crate (and, because of a macro, on `abi_stable`). It holds one type per
//! resource kind, an implementation of a hook trait for each, one [`register!`] line per kind and one
//! [`export_plugin!`] line:
//!
//! ```ignore
//! struct Counter;
//! impl Descriptor for Counter { /* describe, dump, create */ }
//! register!(descriptor: Counter);
//! export_plugin! { name: "counter", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
//! ```
//!
//! [`guide`] tells the rest: what a plugin claims, the life of its hooks in dumps and restores, records, host services, tests, and
//! the versioning promise.

pub mod abi;
#[cfg(feature = "build")]
pub mod build;
mod error;
pub mod forward_log;
mod guard;
pub mod guide;
mod hooks;
mod host;
mod model;
pub mod namespace;
#[doc(hidden)]
pub mod register;
pub mod socket;
#[cfg(any(feature = "testing", doc))]
pub mod testing;

pub use error::{ErrorKind, HookError, Result};
pub use hooks::{Descriptor, Lifecycle, Mapping, Namespace, Session, Task};
pub use host::Host;
pub use model::{
    Actor, ActorKind, Described, Dumped, DumpedNamespace, Event, HandleInfo, Holder, KindDeclaration,
    NamespaceInfo, ObjectInfo, OptionDeclaration, PluginDeclaration, Selector, SessionInfo, TaskInfo,
    UndoStep, VmaInfo,
};
pub use register::Registration;

#[doc(hidden)]
pub use {abi_stable, inventory};

pub use prost;
