//! The author's guide: how a plugin of your own comes about, what its hooks may rely on, and what they must hold to.
//!
//! # The shortest way
//!
//! `stasis plugins new NAME` writes a crate that builds as it is: one kind in 60 lines, its record, three tests. It depends on this
//! crate alone (and on `abi_stable` and `prost`, to which macros expand). Change the selectors, the record and the hooks; then
//!
//! ```text
//! cargo test && cargo build
//! stasis plugins --plugin-dir target/debug                        # who claims what
//! stasis dump --dry-run -t PID --plugin-dir INSTALLED --plugin-dir target/debug
//! ```
//! `--plugin-dir` takes the place of the default directories, so the installed plugins are named, too. To install a plugin, copy the
//! library to `<prefix>/lib/stasis/plugins` under the name `libstasis_plugin_NAME.so`. Root does not load what others can write to.
//!
//! # A whole plugin
//!
//! ```
//! use stasis_plugin_api::*;
//! use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
//!
//! /// What an image keeps. As a rule `record.proto` is compiled into this, by `build::records` in the build script.
//! #[derive(Clone, PartialEq, prost::Message)]
//! struct Count {
//!     #[prost(uint64, tag = "1")]
//!     value: u64,
//! }
//! impl prost::Name for Count {
//!     const NAME: &'static str = "Count";
//!     const PACKAGE: &'static str = "guide.v1";
//! }
//!
//! struct Counter;
//!
//! impl Descriptor for Counter {
//!     type Record = Count;
//!     const KIND: &'static str = "counter";
//!
//!     fn selectors(&self) -> Vec<Selector> {
//!         vec![Selector::AnonInode("[eventfd]".into())]
//!     }
//!
//!     fn describe(&self, _: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
//!         let identity = handle.field("eventfd-id")?;
//!         Ok(Described { identity: identity.into(), ..Described::default() })
//!     }
//!
//!     fn dump(&self, _: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Count>> {
//!         let value = u64::from_str_radix(object.handles[0].field("eventfd-count")?, 16);
//!         let value = value.map_err(|error| HookError::invalid(format!("eventfd-count: {error}")))?;
//!         if value > 1000 {
//!             return Err(HookError::unsupported("a counter", "it has counted too far", "let the program read it"));
//!         }
//!         Ok(Dumped::new(Count { value }))
//!     }
//!
//!     fn create(&self, _: &Host<'_>, _: &ObjectInfo, record: &Count) -> Result<Vec<OwnedFd>> {
//!         // SAFETY: two integers.
//!         let fd = unsafe { libc::eventfd(record.value as u32, 0) };
//!         if fd < 0 {
//!             return Err(HookError::failed("eventfd", std::io::Error::last_os_error()));
//!         }
//!         // SAFETY: the kernel has just made it.
//!         Ok(vec![unsafe { OwnedFd::from_raw_fd(fd) }])
//!     }
//! }
//!
//! register!(descriptor: Counter);
//! export_plugin! { name: "guide", records: &[] } // as a rule: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin"))
//!
//! # fn main() -> Result<()> {
//! # #[cfg(feature = "testing")] {
//! // Its test: dump and restore in this process, through the ABI, without root.
//! let mut kit = testing::Kit::new();
//! kit.plugin(Counter);
//! // SAFETY: two integers; the descriptor is new.
//! let number = kit.hold(unsafe { OwnedFd::from_raw_fd(libc::eventfd(7, 0)) }, Counter::KIND)?;
//! kit.dump()?;
//! kit.restore()?;
//! let mut value = 0u64;
//! // SAFETY: room for the eight bytes of a count.
//! let n = unsafe { libc::read(number, (&raw mut value).cast(), 8) };
//! assert_eq!((n, value), (8, 7));
//! # }
//! # Ok(())
//! # }
//! ```
//!
//! # What a plugin claims
//!
//! A [`Selector`] is data. Core looks a resource up in one table of all plugins; the more special selector comes first: names of anonymous
//! inodes, then sockets (domain, type and protocol before domain alone), device numbers (a narrow range before a wide one), file systems,
//! path prefixes (long before short), file types, and last [`Selector::Predicate`], for which the kind itself is asked
//! ([`Descriptor::claims`]). Two plugins with the very same selector are an error when they are loaded, which names both, unless the user
//! says `--prefer NAME`; that puts all that the plugin claims before everybody else, its predicates included. So a plugin for *some*
//! sockets of a kind has a predicate, an option that says which (see `tests/external-plugin/redis-link`), and users who prefer it.
//!
//! A resource that nobody claims stops the dump before anything is touched, as does one whose `describe` says
//! [`HookError::unsupported`]: core lists them all, with the plugin or flag that would change it. Core itself takes regular files and
//! directories, and whatever is open with `O_PATH`.
//!
//! An *object* is what the kernel has once: a pipe, a socket. Its *handles* are the open file descriptions that refer to it, its *holders* the
//! descriptors in tasks. Core finds out which descriptors are the same description (kcmp(2)) and keeps number, close-on-exec, status flags,
//! position, owner and signal of each. The plugin says in [`Described::identity`] which handles are one object, and in [`Described::role`]
//! which is which.
//!
//! # A dump, hook by hook
//!
//! Everything runs in the command, outside of the tree, while the tree stands still. None of it needs care for concurrency.
//!
//! | hook | may | must not |
//! |---|---|---|
//! | [`Lifecycle::event`] `BeforeFreeze`, `Frozen` | prepare, lock from outside ([`Host::undo`] first) | |
//! | [`Descriptor::describe`] | look at its duplicate of the descriptor; give further ones that the object holds in flight | change anything |
//! | [`Descriptor::dump`], [`Mapping::dump`], [`Namespace::dump`], [`Task::dump`] | read all it wants, write blobs, make system calls in a frozen task | consume anything |
//! | [`Descriptor::commit`] | take out what can only be read by taking it out | fail without putting it back |
//! | `Dumped`, `BeforeResume` or `Aborted` | tidy up | |
//!
//! `commit` runs last, and only if the tree is killed afterwards ([`Host::ends_tree`]). If the tree runs on, what it would have taken is
//! refused by `dump`, or documented as lost.
//!
//! A change of the tree that must be undone, whoever dies, is announced *before* it is made: [`Host::undo`] gives the guardian, a
//! process that no plugin can crash, a descriptor and what to do with it.
//!
//! In a dry run ([`Host::is_dry_run`]) the tree is not frozen. `describe` and `dump` are called for what they refuse; they skip what has
//! effects, however short, and what takes long.
//!
//! # A restore, phase by phase
//!
//! Hooks run inside the restored tasks, which have their namespaces and still all privileges, but not their memory and threads yet. A hook
//! must not start threads that live on, nor keep descriptors open.
//!
//! 1. **create** makes the object: one descriptor per handle, in the order of `object.handles`, then those of [`Dumped::auxiliaries`]. Only
//!    objects named in [`Dumped::after`] exist. Nothing but the access mode, and what only open(2) can set, need be right: core puts the
//!    descriptors at their numbers and sets flags and positions.
//! 2. **link**: all objects exist, and [`Host::open_handle`] gives any of them. Connections, contents of queues.
//! 3. Memory is filled. [`Mapping::map`] runs in each task that has the mapping.
//! 4. **settle**: every descriptor is at its number in every task; nobody opens, maps or renames any more. Watches belong here.
//! 5. [`Task::restore`], then credentials, then everything runs.
//!
//! Between the phases the whole tree waits for each other, so no plugin orders itself against another by luck. *Which* task does something is
//! up to [`Dumped::create_as`] and its kin: the kernel remembers the doer of a connect(2) or an epoll_ctl(2). The default is the first task that
//! holds a handle.
//!
//! # Records
//!
//! A record is a protobuf message, written when the image is, and read by whatever version of the plugin does the restore: the same major
//! version, and no older minor one. So fields are only ever appended, and a new field's absence means what was true before. Its bytes are decoded
//! once before they go into the image. An image brings the descriptors of its records, so `stasis inspect` shows them to people without the
//! plugin: name fields for readers. What is large goes into a blob ([`Host::blob_writer`]), which is streamed.
//!
//! On restore, everything in a record is input from outside. Check lengths, and return errors: a panic is caught, but reads badly.
//!
//! # Errors
//!
//! ```
//! use stasis_plugin_api::{ErrorKind, HookError};
//!
//! // Nothing went wrong, but this cannot be kept: what, why, and what the user can do.
//! let refusal = HookError::unsupported("socket:[7]", "an error is pending", "let the program read it");
//! assert_eq!(refusal.to_string(), "socket:[7]: an error is pending (let the program read it)");
//! assert_eq!(refusal.kind, ErrorKind::Unsupported);
//!
//! // A system call failed.
//! let failure = HookError::failed("connect to /run/x", std::io::Error::from_raw_os_error(2));
//! assert_eq!(failure.to_string(), "connect to /run/x: No such file or directory (os error 2)");
//! ```
//! Core adds plugin, hook, task, its name, and the descriptor. Whatever a plugin does not know of a resource it refuses: nothing is lost in
//! silence. What goes on all the same is said by [`Host::warn`]. `tracing` events go to the tool's log, under the plugin's target, from
//! restored tasks as well. A panic becomes an error, a hang is ended after `--plugin-timeout`, a crash ends the command: the tree is put back as it
//! was by the guardian.
//!
//! # What the host offers
//!
//! | | dump | restore |
//! |---|---|---|
//! | [`Host::option`], [`Host::externals`], [`Host::warn`], [`Host::tasks`], [`Host::sessions`] | yes | yes |
//! | [`Host::handle`], [`Host::handle_at`] | yes | yes |
//! | [`Host::open_handle`] | yes | from link on; in create what `after` names |
//! | [`Host::handle_of`], [`Host::open_proc`], [`Host::read_memory`], [`Host::remote_syscall`], [`Host::undo`], [`Host::blob_writer`] | yes | |
//! | [`Host::blob_reader`], [`Host::inherited`], [`Host::open_auxiliary`], [`Host::hold`] | | yes |
//!
//! Pids are those of the innermost pid namespace, as the image has them. What fdinfo says, [`HandleInfo::field`] finds:
//!
//! ```
//! # use stasis_plugin_api::HandleInfo;
//! let handle = HandleInfo { fdinfo: "pos:\t0\nflags:\t02\ninotify wd:1 ino:9\n".into(), ..HandleInfo::default() };
//! assert_eq!(handle.field("flags").unwrap(), "02");
//! assert!(handle.field("missing").is_err());
//! ```
//! [`socket`] has what all plugins of sockets need: addresses, options, filters, queues.
//!
//! # Testing
//!
//! [`testing::Kit`](crate::testing) (feature `testing`) plays dump and restore in the test process, with hooks called through the ABI. Its
//! host takes options, says what was warned of and what would have been undone. Whole dumps need root: start a program, dump it, restore it, and
//! let *it* say whether all is as it was; `tests/external-plugin` and `tests/tests/external` of the sources show how.
//!
//! # The versioning promise
//!
//! This crate is versioned by itself, from 1.0 on. Within a major version,
//!
//! * a host works with plugins that were built against any older minor version: things are only appended: methods of the ABI traits
//!   (with a default), fields of the root module, kinds of hooks, and hence methods of the traits here (with a default) and of [`Host`];
//! * a host works with plugins that were built against a newer minor version, as long as they use nothing that it lacks;
//! * structures that cross the ABI by value or reference ([`HandleInfo`], [`Dumped`] ...) do not change.
//!
//! A library of another major version, or with other layouts under the same version, is refused in one line when it is loaded. All of that is
//! tested with real builds (`tests/tests/external/versions.rs`). The promise begins with the first published release.

#[allow(unused_imports, reason = "the links above")]
use crate::*;
