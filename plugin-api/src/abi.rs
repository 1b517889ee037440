//! The ABI proper: what `export_plugin!` and core exchange. Authors use the traits in the crate's root instead.
//!
//! Rules that keep old plugins working: fields and methods are only appended, every appended root-module field has
//! `#[sabi(missing_field(option))]`, every appended trait method stands after `#[sabi(last_prefix_field)]` and has a
//! default body.
#![allow(non_local_definitions, missing_docs, clippy::undocumented_unsafe_blocks)] // abi_stable_derive 0.11.3

use crate::{
    Described, Dumped, DumpedNamespace, Event, HandleInfo, HookError, KindDeclaration, NamespaceInfo,
    ObjectInfo, PluginDeclaration, SessionInfo, TaskInfo, UndoStep, VmaInfo, forward_log::LogSink,
};
use abi_stable::{
    StableAbi, declare_root_module_statics,
    library::RootModule,
    package_version_strings, sabi_trait,
    sabi_types::{RRef, VersionStrings},
    std_types::{RBox, ROption, RResult, RSlice, RSliceMut, RStr, RString, RVec},
};

/// A number for all that crosses the ABI, as it stands in the source: two libraries with the same number have the same
/// types, laid out in the same way (all of them are `repr(C)` or `repr(u8)`), so core need not compare type layouts, which
/// takes a millisecond per plugin. FNV-1a.
pub const FINGERPRINT: u64 = {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let sources: [&[u8]; 4] = [
        include_bytes!("abi.rs"),
        include_bytes!("model.rs"),
        include_bytes!("error.rs"),
        include_bytes!("forward_log.rs"),
    ];
    let mut i = 0;
    while i < sources.len() {
        let mut at = 0;
        while at < sources[i].len() {
            hash = (hash ^ sources[i][at] as u64).wrapping_mul(0x100_0000_01b3);
            at += 1;
        }
        i += 1;
    }
    hash
};

/// Symbol by which a plugin exports [`FINGERPRINT`]; a plugin without it is compared type by type.
pub const FINGERPRINT_SYMBOL: &str = "stasis_plugin_api_fingerprint";

/// Result across the ABI.
pub type AbiResult<T> = RResult<T, HookError>;
/// Encoded record.
pub type Bytes = RVec<u8>;

/// What core offers to a hook.
#[sabi_trait]
pub trait HostAbi {
    fn option(&self, name: RStr<'_>) -> ROption<RString>;
    fn warn(&self, message: RStr<'_>);
    fn progress(&self, done: u64, total: u64);
    fn current_task(&self) -> i32;
    fn ends_tree(&self) -> bool;
    fn is_dry_run(&self) -> bool;
    fn externals(&self) -> RVec<RString>;
    fn inherited(&self, key: RStr<'_>) -> AbiResult<ROption<i32>>;
    fn tasks(&self) -> RVec<TaskInfo>;
    fn sessions(&self) -> RVec<SessionInfo>;
    fn handle(&self, id: u32) -> ROption<HandleInfo>;
    fn handle_at(&self, pid: i32, fd: i32) -> ROption<u32>;
    fn handle_of(&self, dev: u64, ino: u64) -> ROption<u32>;
    fn open_handle(&self, id: u32) -> AbiResult<i32>;
    fn open_auxiliary(&self, handle: u32, index: u32) -> AbiResult<i32>;
    fn open_proc(&self, pid: i32) -> AbiResult<i32>;
    fn remote_syscall(&self, pid: i32, number: i64, args: &[u64; 6]) -> AbiResult<i64>;
    fn read_memory(&self, pid: i32, address: u64, buffer: RSliceMut<'_, u8>) -> AbiResult<()>;
    fn undo(&self, fd: i32, steps: RSlice<'_, UndoStep>) -> AbiResult<()>;
    fn blob_append(&self, name: RStr<'_>, data: RSlice<'_, u8>) -> AbiResult<()>;
    fn blob_read(&self, name: RStr<'_>, offset: u64, buffer: RSliceMut<'_, u8>) -> AbiResult<usize>;
    #[sabi(last_prefix_field)]
    fn hold(&self, begin: bool);
}
/// The host as a hook's argument.
pub type HostRef<'a> = HostAbi_TO<'a, RRef<'a, ()>>;

#[sabi_trait]
pub trait DescriptorAbi: Send + Sync {
    fn declaration(&self) -> KindDeclaration;
    fn claims(&self, host: HostRef<'_>, handle: &HandleInfo) -> AbiResult<bool>;
    fn describe(&self, host: HostRef<'_>, handle: &HandleInfo, fd: i32) -> AbiResult<Described>;
    fn dump(&self, host: HostRef<'_>, object: &ObjectInfo) -> AbiResult<Dumped<Bytes>>;
    fn commit(&self, host: HostRef<'_>, object: &ObjectInfo) -> AbiResult<()>;
    fn create(&self, host: HostRef<'_>, object: &ObjectInfo, record: RSlice<'_, u8>) -> AbiResult<RVec<i32>>;
    fn link(&self, host: HostRef<'_>, object: &ObjectInfo, record: RSlice<'_, u8>) -> AbiResult<()>;
    #[sabi(last_prefix_field)]
    fn settle(&self, host: HostRef<'_>, object: &ObjectInfo, record: RSlice<'_, u8>) -> AbiResult<()>;
}
pub type DescriptorBox = DescriptorAbi_TO<'static, RBox<()>>;

#[sabi_trait]
pub trait SessionAbi: Send + Sync {
    fn declaration(&self) -> KindDeclaration;
    #[sabi(last_prefix_field)]
    fn describe(&self, host: HostRef<'_>, session: &SessionInfo) -> AbiResult<ROption<Described>>;
}
pub type SessionBox = SessionAbi_TO<'static, RBox<()>>;

#[sabi_trait]
pub trait NamespaceAbi: Send + Sync {
    fn declaration(&self) -> KindDeclaration;
    fn dump(&self, host: HostRef<'_>, namespace: &NamespaceInfo) -> AbiResult<DumpedNamespace<Bytes>>;
    fn prepare(&self, host: HostRef<'_>, record: RSlice<'_, u8>, host_pid: i32) -> AbiResult<()>;
    fn enter(&self, host: HostRef<'_>, record: RSlice<'_, u8>) -> AbiResult<()>;
    #[sabi(last_prefix_field)]
    fn finish(&self, host: HostRef<'_>, record: RSlice<'_, u8>) -> AbiResult<()>;
}
pub type NamespaceBox = NamespaceAbi_TO<'static, RBox<()>>;

#[sabi_trait]
pub trait MappingAbi: Send + Sync {
    fn declaration(&self) -> KindDeclaration;
    fn claims(&self, host: HostRef<'_>, vma: &VmaInfo) -> AbiResult<bool>;
    fn dump(&self, host: HostRef<'_>, vma: &VmaInfo) -> AbiResult<Bytes>;
    #[sabi(last_prefix_field)]
    fn map(&self, host: HostRef<'_>, vma: &VmaInfo, record: RSlice<'_, u8>) -> AbiResult<()>;
}
pub type MappingBox = MappingAbi_TO<'static, RBox<()>>;

#[sabi_trait]
pub trait TaskAbi: Send + Sync {
    fn declaration(&self) -> KindDeclaration;
    fn dump(&self, host: HostRef<'_>, task: &TaskInfo) -> AbiResult<ROption<Bytes>>;
    #[sabi(last_prefix_field)]
    fn restore(&self, host: HostRef<'_>, task: &TaskInfo, record: RSlice<'_, u8>) -> AbiResult<()>;
}
pub type TaskBox = TaskAbi_TO<'static, RBox<()>>;

#[sabi_trait]
pub trait LifecycleAbi: Send + Sync {
    fn declaration(&self) -> KindDeclaration;
    #[sabi(last_prefix_field)]
    fn event(&self, host: HostRef<'_>, event: Event) -> AbiResult<()>;
}
pub type LifecycleBox = LifecycleAbi_TO<'static, RBox<()>>;

/// The root module of every plugin.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginRef, prefix_fields = PluginPrefix)))]
#[sabi(missing_field(panic))]
pub struct Plugin {
    pub declaration: extern "C" fn() -> PluginDeclaration,
    pub set_log: extern "C" fn(LogSink),
    pub descriptors: extern "C" fn() -> RVec<DescriptorBox>,
    pub sessions: extern "C" fn() -> RVec<SessionBox>,
    pub namespaces: extern "C" fn() -> RVec<NamespaceBox>,
    pub mappings: extern "C" fn() -> RVec<MappingBox>,
    pub tasks: extern "C" fn() -> RVec<TaskBox>,
    #[sabi(last_prefix_field)]
    pub lifecycles: extern "C" fn() -> RVec<LifecycleBox>,
}

impl RootModule for PluginRef {
    declare_root_module_statics! {PluginRef}
    const BASE_NAME: &'static str = "stasis_plugin";
    const NAME: &'static str = "stasis_plugin";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}
