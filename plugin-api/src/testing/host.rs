//! The host of a [`Kit`](super::Kit): its tree is the test process.

use crate::{
    HandleInfo, Holder, HookError, Result, SessionInfo, TaskInfo, UndoStep,
    abi::{AbiResult, HostAbi, HostAbi_TO, HostRef},
};
use abi_stable::{
    erased_types::TD_Opaque,
    sabi_types::RRef,
    std_types::{RErr, ROk, ROption, RResult, RSlice, RSliceMut, RStr, RString, RVec},
};
use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs, io,
    os::{
        fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd},
        unix::fs::{FileExt, MetadataExt},
    },
};

pub(super) struct Handle {
    pub info: HandleInfo,
    /// Number in this process, also when the tree holds none.
    pub number: RawFd,
}

/// A host whose tree is the test process, with one task.
#[derive(Default)]
pub struct FakeHost {
    /// The options given; an empty text for a switch.
    pub options: BTreeMap<String, String>,
    /// Keys given with `--external`.
    pub externals: Vec<String>,
    /// Descriptors given with `--inherit-fd`, by key.
    pub inherited: BTreeMap<String, OwnedFd>,
    /// Whether the tree is left running after the dump.
    pub leave_running: bool,
    /// Whether the dump is a dry run.
    pub dry_run: bool,
    /// What hooks have warned of.
    pub warnings: RefCell<Vec<String>>,
    /// What the guardian would be asked to undo.
    pub undo: RefCell<Vec<(RawFd, Vec<UndoStep>)>>,
    /// Blobs by name.
    pub blobs: RefCell<BTreeMap<String, Vec<u8>>>,
    /// Sessions with a terminal.
    pub sessions: Vec<SessionInfo>,
    pub(super) handles: BTreeMap<u32, Handle>,
    /// What `create` made beyond handles, by handle of the object.
    pub(super) auxiliaries: RefCell<BTreeMap<u32, Vec<OwnedFd>>>,
    pub(super) restoring: bool,
}

impl FakeHost {
    /// Runs a hook with this host.
    pub fn call<T>(&self, hook: impl FnOnce(HostRef<'_>) -> Result<T>) -> Result<T> {
        hook(HostAbi_TO::from_ptr(RRef::new(self), TD_Opaque))
    }

    pub(super) fn add(&mut self, number: RawFd, holder: Holder) -> Result<u32> {
        let id = self.handles.len() as u32 + 1;
        let info = HandleInfo { id, holders: RVec::from(vec![holder]), ..HandleInfo::default() };
        self.handles.insert(id, Handle { info, number });
        self.refresh(id)?;
        Ok(id)
    }

    /// Reads /proc again, as core does when the tree is frozen.
    pub(super) fn refresh(&mut self, id: u32) -> Result<()> {
        let Some(handle) = self.handles.get_mut(&id) else { return Ok(()) };
        if let Some(holder) = handle.info.holders.first() {
            handle.number = holder.fd;
        }
        observe(&mut handle.info, handle.number).map_err(|error| {
            HookError::failed(format!("reading what /proc says of descriptor {}", handle.number), error)
        })
    }

    pub(super) fn info(&self, id: u32) -> Result<HandleInfo> {
        self.handles.get(&id).map(|handle| handle.info.clone()).ok_or_else(|| unknown(id))
    }

    pub(super) fn set_role(&mut self, id: u32, role: u32) {
        if let Some(handle) = self.handles.get_mut(&id) {
            handle.info.role = role;
        }
    }

    pub(super) fn find(&self, number: RawFd) -> Option<u32> {
        let held = |handle: &&Handle| handle.info.holders.iter().any(|holder| holder.fd == number);
        self.handles.values().find(held).map(|handle| handle.info.id)
    }

    pub(super) fn duplicate(&self, id: u32) -> Result<OwnedFd> {
        let handle = self.handles.get(&id).ok_or_else(|| unknown(id))?;
        // SAFETY: F_DUPFD_CLOEXEC takes an integer and gives a new descriptor or -1.
        let fd = unsafe { libc::fcntl(handle.number, libc::F_DUPFD_CLOEXEC, 0) };
        if fd < 0 {
            return Err(HookError::failed(format!("duplicate of handle {id}"), io::Error::last_os_error()));
        }
        // SAFETY: as above; nobody else has the number.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// On restore a plugin sees only what the image has.
    pub(super) fn strip(&mut self) {
        self.handles.values_mut().for_each(|handle| handle.info = stripped(&handle.info));
    }

    fn frozen(&self, what: &str) -> Result<()> {
        match self.restoring {
            true => Err(HookError::invalid(format!("{what} is a service for dump only"))),
            false => Ok(()),
        }
    }
}

fn unknown(id: u32) -> HookError {
    HookError::invalid(format!("the kit has no handle {id}"))
}

pub(super) fn own_pid() -> i32 {
    std::process::id().cast_signed()
}

pub(super) fn stripped(info: &HandleInfo) -> HandleInfo {
    HandleInfo {
        id: info.id,
        status_flags: info.status_flags,
        position: info.position,
        holders: info.holders.clone(),
        role: info.role,
        ..HandleInfo::default()
    }
}

fn observe(info: &mut HandleInfo, number: RawFd) -> io::Result<()> {
    let link = format!("/proc/self/fd/{number}");
    let meta = fs::metadata(&link)?;
    info.link = fs::read_link(&link)?.to_string_lossy().as_ref().into();
    info.fdinfo = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?.into();
    info.dev = meta.dev();
    info.ino = meta.ino();
    info.mode = meta.mode();
    info.rdev = meta.rdev();
    let number =
        |field: &str, radix| u64::from_str_radix(info.field(field).unwrap_or("0"), radix).unwrap_or(0);
    let flags = number("flags", 8) as u32 & !(libc::O_CLOEXEC as u32);
    let position = number("pos", 10);
    info.status_flags = flags;
    info.position = position;
    Ok(())
}

fn across<T>(result: Result<T>) -> AbiResult<T> {
    match result {
        Ok(value) => ROk(value),
        Err(error) => RErr(error),
    }
}

impl HostAbi for FakeHost {
    fn option(&self, name: RStr<'_>) -> ROption<RString> {
        self.options.get(name.as_str()).map(|value| RString::from(value.as_str())).into()
    }
    fn warn(&self, message: RStr<'_>) {
        self.warnings.borrow_mut().push(message.into());
    }
    fn progress(&self, _: u64, _: u64) {}
    fn current_task(&self) -> i32 {
        if self.restoring { own_pid() } else { 0 }
    }
    fn ends_tree(&self) -> bool {
        !self.leave_running
    }
    fn is_dry_run(&self) -> bool {
        self.dry_run
    }
    fn externals(&self) -> RVec<RString> {
        self.externals.iter().map(|key| key.as_str().into()).collect()
    }
    fn inherited(&self, key: RStr<'_>) -> AbiResult<ROption<i32>> {
        let copy = self.inherited.get(key.as_str()).map(OwnedFd::try_clone).transpose();
        let copy = copy.map_err(|error| HookError::failed("duplicate of an inherited descriptor", error));
        across(copy.map(|fd| fd.map(IntoRawFd::into_raw_fd).into()))
    }
    fn tasks(&self) -> RVec<TaskInfo> {
        let host_pid = if self.restoring { 0 } else { own_pid() };
        vec![TaskInfo { pid: own_pid(), host_pid, name: "test".into(), ..TaskInfo::default() }].into()
    }
    fn sessions(&self) -> RVec<SessionInfo> {
        self.sessions.clone().into()
    }
    fn handle(&self, id: u32) -> ROption<HandleInfo> {
        self.handles.get(&id).map(|handle| handle.info.clone()).into()
    }
    fn handle_at(&self, pid: i32, fd: i32) -> ROption<u32> {
        if pid == own_pid() { self.find(fd).into() } else { ROption::RNone }
    }
    fn handle_of(&self, dev: u64, ino: u64) -> ROption<u32> {
        let of_file = |handle: &&Handle| (handle.info.dev, handle.info.ino) == (dev, ino);
        self.handles.values().find(of_file).map(|handle| handle.info.id).into()
    }
    fn open_handle(&self, id: u32) -> AbiResult<i32> {
        across(self.duplicate(id).map(IntoRawFd::into_raw_fd))
    }
    fn open_auxiliary(&self, handle: u32, index: u32) -> AbiResult<i32> {
        let auxiliaries = self.auxiliaries.borrow();
        let of_object = auxiliaries.get(&handle);
        let fd = of_object
            .and_then(|fds| fds.get(index as usize))
            .ok_or_else(|| HookError::invalid(format!("handle {handle} has no auxiliary {index} (yet)")));
        let copy = fd.and_then(|fd| {
            fd.try_clone().map_err(|error| HookError::failed("duplicate of an auxiliary descriptor", error))
        });
        across(copy.map(IntoRawFd::into_raw_fd))
    }
    fn open_proc(&self, _: i32) -> AbiResult<i32> {
        let open =
            || fs::File::open("/proc/self").map_err(|error| HookError::failed("open /proc/self", error));
        across(self.frozen("open_proc").and_then(|()| open()).map(IntoRawFd::into_raw_fd))
    }
    fn remote_syscall(&self, _: i32, _: i64, _: &[u64; 6]) -> AbiResult<i64> {
        RErr(HookError::invalid("the test kit has no other task to run a system call in"))
    }
    fn read_memory(&self, _: i32, address: u64, mut buffer: RSliceMut<'_, u8>) -> AbiResult<()> {
        let mut read = || {
            let memory = fs::File::open("/proc/self/mem")?;
            memory.read_exact_at(buffer.as_mut_slice(), address)
        };
        across(read().map_err(|error| HookError::failed(format!("read memory at {address:#x}"), error)))
    }
    fn undo(&self, fd: i32, steps: RSlice<'_, UndoStep>) -> AbiResult<()> {
        self.undo.borrow_mut().push((fd, steps.to_vec()));
        ROk(())
    }
    fn blob_append(&self, name: RStr<'_>, data: RSlice<'_, u8>) -> AbiResult<()> {
        across(self.frozen("blob_append").map(|()| {
            self.blobs.borrow_mut().entry(name.into()).or_default().extend_from_slice(data.as_slice());
        }))
    }
    fn blob_read(&self, name: RStr<'_>, offset: u64, mut buffer: RSliceMut<'_, u8>) -> AbiResult<usize> {
        let blobs = self.blobs.borrow();
        let blob = blobs.get(name.as_str()).map_or(&[][..], Vec::as_slice);
        let rest = blob.get(usize::try_from(offset).unwrap_or(usize::MAX)..).unwrap_or(&[]);
        let n = rest.len().min(buffer.len());
        buffer.as_mut_slice()[..n].copy_from_slice(&rest[..n]);
        RResult::ROk(n)
    }
    fn hold(&self, _: bool) {}
}
