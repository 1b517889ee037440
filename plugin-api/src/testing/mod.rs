//! A test kit for plugins: dump and restore of an object in the test process itself, without root and without core.
//!
//! The *tree* of a [`Kit`] is the test process. [`Kit::hold`] gives it a descriptor, [`Kit::dump`] runs `describe` and
//! `dump` for all of them, closes them, and [`Kit::restore`] runs `create`, `link` and `settle` and puts the new descriptors
//! at the old numbers, with their old status flags and positions, as core does. All calls go through the ABI, so records are encoded and
//! decoded and panics become errors.
//!
//! ```ignore
//! let mut kit = Kit::new();
//! kit.plugin(Counter);
//! let fd = kit.hold(eventfd, "eventfd")?;   // the number it has from now on, before and after
//! kit.dump()?;
//! kit.restore()?;
//! assert_eq!(read(kit.fd(fd)), 5);
//! ```
//! [`Kit::remap`] does the same with a mapping, [`Kit::dump_task`] and [`Kit::restore_task`] with state of this process.
//!
//! Descriptors of kinds that are not under test, such as the targets of an epoll, are given to [`Kit::keep`]: they stay
//! as they are and only lend their handles.

mod host;
mod kinds;

use crate::{
    Described, Descriptor, Dumped, HandleInfo, Holder, HookError, ObjectInfo, Result,
    abi::{Bytes, DescriptorBox},
    register,
};
use abi_stable::std_types::RVec;
use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
};

pub use host::FakeHost;

/// Numbers for held descriptors: far above what the kernel gives out unasked, so that tests without a kit, which run in
/// parallel threads, never get the number of a descriptor that a kit has closed for a while.
static NEXT_NUMBER: AtomicI32 = AtomicI32::new(600);

/// Hooks may choose numbers, too: one kit at a time.
static TURN: Mutex<()> = Mutex::new(());

/// Status flags that core restores with `F_SETFL` (fcntl(2)).
const SETTABLE: i32 = libc::O_APPEND | libc::O_NONBLOCK | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME;

struct Object {
    kind: &'static str,
    info: ObjectInfo,
    dumped: Dumped<Bytes>,
}

/// See the [module](self). There is one at a time: making another waits until the first is dropped, so a test has one.
pub struct Kit {
    /// The host that hooks get; options are set here, warnings and blobs are found here.
    pub host: FakeHost,
    plugins: BTreeMap<&'static str, DescriptorBox>,
    kinds: BTreeMap<u32, &'static str>,
    objects: Vec<Object>,
    /// The last field, hence given up last.
    _turn: MutexGuard<'static, ()>,
}

impl Default for Kit {
    fn default() -> Self {
        // A test that panicked with a kit has dropped it: nothing is left in disorder.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (plugins, kinds) = (BTreeMap::new(), BTreeMap::new());
        Self { host: FakeHost::default(), plugins, kinds, objects: Vec::new(), _turn: turn }
    }
}

impl Kit {
    /// A kit without plugins and descriptors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the kind under test.
    pub fn plugin<T: Descriptor>(&mut self, hook: T) {
        self.plugins.insert(T::KIND, register::descriptor(hook));
    }

    /// Gives the tree a descriptor of a kind under test; returns the number it has from now on.
    pub fn hold(&mut self, fd: impl Into<OwnedFd>, kind: &'static str) -> Result<RawFd> {
        let (id, number) = self.insert(fd.into())?;
        self.kinds.insert(id, kind);
        Ok(number)
    }

    /// Gives the tree a descriptor that is neither dumped nor restored, but stays as it is.
    pub fn keep(&mut self, fd: impl Into<OwnedFd>) -> Result<RawFd> {
        Ok(self.insert(fd.into())?.1)
    }

    /// A second number for the descriptor at `number`, as dup(2) gives it.
    pub fn dup(&mut self, number: RawFd) -> Result<RawFd> {
        let id = self.id_at(number)?;
        let copy = move_up(self.fd(number))?;
        if let Some(handle) = self.host.handles.get_mut(&id) {
            handle.info.holders.push(holder(copy));
        }
        Ok(copy)
    }

    /// Puts the descriptor at `from` also at `to`, in place of what is there, as dup2(2) does.
    pub fn dup2(&mut self, from: RawFd, to: RawFd) -> Result<()> {
        let id = self.id_at(from)?;
        self.forget(to);
        place(self.fd(from), to)?;
        if let Some(handle) = self.host.handles.get_mut(&id) {
            handle.info.holders.push(holder(to));
        }
        Ok(())
    }

    /// Closes a number of the tree.
    pub fn close(&mut self, number: RawFd) {
        self.forget(number);
        close(number);
    }

    /// The descriptor at a number of the tree.
    pub fn fd(&self, number: RawFd) -> BorrowedFd<'_> {
        // SAFETY: numbers given out by this kit stay open, or closed with their number unused, while it lives.
        unsafe { BorrowedFd::borrow_raw(number) }
    }

    /// Whether a kind under test takes a handle by its own judgement ([`Descriptor::claims`]).
    pub fn claims(&self, kind: &str, handle: &HandleInfo) -> Result<bool> {
        self.host.call(|host| self.kind(kind)?.claims(host, handle).into_result())
    }

    /// Describes and dumps everything held; returns the number of objects. Nothing is closed: the tree runs on.
    pub fn dump(&mut self) -> Result<usize> {
        self.objects.clear();
        let mut found: BTreeMap<(&'static str, String), ObjectInfo> = BTreeMap::new();
        let ids: Vec<u32> = self.kinds.keys().copied().collect();
        for id in ids {
            self.host.refresh(id)?;
            let kind = self.kinds[&id];
            let described = self.describe(id, kind)?;
            let mut info = self.host.info(id)?;
            info.role = described.role;
            self.host.set_role(id, described.role);
            let next = found.len() as u32 + 1;
            let object =
                found.entry((kind, described.identity.clone().into())).or_insert_with(|| ObjectInfo {
                    id: next,
                    identity: described.identity,
                    description: described.description,
                    ..ObjectInfo::default()
                });
            object.handles.push(info);
        }
        for ((kind, _), info) in found {
            let dumped = self.host.call(|host| self.kind(kind)?.dump(host, &info).into_result())?;
            self.objects.push(Object { kind, info, dumped });
        }
        Ok(self.objects.len())
    }

    /// Calls something that wants a host.
    pub fn with_host<T>(&self, call: impl FnOnce(&crate::Host<'_>) -> Result<T>) -> Result<T> {
        self.host.call(|host| call(&crate::Host::new(host)))
    }

    /// Runs `commit` of every object dumped.
    pub fn commit(&self) -> Result<()> {
        for object in &self.objects {
            self.host.call(|host| self.kind(object.kind)?.commit(host, &object.info).into_result())?;
        }
        Ok(())
    }

    /// The record of the only object of `kind`, decoded.
    pub fn record<T: Descriptor>(&self) -> Result<T::Record> {
        let object = self.objects.iter().find(|object| object.kind == T::KIND);
        let object = object.ok_or_else(|| HookError::invalid(format!("no object of kind {}", T::KIND)))?;
        prost::Message::decode(object.dumped.record.as_slice())
            .map_err(|error| HookError::invalid(format!("record of {}: {error}", T::KIND)))
    }

    /// Kills the tree's descriptors of the kinds under test and makes them anew from the records.
    pub fn restore(&mut self) -> Result<()> {
        for id in self.kinds.keys() {
            for holder in &self.host.info(*id)?.holders {
                close(holder.fd);
            }
        }
        self.host.strip();
        for object in &mut self.objects {
            for handle in object.info.handles.iter_mut() {
                *handle = host::stripped(handle);
            }
        }
        self.host.restoring = true;
        for object in self.in_order()? {
            let record = object.dumped.record.as_slice().into();
            let fds = self
                .host
                .call(|host| self.kind(object.kind)?.create(host, &object.info, record).into_result())?;
            let handles = &object.info.handles;
            if fds.len() != handles.len() + object.dumped.auxiliaries as usize {
                return Err(HookError::invalid(format!("create gave {} descriptors", fds.len())));
            }
            // SAFETY: a hook gives its descriptors away.
            let mut fds: Vec<OwnedFd> =
                fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
            let auxiliaries = fds.split_off(handles.len());
            for (fd, handle) in fds.into_iter().zip(handles.iter()) {
                install(fd, handle)?;
            }
            for handle in handles.iter() {
                let copies = auxiliaries.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>();
                let copies = copies.map_err(|error| HookError::failed("duplicate", error))?;
                self.host.auxiliaries.borrow_mut().insert(handle.id, copies);
            }
        }
        for object in &self.objects {
            let record = object.dumped.record.as_slice().into();
            self.host.call(|host| self.kind(object.kind)?.link(host, &object.info, record).into_result())?;
        }
        for object in &self.objects {
            let record = object.dumped.record.as_slice().into();
            self.host
                .call(|host| self.kind(object.kind)?.settle(host, &object.info, record).into_result())?;
        }
        self.host.auxiliaries.borrow_mut().clear();
        self.host.restoring = false;
        Ok(())
    }

    /// The objects, each after those it names in `after`.
    fn in_order(&self) -> Result<Vec<&Object>> {
        let (mut ordered, mut waiting) = (Vec::new(), self.objects.iter().collect::<Vec<_>>());
        while !waiting.is_empty() {
            let blocked = |object: &Object, others: &[&Object]| {
                let mut handles = object.dumped.after.iter();
                let own = |other: &&Object| std::ptr::eq(*other, object);
                handles.any(|id| {
                    others.iter().any(|other| !own(other) && other.info.handles.iter().any(|h| h.id == *id))
                })
            };
            let (later, now): (Vec<_>, Vec<_>) =
                waiting.iter().copied().partition(|object| blocked(object, &waiting));
            if now.is_empty() {
                return Err(HookError::invalid("the objects wait for each other"));
            }
            ordered.extend(now);
            waiting = later;
        }
        Ok(ordered)
    }

    fn kind(&self, kind: &str) -> Result<&DescriptorBox> {
        self.plugins.get(kind).ok_or_else(|| HookError::invalid(format!("the kit has no plugin for {kind}")))
    }

    fn describe(&self, id: u32, kind: &str) -> Result<Described> {
        let info = self.host.info(id)?;
        let fd = self.host.duplicate(id)?;
        self.host.call(|host| self.kind(kind)?.describe(host, &info, fd.as_raw_fd()).into_result())
    }

    fn insert(&mut self, fd: OwnedFd) -> Result<(u32, RawFd)> {
        let number = move_up(std::os::fd::AsFd::as_fd(&fd))?;
        Ok((self.host.add(number, holder(number))?, number))
    }

    fn id_at(&self, number: RawFd) -> Result<u32> {
        self.host
            .find(number)
            .ok_or_else(|| HookError::invalid(format!("the kit holds no descriptor {number}")))
    }

    fn forget(&mut self, number: RawFd) {
        for handle in self.host.handles.values_mut() {
            handle.info.holders.retain(|holder| holder.fd != number);
        }
    }
}

impl Drop for Kit {
    fn drop(&mut self) {
        for handle in self.host.handles.values() {
            handle.info.holders.iter().for_each(|holder| close(holder.fd));
        }
    }
}

fn holder(fd: RawFd) -> Holder {
    Holder { pid: host::own_pid(), fd, cloexec: true }
}

fn move_up(fd: BorrowedFd<'_>) -> Result<RawFd> {
    let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
    place(fd, number)?;
    Ok(number)
}

fn place(fd: BorrowedFd<'_>, number: RawFd) -> Result<()> {
    // SAFETY: dup3 touches no memory; `number` belongs to the kit.
    let result = unsafe { libc::dup3(fd.as_raw_fd(), number, libc::O_CLOEXEC) };
    if result < 0 {
        return Err(HookError::failed(format!("dup3 to {number}"), io::Error::last_os_error()));
    }
    Ok(())
}

fn close(number: RawFd) {
    // SAFETY: the number belongs to the kit, which never uses it again or puts another descriptor there.
    unsafe { libc::close(number) };
}

/// What core does with a descriptor that `create` has made.
fn install(fd: OwnedFd, handle: &HandleInfo) -> Result<()> {
    let flags = handle.status_flags as i32 & SETTABLE;
    // SAFETY: F_SETFL takes an integer.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) } < 0 {
        return Err(HookError::failed("F_SETFL", io::Error::last_os_error()));
    }
    if handle.position != 0 {
        // SAFETY: lseek takes integers. ESPIPE: a kind that has no position but shows one.
        unsafe { libc::lseek(fd.as_raw_fd(), handle.position as i64, libc::SEEK_SET) };
    }
    let holders: &RVec<Holder> = &handle.holders;
    holders.iter().try_for_each(|holder| place(std::os::fd::AsFd::as_fd(&fd), holder.fd))
}
