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
//! # The life of a hook
//!
//! On **dump** everything runs in the command process while the tree is frozen. [`Descriptor::describe`] only looks;
//! core repeats it until no further handle turns up, and refuses the dump, with the full list, if something is claimed
//! by nobody. [`Descriptor::dump`] writes one record per object and *consumes nothing*; what can only be read by taking
//! it out is taken in [`Descriptor::commit`], which runs only when the tree is going to be killed.
//!
//! On **restore** hooks run inside the restored tasks themselves, before their own memory and threads are in place: a
//! descriptor is therefore opened in the right namespaces and with the right powers. Three phases, with a barrier over
//! the whole tree after each: [`Descriptor::create`] makes the object, [`Descriptor::link`] may reach every other object
//! ([`Host::open_handle`]), [`Descriptor::settle`] sees every descriptor at its final number. The [`Actor`] in a
//! [`Dumped`] says in which task each of the three runs.
//!
//! # Safety nets
//!
//! Hooks are plain safe Rust. A panic becomes an error that names the plugin; a hang is ended by `--plugin-timeout`; a
//! crash ends the command, and the guardian process puts the tree back as it was.
//!
//! # Versions
//!
//! This crate is 1.x from the first day. A plugin built against an older minor of the same major is loaded by a newer
//! host; another major is refused by name. Fields and methods are only ever appended. The promise starts with the first
//! published release.

pub mod abi;
#[cfg(feature = "build")]
pub mod build;
mod error;
pub mod forward_log;
mod guard;
mod hooks;
mod host;
mod model;
#[doc(hidden)]
pub mod register;
pub mod socket;
#[cfg(feature = "testing")]
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
