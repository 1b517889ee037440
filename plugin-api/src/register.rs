//! Collecting the hooks of a plugin (`inventory`) and exporting them as its root module.

use crate::{
    OptionDeclaration, PluginDeclaration,
    abi::{DescriptorBox, LifecycleBox, MappingBox, NamespaceBox, Plugin, PluginRef, SessionBox, TaskBox},
    forward_log,
};
use abi_stable::{prefix_type::PrefixTypeTrait, std_types::RVec};

pub use crate::guard::{descriptor, lifecycle, mapping, namespace, session, task};

/// One registered hook. Each library has a registry of its own; the order is not stable, so core sorts by name.
pub enum Registration {
    /// See [`Descriptor`](crate::Descriptor).
    Descriptor(fn() -> DescriptorBox),
    /// See [`Session`](crate::Session).
    Session(fn() -> SessionBox),
    /// See [`Namespace`](crate::Namespace).
    Namespace(fn() -> NamespaceBox),
    /// See [`Mapping`](crate::Mapping).
    Mapping(fn() -> MappingBox),
    /// See [`Task`](crate::Task).
    Task(fn() -> TaskBox),
    /// See [`Lifecycle`](crate::Lifecycle).
    Lifecycle(fn() -> LifecycleBox),
}
inventory::collect!(Registration);

/// Who the plugin is; written by `export_plugin!`.
#[doc(hidden)]
pub struct Identity {
    pub name: &'static str,
    pub version: &'static str,
    pub records: &'static [u8],
    pub options: &'static [OptionDeclaration],
}
inventory::collect!(Identity);

extern "C" fn declaration() -> PluginDeclaration {
    let identity = inventory::iter::<Identity>.into_iter().next();
    PluginDeclaration {
        name: identity.map_or("", |i| i.name).into(),
        version: identity.map_or("", |i| i.version).into(),
        options: identity.map_or(&[][..], |i| i.options).iter().copied().collect(),
        records: identity.map_or(&[][..], |i| i.records).into(),
    }
}

macro_rules! collect {
    ($($name:ident: $variant:ident => $boxed:ident;)*) => { $(
        extern "C" fn $name() -> RVec<$boxed> {
            inventory::iter::<Registration>
                .into_iter()
                .filter_map(|r| match r { Registration::$variant(make) => Some(make()), _ => None })
                .collect()
        }
    )* };
}
collect! {
    descriptors: Descriptor => DescriptorBox;
    sessions: Session => SessionBox;
    namespaces: Namespace => NamespaceBox;
    mappings: Mapping => MappingBox;
    tasks: Task => TaskBox;
    lifecycles: Lifecycle => LifecycleBox;
}

/// The root module of the library this is called in.
#[doc(hidden)]
pub fn root_module() -> PluginRef {
    Plugin {
        declaration,
        set_log: forward_log::install,
        descriptors,
        sessions,
        namespaces,
        mappings,
        tasks,
        lifecycles,
    }
    .leak_into_prefix()
}

/// Registers a hook: `register!(descriptor: MyKind);`, likewise `session`, `namespace`, `mapping`, `task`, `lifecycle`.
/// The type is constructed by the expression given, so a unit struct is enough.
#[macro_export]
macro_rules! register {
    (descriptor: $hook:expr) => {
        $crate::inventory::submit! { $crate::Registration::Descriptor(|| $crate::register::descriptor($hook)) }
    };
    (session: $hook:expr) => {
        $crate::inventory::submit! { $crate::Registration::Session(|| $crate::register::session($hook)) }
    };
    (namespace: $hook:expr) => {
        $crate::inventory::submit! { $crate::Registration::Namespace(|| $crate::register::namespace($hook)) }
    };
    (mapping: $hook:expr) => {
        $crate::inventory::submit! { $crate::Registration::Mapping(|| $crate::register::mapping($hook)) }
    };
    (task: $hook:expr) => {
        $crate::inventory::submit! { $crate::Registration::Task(|| $crate::register::task($hook)) }
    };
    (lifecycle: $hook:expr) => {
        $crate::inventory::submit! { $crate::Registration::Lifecycle(|| $crate::register::lifecycle($hook)) }
    };
}

/// Exports the library as a plugin; once per crate. The crate needs a direct dependency on `abi_stable`.
#[macro_export]
macro_rules! export_plugin {
    (name: $name:literal, records: $records:expr $(, options: [$($option:expr),* $(,)?])? $(,)?) => {
        #[doc(hidden)]
        #[allow(missing_docs, unused_imports)]
        mod __stasis_plugin_export {
            use super::*;
            $crate::inventory::submit! {
                $crate::register::Identity {
                    name: $name,
                    version: env!("CARGO_PKG_VERSION"),
                    records: $records,
                    options: &[$($($option),*)?],
                }
            }
            #[unsafe(export_name = "stasis_plugin_api_fingerprint")]
            static FINGERPRINT: u64 = $crate::abi::FINGERPRINT;

            #[$crate::abi_stable::export_root_module]
            pub fn root_module() -> $crate::abi::PluginRef {
                $crate::register::root_module()
            }
        }
    };
}
