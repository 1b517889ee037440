//! Between the authors' traits and the ABI: decodes and encodes records, and turns panics into errors.

use crate::{
    Described, Descriptor, Dumped, DumpedNamespace, ErrorKind, Event, HandleInfo, HookError, Host,
    KindDeclaration, Lifecycle, Mapping, Namespace, NamespaceInfo, ObjectInfo, Result, Selector, Session,
    SessionInfo, Task, TaskInfo, VmaInfo,
    abi::{
        AbiResult, Bytes, DescriptorAbi, DescriptorBox, HostRef, LifecycleAbi, LifecycleBox, MappingAbi,
        MappingBox, NamespaceAbi, NamespaceBox, SessionAbi, SessionBox, TaskAbi, TaskBox,
    },
};
use abi_stable::{
    erased_types::TD_Opaque,
    std_types::{RErr, ROk, ROption, RSlice, RString, RVec},
};
use prost::{Message, Name};
use std::{
    os::fd::{BorrowedFd, IntoRawFd},
    panic::{AssertUnwindSafe, catch_unwind},
};

/// An author's hook behind the ABI trait.
pub(crate) struct Guard<T>(pub T);

fn guard<T>(f: impl FnOnce() -> Result<T>) -> AbiResult<T> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => ROk(value),
        Ok(Err(error)) => RErr(error),
        Err(payload) => {
            let text = payload
                .downcast_ref::<&str>()
                .map(ToString::to_string)
                .or_else(|| payload.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "a panic without message".into());
            // The payload's own drop may panic again.
            std::mem::forget(payload);
            RErr(HookError { kind: ErrorKind::Panicked, what: text.into(), errno: 0, remedy: RString::new() })
        }
    }
}

fn decode<R: Message + Name + Default>(record: RSlice<'_, u8>) -> Result<R> {
    R::decode(record.as_slice()).map_err(|error| HookError {
        kind: ErrorKind::BadRecord,
        what: format!("the image's record is no valid {}: {error}", R::full_name()).into(),
        errno: 0,
        remedy: RString::new(),
    })
}

/// Encodes, and proves that the bytes decode again: a record nobody can read back must fail the dump.
fn encode<R: Message + Name + Default>(record: &R) -> Result<Bytes> {
    let bytes = record.encode_to_vec();
    decode::<R>(bytes.as_slice().into())?;
    Ok(bytes.into())
}

fn declare(
    name: &str,
    selectors: Vec<Selector>,
    after: Vec<&'static str>,
    message: String,
    flag: u64,
) -> KindDeclaration {
    KindDeclaration {
        name: name.into(),
        selectors: selectors.into(),
        after: after.into_iter().map(Into::into).collect(),
        message: message.into(),
        clone_flag: flag,
    }
}

/// A declaration cannot fail across the ABI; one that panics claims nothing.
fn declared(f: impl FnOnce() -> KindDeclaration) -> KindDeclaration {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_| {
        declare("(panicked while declaring itself)", Vec::new(), Vec::new(), String::new(), 0)
    })
}

impl<T: Descriptor> DescriptorAbi for Guard<T> {
    fn declaration(&self) -> KindDeclaration {
        declared(|| declare(T::KIND, self.0.selectors(), self.0.after(), T::Record::full_name(), 0))
    }
    fn claims(&self, host: HostRef<'_>, handle: &HandleInfo) -> AbiResult<bool> {
        guard(|| Ok(self.0.claims(&Host::new(host), handle)))
    }
    fn describe(&self, host: HostRef<'_>, handle: &HandleInfo, fd: i32) -> AbiResult<Described> {
        // SAFETY: core keeps the descriptor open for the length of this call.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        guard(|| self.0.describe(&Host::new(host), handle, fd))
    }
    fn dump(&self, host: HostRef<'_>, object: &ObjectInfo) -> AbiResult<Dumped<Bytes>> {
        guard(|| {
            let dumped = self.0.dump(&Host::new(host), object)?;
            let bytes = encode(&dumped.record)?;
            Ok(dumped.map(|_| bytes))
        })
    }
    fn commit(&self, host: HostRef<'_>, object: &ObjectInfo) -> AbiResult<()> {
        guard(|| self.0.commit(&Host::new(host), object))
    }
    fn create(&self, host: HostRef<'_>, object: &ObjectInfo, record: RSlice<'_, u8>) -> AbiResult<RVec<i32>> {
        guard(|| {
            let fds = self.0.create(&Host::new(host), object, &decode(record)?)?;
            Ok(fds.into_iter().map(IntoRawFd::into_raw_fd).collect())
        })
    }
    fn link(&self, host: HostRef<'_>, object: &ObjectInfo, record: RSlice<'_, u8>) -> AbiResult<()> {
        guard(|| self.0.link(&Host::new(host), object, &decode(record)?))
    }
    fn settle(&self, host: HostRef<'_>, object: &ObjectInfo, record: RSlice<'_, u8>) -> AbiResult<()> {
        guard(|| self.0.settle(&Host::new(host), object, &decode(record)?))
    }
}

impl<T: Session> SessionAbi for Guard<T> {
    fn declaration(&self) -> KindDeclaration {
        declared(|| declare(T::KIND, self.0.selectors(), Vec::new(), String::new(), 0))
    }
    fn describe(&self, host: HostRef<'_>, session: &SessionInfo) -> AbiResult<ROption<Described>> {
        guard(|| self.0.describe(&Host::new(host), session).map(Into::into))
    }
}

impl<T: Namespace> NamespaceAbi for Guard<T> {
    fn declaration(&self) -> KindDeclaration {
        declared(|| {
            let selectors = vec![Selector::Namespace(T::KIND.into())];
            declare(T::KIND, selectors, self.0.after(), T::Record::full_name(), T::CLONE_FLAG)
        })
    }
    fn dump(&self, host: HostRef<'_>, namespace: &NamespaceInfo) -> AbiResult<DumpedNamespace<Bytes>> {
        guard(|| {
            let DumpedNamespace { record, version } = self.0.dump(&Host::new(host), namespace)?;
            Ok(DumpedNamespace { record: encode(&record)?, version })
        })
    }
    fn prepare(&self, host: HostRef<'_>, record: RSlice<'_, u8>, host_pid: i32) -> AbiResult<()> {
        guard(|| self.0.prepare(&Host::new(host), &decode(record)?, host_pid))
    }
    fn enter(&self, host: HostRef<'_>, record: RSlice<'_, u8>) -> AbiResult<()> {
        guard(|| self.0.enter(&Host::new(host), &decode(record)?))
    }
    fn finish(&self, host: HostRef<'_>, record: RSlice<'_, u8>) -> AbiResult<()> {
        guard(|| self.0.finish(&Host::new(host), &decode(record)?))
    }
}

impl<T: Mapping> MappingAbi for Guard<T> {
    fn declaration(&self) -> KindDeclaration {
        declared(|| declare(T::KIND, self.0.selectors(), Vec::new(), T::Record::full_name(), 0))
    }
    fn claims(&self, host: HostRef<'_>, vma: &VmaInfo) -> AbiResult<bool> {
        guard(|| Ok(self.0.claims(&Host::new(host), vma)))
    }
    fn dump(&self, host: HostRef<'_>, vma: &VmaInfo) -> AbiResult<Bytes> {
        guard(|| encode(&self.0.dump(&Host::new(host), vma)?))
    }
    fn map(&self, host: HostRef<'_>, vma: &VmaInfo, record: RSlice<'_, u8>) -> AbiResult<()> {
        guard(|| self.0.map(&Host::new(host), vma, &decode(record)?))
    }
}

impl<T: Task> TaskAbi for Guard<T> {
    fn declaration(&self) -> KindDeclaration {
        declared(|| declare(T::KIND, Vec::new(), Vec::new(), T::Record::full_name(), 0))
    }
    fn dump(&self, host: HostRef<'_>, task: &TaskInfo) -> AbiResult<ROption<Bytes>> {
        guard(|| Ok(self.0.dump(&Host::new(host), task)?.map(|record| encode(&record)).transpose()?.into()))
    }
    fn restore(&self, host: HostRef<'_>, task: &TaskInfo, record: RSlice<'_, u8>) -> AbiResult<()> {
        guard(|| self.0.restore(&Host::new(host), task, &decode(record)?))
    }
}

impl<T: Lifecycle> LifecycleAbi for Guard<T> {
    fn declaration(&self) -> KindDeclaration {
        declared(|| declare(T::KIND, Vec::new(), Vec::new(), String::new(), 0))
    }
    fn event(&self, host: HostRef<'_>, event: Event) -> AbiResult<()> {
        guard(|| self.0.event(&Host::new(host), event))
    }
}

/// Boxes an author's hook behind the ABI; used by `register!`.
macro_rules! boxed {
    ($($name:ident: $bound:ident => $abi:ident;)*) => { $(
        #[doc(hidden)]
        pub fn $name<T: $bound>(hook: T) -> $abi {
            $abi::from_value(Guard(hook), TD_Opaque)
        }
    )* };
}
boxed! {
    descriptor: Descriptor => DescriptorBox;
    session: Session => SessionBox;
    namespace: Namespace => NamespaceBox;
    mapping: Mapping => MappingBox;
    task: Task => TaskBox;
    lifecycle: Lifecycle => LifecycleBox;
}
