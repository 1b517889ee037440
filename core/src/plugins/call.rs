//! Calling hooks. All calls of core go through here: each is noted on the status page, and each error says which
//! plugin, hook, task and resource it is about.

use super::{
    DescriptorKind, HookWatch, Kind, LifecycleKind, MappingKind, NamespaceKind, SessionKind, TaskKind,
};
use stasis_plugin_api::{
    Described, Dumped, DumpedNamespace, ErrorKind, Event, HandleInfo, HookError, NamespaceInfo, ObjectInfo,
    SessionInfo, TaskInfo, VmaInfo,
    abi::{AbiResult, Bytes, HostAbi, HostRef},
    abi_stable::{erased_types::TD_Opaque, sabi_types::RRef, std_types::RVec},
};
use std::{
    fmt,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::Arc,
};

macro_rules! hooks {
    ($($(#[doc = $doc:literal])* $hook:ident $name:literal $cannot:literal;)*) => {
        /// Which hook is called.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Hook { $($(#[doc = $doc])* $hook,)* }

        impl Hook {
            /// Name, as in the plugin API.
            pub fn name(self) -> &'static str {
                match self { $(Self::$hook => $name,)* }
            }

            /// What cannot be done if it fails.
            fn cannot(self) -> &'static str {
                match self { $(Self::$hook => $cannot,)* }
            }
        }
    };
}
hooks! {
    /// Is it yours?
    Claims "claims" "cannot be dumped";
    /// What is it?
    Describe "describe" "cannot be dumped";
    /// Write its record.
    Dump "dump" "cannot be dumped";
    /// Take out what can only be read by consuming it.
    Commit "commit" "cannot be dumped";
    /// Make it.
    Create "create" "cannot be restored";
    /// Connect it.
    Link "link" "cannot be restored";
    /// Finish it.
    Settle "settle" "cannot be restored";
    /// Set a namespace up from outside.
    Prepare "prepare" "cannot be restored";
    /// Set a namespace up from inside.
    Enter "enter" "cannot be restored";
    /// Finish a namespace.
    Finish "finish" "cannot be restored";
    /// Make a mapping.
    Map "map" "cannot be restored";
    /// Give a task its state back.
    Restore "restore" "cannot be restored";
    /// A fixed point.
    Event "event" "cannot go on";
}

/// An error of a hook, with all that core knows about the call.
#[derive(Debug, Clone)]
pub struct PluginError {
    /// The plugin.
    pub plugin: Arc<str>,
    /// Its kind.
    pub kind: String,
    /// The hook.
    pub hook: Hook,
    /// The task it was called for; 0 if for none.
    pub task: i32,
    /// Name of that task; may be empty.
    pub task_name: String,
    /// The resource, e.g. "descriptor 5, pipe:[4711]".
    pub resource: String,
    /// What the plugin says.
    pub source: Box<HookError>,
}

impl std::error::Error for PluginError {}

impl fmt::Display for PluginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { plugin, hook, source, .. } = self;
        let mut separator = "";
        if self.task != 0 {
            write!(f, "task {}", self.task)?;
            if !self.task_name.is_empty() {
                write!(f, " ({})", self.task_name)?;
            }
            separator = ", ";
        }
        if !self.resource.is_empty() {
            write!(f, "{separator}{}", self.resource)?;
            separator = " ";
        } else if !separator.is_empty() {
            separator = " ";
        }
        let name = hook.name();
        match source.kind {
            ErrorKind::Unsupported => write!(f, "{separator}{}: {source} [plugin {plugin}]", hook.cannot()),
            ErrorKind::Failed => {
                write!(f, "{separator}{}: {source} [plugin {plugin}, {name}]", hook.cannot())
            }
            ErrorKind::Panicked => write!(
                f,
                "{separator}{}: plugin {plugin} panicked in {name}: {source} (report this to its author)",
                hook.cannot()
            ),
            ErrorKind::BadRecord => write!(
                f,
                "{separator}{}: plugin {plugin}: {source} (use the plugin that wrote the image)",
                hook.cannot()
            ),
        }
    }
}

/// For whom a hook is called: all that a call needs besides its own arguments.
pub struct CallContext<'a, H> {
    /// The status page.
    pub watch: &'a HookWatch,
    /// What the hook may ask. Bound to one plugin: its options, its blobs.
    pub host: &'a H,
    /// The task; 0 if for none.
    pub task: i32,
    /// Its name; may be empty.
    pub task_name: &'a str,
    /// The resource, for messages.
    pub resource: &'a str,
}

impl<H: HostAbi> CallContext<'_, H> {
    fn call<K, T>(
        &self,
        kind: &Kind<K>,
        hook: Hook,
        f: impl FnOnce(&K, HostRef<'_>) -> AbiResult<T>,
    ) -> Result<T, PluginError> {
        let running = self.watch.enter(&kind.plugin, hook.name(), self.task, self.resource);
        let host = HostRef::from_ptr(RRef::new(self.host), TD_Opaque);
        let result = f(&kind.hook, host).into_result();
        drop(running);
        result.map_err(|source| self.error(kind, hook, source))
    }

    fn error<K>(&self, kind: &Kind<K>, hook: Hook, source: HookError) -> PluginError {
        PluginError {
            plugin: Arc::clone(&kind.plugin),
            kind: kind.name().to_owned(),
            hook,
            task: self.task,
            task_name: self.task_name.to_owned(),
            resource: self.resource.to_owned(),
            source: Box::new(source),
        }
    }

    /// See [`stasis_plugin_api::Descriptor::claims`].
    pub fn claims(&self, kind: &DescriptorKind, handle: &HandleInfo) -> Result<bool, PluginError> {
        self.call(kind, Hook::Claims, |hook, host| hook.claims(host, handle))
    }

    /// See [`stasis_plugin_api::Mapping::claims`].
    pub fn claims_mapping(&self, kind: &MappingKind, vma: &VmaInfo) -> Result<bool, PluginError> {
        self.call(kind, Hook::Claims, |hook, host| hook.claims(host, vma))
    }

    /// See [`stasis_plugin_api::Descriptor::describe`]. The descriptors in flight come as owned ones, in the order of
    /// `Described::in_flight`, which is left empty.
    pub fn describe(
        &self,
        kind: &DescriptorKind,
        handle: &HandleInfo,
        fd: BorrowedFd<'_>,
    ) -> Result<(Described, Vec<OwnedFd>), PluginError> {
        let mut described =
            self.call(kind, Hook::Describe, |hook, host| hook.describe(host, handle, fd.as_raw_fd()))?;
        let in_flight = self.own(kind, Hook::Describe, std::mem::take(&mut described.in_flight))?;
        Ok((described, in_flight))
    }

    /// See [`stasis_plugin_api::Descriptor::dump`].
    pub fn dump(&self, kind: &DescriptorKind, object: &ObjectInfo) -> Result<Dumped<Bytes>, PluginError> {
        self.call(kind, Hook::Dump, |hook, host| hook.dump(host, object))
    }

    /// See [`stasis_plugin_api::Descriptor::commit`].
    pub fn commit(&self, kind: &DescriptorKind, object: &ObjectInfo) -> Result<(), PluginError> {
        self.call(kind, Hook::Commit, |hook, host| hook.commit(host, object))
    }

    /// See [`stasis_plugin_api::Descriptor::create`]: as many descriptors as the object has handles, then `auxiliaries`.
    pub fn create(
        &self,
        kind: &DescriptorKind,
        object: &ObjectInfo,
        auxiliaries: u32,
        record: &[u8],
    ) -> Result<Vec<OwnedFd>, PluginError> {
        let fds = self.call(kind, Hook::Create, |hook, host| hook.create(host, object, record.into()))?;
        let fds = self.own(kind, Hook::Create, fds)?;
        if fds.len() == object.handles.len() + auxiliaries as usize {
            return Ok(fds);
        }
        let handles = object.handles.len();
        let what = format!(
            "{} descriptors were made for {handles} handles and {auxiliaries} auxiliaries",
            fds.len()
        );
        Err(self.error(kind, Hook::Create, HookError::invalid(what)))
    }

    /// See [`stasis_plugin_api::Descriptor::link`].
    pub fn link(&self, kind: &DescriptorKind, object: &ObjectInfo, record: &[u8]) -> Result<(), PluginError> {
        self.call(kind, Hook::Link, |hook, host| hook.link(host, object, record.into()))
    }

    /// See [`stasis_plugin_api::Descriptor::settle`].
    pub fn settle(
        &self,
        kind: &DescriptorKind,
        object: &ObjectInfo,
        record: &[u8],
    ) -> Result<(), PluginError> {
        self.call(kind, Hook::Settle, |hook, host| hook.settle(host, object, record.into()))
    }

    /// See [`stasis_plugin_api::Session::describe`].
    pub fn describe_session(
        &self,
        kind: &SessionKind,
        session: &SessionInfo,
    ) -> Result<Option<(Described, Vec<OwnedFd>)>, PluginError> {
        let described = self.call(kind, Hook::Describe, |hook, host| hook.describe(host, session))?;
        let Some(mut described) = described.into_option() else { return Ok(None) };
        let in_flight = self.own(kind, Hook::Describe, std::mem::take(&mut described.in_flight))?;
        Ok(Some((described, in_flight)))
    }

    /// See [`stasis_plugin_api::Namespace::dump`].
    pub fn dump_namespace(
        &self,
        kind: &NamespaceKind,
        namespace: &NamespaceInfo,
    ) -> Result<DumpedNamespace<Bytes>, PluginError> {
        self.call(kind, Hook::Dump, |hook, host| hook.dump(host, namespace))
    }

    /// See [`stasis_plugin_api::Namespace::prepare`].
    pub fn prepare_namespace(
        &self,
        kind: &NamespaceKind,
        record: &[u8],
        host_pid: i32,
    ) -> Result<(), PluginError> {
        self.call(kind, Hook::Prepare, |hook, host| hook.prepare(host, record.into(), host_pid))
    }

    /// See [`stasis_plugin_api::Namespace::enter`].
    pub fn enter_namespace(&self, kind: &NamespaceKind, record: &[u8]) -> Result<(), PluginError> {
        self.call(kind, Hook::Enter, |hook, host| hook.enter(host, record.into()))
    }

    /// See [`stasis_plugin_api::Namespace::finish`].
    pub fn finish_namespace(&self, kind: &NamespaceKind, record: &[u8]) -> Result<(), PluginError> {
        self.call(kind, Hook::Finish, |hook, host| hook.finish(host, record.into()))
    }

    /// See [`stasis_plugin_api::Mapping::dump`].
    pub fn dump_mapping(&self, kind: &MappingKind, vma: &VmaInfo) -> Result<Bytes, PluginError> {
        self.call(kind, Hook::Dump, |hook, host| hook.dump(host, vma))
    }

    /// See [`stasis_plugin_api::Mapping::map`].
    pub fn map(&self, kind: &MappingKind, vma: &VmaInfo, record: &[u8]) -> Result<(), PluginError> {
        self.call(kind, Hook::Map, |hook, host| hook.map(host, vma, record.into()))
    }

    /// See [`stasis_plugin_api::Task::dump`].
    pub fn dump_task(&self, kind: &TaskKind, task: &TaskInfo) -> Result<Option<Bytes>, PluginError> {
        self.call(kind, Hook::Dump, |hook, host| hook.dump(host, task)).map(Into::into)
    }

    /// See [`stasis_plugin_api::Task::restore`].
    pub fn restore_task(&self, kind: &TaskKind, task: &TaskInfo, record: &[u8]) -> Result<(), PluginError> {
        self.call(kind, Hook::Restore, |hook, host| hook.restore(host, task, record.into()))
    }

    /// See [`stasis_plugin_api::Lifecycle::event`].
    pub fn event(&self, kind: &LifecycleKind, event: Event) -> Result<(), PluginError> {
        self.call(kind, Hook::Event, |hook, host| hook.event(host, event))
    }

    /// Takes over descriptors that a hook gave away.
    fn own<K>(&self, kind: &Kind<K>, hook: Hook, fds: RVec<i32>) -> Result<Vec<OwnedFd>, PluginError> {
        // SAFETY: F_GETFD takes no pointer; EBADF of a number that is not open, or negative.
        let closed = |fd: &&i32| unsafe { libc::fcntl(**fd, libc::F_GETFD) } < 0;
        if let Some(bad) = fds.iter().find(closed) {
            let what = format!("descriptor {bad} was returned, which is not open");
            return Err(self.error(kind, hook, HookError::invalid(what)));
        }
        // SAFETY: a hook gives away what it returns (`IntoRawFd` in plugin-api), and the numbers are open.
        Ok(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect())
    }
}
