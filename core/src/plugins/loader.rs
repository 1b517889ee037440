//! From a file to a loaded plugin.
//!
//! dlopen(3) of a truncated library ends in SIGBUS, and of any library runs its constructors: so the file is looked at
//! first. A plugin built against an older minor version of the plugin API is checked the other way round, since
//! `abi_stable` by itself only accepts what is newer than the host.

use super::{PluginsError, error::BadFile, log_sink, options::DeclaredOption};
use object::{
    Endianness, Object, ObjectSymbol, elf,
    read::{
        ReadCache,
        elf::{ElfFile64, FileHeader as _, ProgramHeader as _},
    },
};
use stasis_plugin_api::{
    KindDeclaration,
    abi::{
        DescriptorBox, FINGERPRINT, FINGERPRINT_SYMBOL, LifecycleBox, MappingBox, NamespaceBox, PluginRef,
        SessionBox, TaskBox,
    },
    abi_stable::{
        StableAbi,
        abi_stability::abi_checking::check_layout_compatibility,
        library::{
            AbiHeaderRef, LibHeader, LibraryError, ROOT_MODULE_LOADER_NAME, ROOT_MODULE_LOADER_NAME_WITH_NUL,
            RootModule,
        },
        sabi_types::VersionNumber,
    },
};
use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A hook of a plugin with what it says of itself.
pub struct Kind<H> {
    /// Name of the plugin.
    pub plugin: Arc<str>,
    /// Name, selectors, order, record.
    pub declaration: KindDeclaration,
    /// The hook; called through [`CallContext`](super::CallContext) only.
    pub(super) hook: H,
}

impl<H> Kind<H> {
    /// Name of the kind.
    pub fn name(&self) -> &str {
        &self.declaration.name
    }
}

/// A kind of descriptor.
pub type DescriptorKind = Kind<DescriptorBox>;
/// A kind of controlling terminal.
pub type SessionKind = Kind<SessionBox>;
/// A namespace type.
pub type NamespaceKind = Kind<NamespaceBox>;
/// A kind of mapping.
pub type MappingKind = Kind<MappingBox>;
/// A kind of per-task state.
pub type TaskKind = Kind<TaskBox>;
/// Something that runs at fixed points.
pub type LifecycleKind = Kind<LifecycleBox>;

/// A plugin in this process. It is never unloaded.
pub struct LoadedPlugin {
    /// Its name.
    pub name: Arc<str>,
    /// Its version.
    pub version: String,
    /// Version of the plugin API it was built against.
    pub api_version: String,
    /// The library.
    pub file: PathBuf,
    /// Serialized `google.protobuf.FileDescriptorSet` of its records.
    pub records: Vec<u8>,
    /// Options it declares.
    pub options: Vec<DeclaredOption>,
    /// Its kinds of descriptors, by name; likewise below.
    pub descriptors: Vec<DescriptorKind>,
    /// Terminals.
    pub sessions: Vec<SessionKind>,
    /// Namespaces.
    pub namespaces: Vec<NamespaceKind>,
    /// Mappings.
    pub mappings: Vec<MappingKind>,
    /// Per-task state.
    pub tasks: Vec<TaskKind>,
    /// Fixed points.
    pub lifecycles: Vec<LifecycleKind>,
}

impl LoadedPlugin {
    /// All kinds: what sort of hook, and its declaration.
    pub fn kinds(&self) -> Vec<(&'static str, &KindDeclaration)> {
        fn of<'a, H>(
            sort: &'static str,
            kinds: &'a [Kind<H>],
        ) -> impl Iterator<Item = (&'static str, &'a KindDeclaration)> {
            kinds.iter().map(move |kind| (sort, &kind.declaration))
        }
        of("descriptor", &self.descriptors)
            .chain(of("session", &self.sessions))
            .chain(of("namespace", &self.namespaces))
            .chain(of("mapping", &self.mappings))
            .chain(of("task", &self.tasks))
            .chain(of("lifecycle", &self.lifecycles))
            .collect()
    }
}

/// A library that may be a plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginFile {
    /// Where it is.
    pub path: PathBuf,
    /// The plugin's name as the file name gives it, if it is named as ours are.
    pub name: Option<String>,
    /// Whether its directory was given by the user.
    pub explicit: bool,
}

const PREFIX: &str = "libstasis_plugin_";

/// The libraries in `directories`; if none are given, those next to the executable and in
/// `<prefix>/lib/stasis/plugins`. In directories that were given every `*.so` counts.
pub fn find_files(directories: &[PathBuf]) -> Result<Vec<PluginFile>, PluginsError> {
    let explicit = !directories.is_empty();
    let defaults = if explicit { Vec::new() } else { default_directories() };
    let mut files = Vec::new();
    for directory in directories.iter().chain(&defaults) {
        let failed = |source| PluginsError::Directory { path: directory.clone(), source };
        let entries = match std::fs::read_dir(directory) {
            Err(error) if !explicit && error.kind() == std::io::ErrorKind::NotFound => continue,
            other => other.map_err(failed)?,
        };
        let start = files.len();
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let Some(stem) = name.strip_suffix(".so") else { continue };
            let name = stem.strip_prefix(PREFIX).map(|name| name.replace('_', "-"));
            if explicit || name.is_some() {
                files.push(PluginFile { path, name, explicit });
            }
        }
        files[start..].sort_by(|a, b| a.path.cmp(&b.path));
    }
    // An installed plugin gives way to the one next to the executable.
    if !explicit {
        let mut seen = std::collections::BTreeSet::new();
        files.retain(|file| seen.insert(file.name.clone()));
    }
    Ok(files)
}

fn default_directories() -> Vec<PathBuf> {
    let executable = std::env::current_exe().unwrap_or_default();
    let Some(directory) = executable.parent() else { return Vec::new() };
    let installed = directory.parent().map(|prefix| prefix.join("lib/stasis/plugins"));
    std::iter::once(directory.to_owned()).chain(installed).collect()
}

/// Looks at the file before the dynamic loader does.
fn look(path: &Path) -> Result<(), PluginsError> {
    let read = |source| PluginsError::Read { path: path.into(), source };
    let bad = |reason| PluginsError::NotAPlugin { path: path.into(), reason };
    let file = File::open(path).map_err(read)?;
    let metadata = file.metadata().map_err(read)?;
    let cache = ReadCache::new(file);
    let elf =
        ElfFile64::<Endianness, _>::parse(&cache).map_err(|error| bad(BadFile::NotElf(error.to_string())))?;
    let endian = elf.endian();
    let header = elf.elf_header();
    let is_ours = header.e_machine(endian) == elf::EM_X86_64 && header.e_type(endian) == elf::ET_DYN;
    if !is_ours || endian != Endianness::Little {
        return Err(bad(BadFile::Machine));
    }
    for segment in elf.elf_program_headers() {
        let end = segment.p_offset(endian).saturating_add(segment.p_filesz(endian));
        if end > metadata.len() {
            return Err(bad(BadFile::Truncated { end, length: metadata.len() }));
        }
    }
    let exported = elf
        .dynamic_symbols()
        .any(|symbol| symbol.is_definition() && symbol.name() == Ok(ROOT_MODULE_LOADER_NAME));
    if exported { Ok(()) } else { Err(bad(BadFile::NoRootModule)) }
}

/// Our own version of the plugin API.
pub(super) fn api_version() -> &'static str {
    PluginRef::VERSION_STRINGS.version.as_str()
}

/// The root module of the library at `path`.
fn root_module(path: &Path) -> Result<(PluginRef, String), PluginsError> {
    use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
    let open = |reason: String| PluginsError::Open { path: path.into(), reason: one_line(&reason) };
    // SAFETY: constructors of the library run now. The file was looked at: it is complete and exports our root module,
    // so it is what the user installed as a plugin, and those are trusted to be sound.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
        .map_err(|error| open(error.to_string()))?;
    // SAFETY: `export_root_module` makes this symbol a static reference to an `AbiHeader`; `upgrade` below looks at its
    // magic before anything else of it is used. The reference stays valid since the library is leaked.
    let header = unsafe { library.get::<AbiHeaderRef>(ROOT_MODULE_LOADER_NAME_WITH_NUL.as_bytes()) }
        .map(|symbol| *symbol)
        .map_err(|error| open(error.to_string()))?;
    // SAFETY: `export_plugin!` makes this symbol a static u64; nothing else exports a symbol of this name together with
    // our root module.
    let fingerprint = unsafe { library.get::<*const u64>(FINGERPRINT_SYMBOL.as_bytes()) };
    // SAFETY: as above; the static is readable as long as the library is loaded.
    let same_source = fingerprint.is_ok_and(|symbol| unsafe { **symbol } == FINGERPRINT);
    // Never unloaded: hooks, layouts and log targets in it are 'static.
    std::mem::forget(library);
    let header = header.upgrade().map_err(|error| open(short(&error)))?;
    let theirs = VersionNumber::new(header.version_strings()).map_err(|error| open(error.to_string()))?;
    let ours = VersionNumber::new(PluginRef::VERSION_STRINGS).map_err(|error| open(error.to_string()))?;
    let version = header.version_strings().version.to_string();
    if theirs.major != ours.major {
        let (path, theirs) = (path.into(), version);
        return Err(PluginsError::ApiVersion { path, theirs, ours: api_version() });
    }
    if !same_source {
        check_layout(header, theirs.minor < ours.minor).map_err(|first| PluginsError::Layout {
            path: path.into(),
            first,
            ours: api_version(),
        })?;
    }
    // SAFETY: the layouts are compatible: just compared, or of the very same source.
    let module = unsafe { header.unchecked_layout::<PluginRef>() }
        .map_err(|error| open(one_line(&error.to_string())))?;
    Ok((module, version))
}

/// Whether the types of the plugin fit ours; the first difference otherwise.
fn check_layout(header: &LibHeader, older: bool) -> Result<(), String> {
    let ours = <PluginRef as StableAbi>::LAYOUT;
    let theirs = header.layout().ok_or_else(|| "it has no type layouts".to_owned())?;
    // An older plugin lacks what was appended since: seen from its side, that is what "newer" means.
    let (interface, implementation) = if older { (theirs, ours) } else { (ours, theirs) };
    check_layout_compatibility(interface, implementation).map_err(|errors| {
        // The whole text has 1,400 lines; the first `Error:` block says what it is.
        let text = errors.to_string();
        let block = text.split("Error:").nth(1).unwrap_or(&text);
        one_line(&block.lines().take(6).collect::<Vec<_>>().join(" "))
    })
}

fn short(error: &LibraryError) -> String {
    match error {
        LibraryError::InvalidAbiHeader(_) => "it is built with another version of abi_stable".into(),
        other => one_line(&other.to_string()),
    }
}

fn one_line(text: &str) -> String {
    let mut words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = words.char_indices().nth(300) {
        words.truncate(end);
    }
    words
}

/// Loads the plugin at `path`.
pub fn load(path: &Path) -> Result<LoadedPlugin, PluginsError> {
    let start = std::time::Instant::now();
    look(path)?;
    let looked = start.elapsed();
    let (module, api_version) = root_module(path)?;
    module.set_log()(log_sink::sink());
    let declaration = module.declaration()();
    if declaration.name.is_empty() {
        return Err(PluginsError::NotAPlugin { path: path.into(), reason: BadFile::NoName });
    }
    let name: Arc<str> = declaration.name.as_str().into();
    macro_rules! kinds {
        ($field:ident) => {{
            // The registry inside a plugin has no stable order.
            let mut kinds: Vec<_> = module.$field()()
                .into_iter()
                .map(|hook| Kind { plugin: Arc::clone(&name), declaration: hook.declaration(), hook })
                .collect();
            kinds.sort_by(|a, b| a.declaration.name.cmp(&b.declaration.name));
            kinds
        }};
    }
    let plugin = LoadedPlugin {
        version: declaration.version.into(),
        api_version,
        file: path.into(),
        records: declaration.records.into(),
        options: declaration.options.iter().map(DeclaredOption::from).collect(),
        descriptors: kinds!(descriptors),
        sessions: kinds!(sessions),
        namespaces: kinds!(namespaces),
        mappings: kinds!(mappings),
        tasks: kinds!(tasks),
        lifecycles: kinds!(lifecycles),
        name,
    };
    if plugin.kinds().is_empty() {
        return Err(PluginsError::NotAPlugin { path: path.into(), reason: BadFile::NoKinds });
    }
    tracing::debug!(plugin = %plugin.name, version = plugin.version, file = %path.display(), ?looked,
        took = ?start.elapsed(), "plugin loaded");
    Ok(plugin)
}
