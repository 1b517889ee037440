//! Finding, checking and loading plugins; which of them takes a resource; calling their hooks.
//!
//! [`Registry::load`] finds the libraries, looks at each file before `dlopen` does ([`loader`]), applies `--plugins`,
//! `--without` and `--prefer`, and puts all selectors into tables. Core asks it by facts and never by a resource's name.
//! Every hook is called through [`call`], which notes it on the [status page](HookWatch) that the supervisor watches.

mod call;
mod error;
mod loader;
pub mod log_sink;
mod options;
mod registry;
mod scaffold;
mod selectors;
mod trust;
mod watch;

pub use call::{CallContext, Hook, PluginError};
pub use error::{BadFile, Found, NeededPlugin, PluginsError};
pub use loader::{
    DescriptorKind, Kind, LifecycleKind, LoadedPlugin, MappingKind, NamespaceKind, PluginFile, SessionKind,
    TaskKind, find_files, load,
};
pub use options::{DeclaredOption, GivenOption, split_arguments};
pub use registry::{PluginChoice, Registry, Wanted};
pub use scaffold::{ScaffoldError, scaffold};
pub use selectors::{HandleFacts, Judge, MappingFacts, describe_selector};
pub use trust::{Exposure, Untrusted};
pub use watch::{HookWatch, Running, RunningHook};
