//! What can be wrong with plugins before any of their hooks runs.

use super::Untrusted;
use std::{fmt, io, path::PathBuf};

/// Why plugins cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PluginsError {
    /// A directory of plugins cannot be read.
    #[error("cannot read plugin directory {}: {source} (check --plugin-dir)", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A library cannot be read.
    #[error("cannot read plugin {}: {source}", path.display())]
    Read {
        /// The library.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others can change what root is to run.
    #[error("plugins are not loaded as root if others can change them:{}", .0.iter().map(|one| format!("\n  {one}")).collect::<String>())]
    Untrusted(Vec<Untrusted>),
    /// The file is no shared library that this machine could load.
    #[error("{} is not a stasis plugin: {reason} (remove it, or rebuild it)", path.display())]
    NotAPlugin {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: BadFile,
    },
    /// The dynamic loader refuses it.
    #[error("cannot load plugin {}: {reason}", path.display())]
    Open {
        /// The library.
        path: PathBuf,
        /// What dlopen(3) or dlsym(3) says.
        reason: String,
    },
    /// Built against a plugin API that this program does not speak.
    #[error("plugin {} is built for plugin API {theirs}, this stasis has {ours} (rebuild it against stasis-plugin-api {ours})", path.display())]
    ApiVersion {
        /// The library.
        path: PathBuf,
        /// Version of its plugin API.
        theirs: String,
        /// Version of ours.
        ours: &'static str,
    },
    /// The version fits, but its types do not.
    #[error("plugin {} does not fit this stasis: {first} (rebuild it against stasis-plugin-api {ours})", path.display())]
    Layout {
        /// The library.
        path: PathBuf,
        /// The first difference.
        first: String,
        /// Version of our plugin API.
        ours: &'static str,
    },
    /// Two libraries call themselves the same.
    #[error("plugin {name} is there twice: {} and {} (remove one, or give one --plugin-dir only)", first.display(), second.display())]
    DuplicateName {
        /// The name.
        name: String,
        /// One library.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// Two kinds claim the same.
    #[error(
        "plugins {first} and {second} both claim {selector} (choose one with --prefer {first} or --prefer {second}, or use --without)"
    )]
    Conflict {
        /// What they claim.
        selector: String,
        /// One plugin.
        first: String,
        /// The other.
        second: String,
    },
    /// One plugin claims the same twice.
    #[error(
        "plugin {plugin} claims {selector} for both {first} and {second} (report this to its author, or use --without {plugin})"
    )]
    SelfConflict {
        /// The plugin.
        plugin: String,
        /// What it claims.
        selector: String,
        /// One kind.
        first: String,
        /// The other.
        second: String,
    },
    /// A name that no plugin has.
    #[error("{flag}: there is no plugin {name} (known: {})", known.join(", "))]
    UnknownName {
        /// Where it was given, e.g. "--without".
        flag: &'static str,
        /// The name.
        name: String,
        /// All names.
        known: Vec<String>,
    },
    /// An option that neither core nor any plugin knows.
    #[error("unknown option --{name} ({}{})", if known.is_empty() { "no loaded plugin has options" } else { "plugins know: " }, known.iter().map(|name| format!("--{name}")).collect::<Vec<_>>().join(", "))]
    UnknownOption {
        /// The option.
        name: String,
        /// All options of plugins.
        known: Vec<String>,
    },
    /// A value is missing or too much.
    #[error("option --{name} of plugin {plugin} {}", if *takes_value { "needs a value: --NAME=VALUE" } else { "takes no value" })]
    OptionValue {
        /// The option.
        name: String,
        /// Who declares it.
        plugin: String,
        /// Whether it takes a value.
        takes_value: bool,
    },
    /// An image needs plugins that are not there.
    #[error("the image needs {} (install or enable the same plugins as at the dump; see --plugin-dir)", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Needed(Vec<NeededPlugin>),
}

/// Why a file is no plugin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadFile {
    /// No ELF file at all.
    #[error("it is no 64-bit ELF file ({0})")]
    NotElf(String),
    /// For another machine, or no shared library.
    #[error("it is no shared library for x86_64")]
    Machine,
    /// Something of it is missing.
    #[error("it is truncated: a segment ends at {end} of {length} bytes")]
    Truncated {
        /// Where the segment ends.
        end: u64,
        /// Length of the file.
        length: u64,
    },
    /// A library, but not one of ours.
    #[error("it exports no plugin root module")]
    NoRootModule,
    /// A plugin with nothing registered.
    #[error("it exports nothing that it could do (a `register!` is missing)")]
    NoKinds,
    /// A plugin without a name.
    #[error("it declares no name")]
    NoName,
}

/// A plugin that an image needs and that is not there as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NeededPlugin {
    /// Its name.
    pub name: String,
    /// Its version at the dump.
    pub version: String,
    /// What is there instead.
    pub found: Found,
}

/// What is there instead of a plugin that is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// It is there, but not enabled.
    Disabled,
    /// Another version.
    Version(String),
    /// It lacks a kind.
    WithoutKind(String),
}

impl fmt::Display for NeededPlugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "plugin {} {}", self.name, self.version)?;
        match &self.found {
            Found::Nothing => f.write_str(", which is not installed"),
            Found::Disabled => f.write_str(", which is disabled"),
            Found::Version(version) => write!(f, ", but {version} is installed"),
            Found::WithoutKind(kind) => write!(f, ", but the installed one knows no {kind}"),
        }
    }
}
