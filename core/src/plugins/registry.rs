//! All plugins of this process: which are enabled, who claims what.

use super::{
    DescriptorKind, GivenOption, HandleFacts, Kind, LifecycleKind, LoadedPlugin, MappingFacts, MappingKind,
    NamespaceKind, PluginError, PluginFile, PluginsError, SessionKind, TaskKind, describe_selector,
    error::{Found, NeededPlugin},
    find_files, load,
    selectors::{Claim, Table},
    trust,
};
use crate::image::records::{Header, PluginOption, PluginUse};
use stasis_plugin_api::Selector;
use std::{
    cell::OnceCell,
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

/// Which plugins the user wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PluginChoice {
    /// `--plugin-dir`; the default directories if empty.
    pub directories: Vec<PathBuf>,
    /// `--plugins`: only these; all if empty.
    pub only: Vec<String>,
    /// `--without`.
    pub without: Vec<String>,
    /// `--prefer`: these come before all others, the first of them first.
    pub prefer: Vec<String>,
    /// `--allow-unsafe-plugins`: as root, load also what others can change.
    pub allow_unsafe: bool,
}

impl PluginChoice {
    fn enables(&self, name: &str) -> bool {
        let named = |names: &[String]| names.iter().any(|other| other == name);
        (self.only.is_empty() || named(&self.only)) && !named(&self.without)
    }
}

/// Tables of all selectors, by sort of hook.
#[derive(Default)]
struct Tables {
    descriptors: Table,
    sessions: Table,
    namespaces: Table,
    mappings: Table,
}

/// The loaded plugins.
#[derive(Default)]
pub struct Registry {
    plugins: Vec<LoadedPlugin>,
    tables: Tables,
    options: BTreeMap<(String, String), String>,
    /// Not enabled; loaded only to say which of them would help.
    disabled_files: Vec<PluginFile>,
    disabled: OnceCell<(Vec<LoadedPlugin>, Tables)>,
}

/// A resource that somebody may claim.
#[derive(Clone, Copy)]
pub enum Wanted<'a> {
    /// A descriptor.
    Handle(&'a HandleFacts<'a>),
    /// A mapping.
    Mapping(&'a MappingFacts<'a>),
    /// A namespace type.
    Namespace(&'a str),
    /// Major number of a controlling terminal.
    Terminal(u32),
}

impl Registry {
    /// Finds and loads all plugins that are wanted.
    pub fn load(choice: &PluginChoice) -> Result<Self, PluginsError> {
        let mut registry = Self::load_files(choice, find_files(&choice.directories)?, |_| true)?;
        registry.tables = Tables::new(&registry.plugins, &choice.prefer)?;
        Ok(registry)
    }

    /// Loads only what an image needs, and says what is missing. Who claims what was settled by the dump: nobody is asked again. Libraries named otherwise than
    /// `libstasis_plugin_NAME.so` are loaded to see who they are.
    pub fn load_needed(choice: &PluginChoice, header: &Header) -> Result<Self, PluginsError> {
        let needed = |name: &str| header.plugins.iter().any(|plugin| plugin.name == name);
        let registry = Self::load_files(choice, find_files(&choice.directories)?, needed)?;
        registry.needed_for(header)?;
        Ok(registry)
    }

    fn load_files(
        choice: &PluginChoice,
        files: Vec<PluginFile>,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Self, PluginsError> {
        if !choice.allow_unsafe {
            trust::check(&files)?;
        }
        let mut registry = Self::default();
        let mut known: BTreeSet<String> = files.iter().filter_map(|file| file.name.clone()).collect();
        for file in files {
            let skip = |name: &str| !choice.enables(name) || !wanted(name);
            if file.name.as_deref().is_some_and(skip) {
                registry.disabled_files.push(file);
                continue;
            }
            let plugin = load(&file.path)?;
            known.insert(plugin.name.to_string());
            if skip(&plugin.name) {
                registry.disabled_files.push(PluginFile { name: Some(plugin.name.to_string()), ..file });
                continue;
            }
            if let Some(first) = registry.plugin(&plugin.name) {
                return Err(PluginsError::DuplicateName {
                    name: plugin.name.to_string(),
                    first: first.file.clone(),
                    second: plugin.file,
                });
            }
            registry.plugins.push(plugin);
        }
        registry.plugins.sort_by(|a, b| a.name.cmp(&b.name));
        let flags =
            [("--plugins", &choice.only), ("--without", &choice.without), ("--prefer", &choice.prefer)];
        for (flag, names) in flags {
            if let Some(name) = names.iter().find(|name| !known.contains(*name)) {
                let known = known.into_iter().collect();
                return Err(PluginsError::UnknownName { flag, name: name.clone(), known });
            }
        }
        Ok(registry)
    }

    /// The enabled plugins, by name.
    pub fn plugins(&self) -> &[LoadedPlugin] {
        &self.plugins
    }

    /// The libraries of plugins that are not enabled.
    pub fn disabled(&self) -> &[PluginFile] {
        &self.disabled_files
    }

    /// An enabled plugin.
    pub fn plugin(&self, name: &str) -> Option<&LoadedPlugin> {
        self.plugins.iter().find(|plugin| &*plugin.name == name)
    }

    /// Who takes a descriptor. Fails if a plugin cannot say whether it would.
    pub fn descriptor_for(&self, facts: &HandleFacts<'_>) -> Result<Option<&DescriptorKind>, PluginError> {
        let claim = self.tables.find(&self.plugins, Wanted::Handle(facts), None);
        facts.check()?;
        Ok(claim.map(|claim| &self.plugins[claim.plugin].descriptors[claim.kind]))
    }

    /// Who takes a mapping, likewise.
    pub fn mapping_for(&self, facts: &MappingFacts<'_>) -> Result<Option<&MappingKind>, PluginError> {
        let claim = self.tables.find(&self.plugins, Wanted::Mapping(facts), None);
        facts.check()?;
        Ok(claim.map(|claim| &self.plugins[claim.plugin].mappings[claim.kind]))
    }

    /// Who takes a namespace type.
    pub fn namespace(&self, kind: &str) -> Option<&NamespaceKind> {
        let claim = self.tables.find(&self.plugins, Wanted::Namespace(kind), None)?;
        Some(&self.plugins[claim.plugin].namespaces[claim.kind])
    }

    /// Who takes a controlling terminal.
    pub fn terminal(&self, major: u32) -> Option<&SessionKind> {
        let claim = self.tables.find(&self.plugins, Wanted::Terminal(major), None)?;
        Some(&self.plugins[claim.plugin].sessions[claim.kind])
    }

    /// All namespace types that somebody takes.
    pub fn namespaces(&self) -> impl Iterator<Item = &NamespaceKind> {
        self.plugins.iter().flat_map(|plugin| &plugin.namespaces)
    }

    /// All kinds of per-task state.
    pub fn tasks(&self) -> impl Iterator<Item = &TaskKind> {
        self.plugins.iter().flat_map(|plugin| &plugin.tasks)
    }

    /// All hooks at fixed points.
    pub fn lifecycles(&self) -> impl Iterator<Item = &LifecycleKind> {
        self.plugins.iter().flat_map(|plugin| &plugin.lifecycles)
    }

    /// A kind of descriptor by name.
    pub fn descriptor_kind(&self, plugin: &str, kind: &str) -> Option<&DescriptorKind> {
        by_name(&self.plugin(plugin)?.descriptors, kind)
    }

    /// A kind of mapping by name.
    pub fn mapping_kind(&self, plugin: &str, kind: &str) -> Option<&MappingKind> {
        by_name(&self.plugin(plugin)?.mappings, kind)
    }

    /// A namespace type by name.
    pub fn namespace_kind(&self, plugin: &str, kind: &str) -> Option<&NamespaceKind> {
        by_name(&self.plugin(plugin)?.namespaces, kind)
    }

    /// A kind of per-task state by name.
    pub fn task_kind(&self, plugin: &str, kind: &str) -> Option<&TaskKind> {
        by_name(&self.plugin(plugin)?.tasks, kind)
    }

    /// What the user can do so that another plugin takes a resource: one that nobody takes, or that the plugin `refuser` takes
    /// but refuses. Empty if there is none.
    pub fn remedy(&self, wanted: Wanted<'_>, refuser: Option<&str>) -> String {
        let refusing = refuser.and_then(|name| self.plugins.iter().position(|plugin| &*plugin.name == name));
        let other = refusing.and_then(|plugin| self.tables.find(&self.plugins, wanted, Some(plugin)));
        if let Some(claim) = other {
            let name = &self.plugins[claim.plugin].name;
            return format!("plugin {name} would take it: --prefer {name}");
        }
        match self.would_take(wanted) {
            Some(name) => format!("plugin {name} would take it: enable it"),
            None => String::new(),
        }
    }

    /// Name of a plugin that is known but not enabled and would take a resource.
    fn would_take(&self, wanted: Wanted<'_>) -> Option<&str> {
        let (plugins, tables) = self.disabled.get_or_init(|| {
            // Only for a hint: what cannot be loaded cannot help.
            let plugins: Vec<_> =
                self.disabled_files.iter().filter_map(|file| load(&file.path).ok()).collect();
            let names: Vec<String> = plugins.iter().map(|plugin| plugin.name.to_string()).collect();
            let tables = Tables::new(&plugins, &names).unwrap_or_default();
            (plugins, tables)
        });
        let claim = tables.find(plugins, wanted, None)?;
        Some(&plugins[claim.plugin].name)
    }

    /// Takes over the options that the user gave. One option may be declared by several plugins, and given several times. Tells
    /// which were left out ([`GivenOption::if_declared`]).
    pub fn set_options(&mut self, given: &[GivenOption]) -> Result<Vec<String>, PluginsError> {
        let mut ignored = Vec::new();
        for option in given {
            let mut declared = false;
            for plugin in &self.plugins {
                for declaration in plugin.options.iter().filter(|other| other.name == option.name) {
                    declared = true;
                    if !declaration.takes(option.value.is_some()) {
                        return Err(PluginsError::OptionValue {
                            name: option.name.clone(),
                            plugin: plugin.name.to_string(),
                            takes_value: declaration.takes_value,
                        });
                    }
                    let value = option.value.clone().unwrap_or_default();
                    let key = (plugin.name.to_string(), option.name.clone());
                    self.options
                        .entry(key)
                        .and_modify(|values| {
                            if declaration.takes_value {
                                values.push('\n');
                                values.push_str(&value);
                            }
                        })
                        .or_insert_with(|| value.clone());
                }
            }
            if declared {
                continue;
            }
            if option.if_declared {
                ignored.push(option.name.clone());
                continue;
            }
            let known: BTreeSet<String> = self
                .plugins
                .iter()
                .flat_map(|plugin| plugin.options.iter().map(|option| option.name.clone()))
                .collect();
            let known = known.into_iter().collect();
            return Err(PluginsError::UnknownOption { name: option.name.clone(), known });
        }
        Ok(ignored)
    }

    /// Takes over the options that were in force at the dump, unless the user gave others. Those of plugins that are
    /// not enabled do not matter.
    pub fn adopt_options(&mut self, header: &Header) {
        for PluginOption { plugin, name, value } in &header.options {
            self.options.entry((plugin.clone(), name.clone())).or_insert_with(|| value.clone());
        }
    }

    /// The value of a plugin's option, empty for a switch; `None` if it was not given.
    pub fn option(&self, plugin: &str, name: &str) -> Option<&str> {
        self.options.get(&(plugin.to_owned(), name.to_owned())).map(String::as_str)
    }

    /// All options in force, for the image's header.
    pub fn options(&self) -> Vec<PluginOption> {
        let option = |((plugin, name), value): (&(String, String), &String)| PluginOption {
            plugin: plugin.clone(),
            name: name.clone(),
            value: value.clone(),
        };
        self.options.iter().map(option).collect()
    }

    /// For the image's header: the plugins that a restore needs, given all (plugin, kind) that were used.
    pub fn uses<'a>(&self, used: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<PluginUse> {
        let mut kinds: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (plugin, kind) in used {
            kinds.entry(plugin).or_default().insert(kind);
        }
        let one = |(name, kinds): (&str, BTreeSet<&str>)| {
            let plugin = self.plugin(name)?;
            let declared = plugin.kinds();
            let message = |name: &&str| {
                let with_record =
                    declared.iter().find(|(_, kind)| kind.name == *name && !kind.message.is_empty());
                with_record.map_or_else(String::new, |(_, kind)| kind.message.to_string())
            };
            Some(PluginUse {
                messages: kinds.iter().map(message).collect(),
                name: name.into(),
                version: plugin.version.clone(),
                kinds: kinds.into_iter().map(Into::into).collect(),
                descriptors: plugin.records.clone(),
            })
        };
        kinds.into_iter().filter_map(one).collect()
    }

    /// Whether all that an image needs is here; the error lists all that is not.
    pub fn needed_for(&self, header: &Header) -> Result<(), PluginsError> {
        let missing: Vec<_> = header.plugins.iter().filter_map(|used| self.missing(used)).collect();
        if missing.is_empty() { Ok(()) } else { Err(PluginsError::Needed(missing)) }
    }

    fn missing(&self, used: &PluginUse) -> Option<NeededPlugin> {
        let found = match self.plugin(&used.name) {
            None if self.disabled_files.iter().any(|file| file.name.as_ref() == Some(&used.name)) => {
                Found::Disabled
            }
            None => Found::Nothing,
            Some(plugin) if !reads(&plugin.version, &used.version) => Found::Version(plugin.version.clone()),
            Some(plugin) => {
                let kinds = plugin.kinds();
                let lacks = |kind: &&String| !kinds.iter().any(|(_, known)| known.name == kind.as_str());
                Found::WithoutKind(used.kinds.iter().find(lacks)?.clone())
            }
        };
        Some(NeededPlugin { name: used.name.clone(), version: used.version.clone(), found })
    }
}

/// Whether a plugin of version `ours` reads records of version `theirs`: same major, no older minor.
fn reads(ours: &str, theirs: &str) -> bool {
    fn parse(version: &str) -> Option<(u32, u32)> {
        let mut numbers = version.split('.').map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    }
    match (parse(ours), parse(theirs)) {
        (Some(ours), Some(theirs)) => ours.0 == theirs.0 && ours.1 >= theirs.1,
        // Not numbered as usual: only the very same.
        _ => ours == theirs,
    }
}

fn by_name<'a, H>(kinds: &'a [Kind<H>], name: &str) -> Option<&'a Kind<H>> {
    kinds.iter().find(|kind| kind.name() == name)
}

impl Tables {
    fn new(plugins: &[LoadedPlugin], prefer: &[String]) -> Result<Self, PluginsError> {
        let mut tables = Self::default();
        for (number, plugin) in plugins.iter().enumerate() {
            fill(&mut tables.descriptors, plugins, number, &plugin.descriptors, prefer, |p| &p.descriptors)?;
            fill(&mut tables.sessions, plugins, number, &plugin.sessions, prefer, |p| &p.sessions)?;
            fill(&mut tables.namespaces, plugins, number, &plugin.namespaces, prefer, |p| &p.namespaces)?;
            fill(&mut tables.mappings, plugins, number, &plugin.mappings, prefer, |p| &p.mappings)?;
        }
        let Self { descriptors, sessions, namespaces, mappings } = &mut tables;
        for table in [descriptors, sessions, namespaces, mappings] {
            table.sort(|claim| {
                let name = &*plugins[claim.plugin].name;
                prefer.iter().position(|preferred| preferred == name).unwrap_or(prefer.len())
            });
        }
        Ok(tables)
    }

    /// Who takes something, other than plugin `except`.
    fn find(&self, plugins: &[LoadedPlugin], wanted: Wanted<'_>, except: Option<usize>) -> Option<Claim> {
        match wanted {
            Wanted::Handle(facts) => self.descriptors.find(|selector, claim| match selector {
                _ if except == Some(claim.plugin) => false,
                Selector::Predicate => facts.judged(&plugins[claim.plugin].descriptors[claim.kind]),
                _ => facts.fits(selector),
            }),
            Wanted::Mapping(facts) => self.mappings.find(|selector, claim| match selector {
                _ if except == Some(claim.plugin) => false,
                Selector::Predicate => facts.judged(&plugins[claim.plugin].mappings[claim.kind]),
                _ => facts.fits(selector),
            }),
            Wanted::Namespace(kind) => self
                .namespaces
                .find(|selector, _| matches!(selector, Selector::Namespace(name) if name == kind)),
            Wanted::Terminal(major) => {
                self.sessions.find(|selector, _| *selector == Selector::Terminal(major))
            }
        }
    }
}

/// Puts the selectors of one plugin's kinds into a table.
fn fill<H>(
    table: &mut Table,
    plugins: &[LoadedPlugin],
    number: usize,
    kinds: &[Kind<H>],
    prefer: &[String],
    field: impl Fn(&LoadedPlugin) -> &Vec<Kind<H>>,
) -> Result<(), PluginsError> {
    for (position, kind) in kinds.iter().enumerate() {
        for selector in &kind.declaration.selectors {
            table.add(selector, Claim { plugin: number, kind: position }, |old, new| {
                decide(plugins, selector, prefer, (old.plugin, new.plugin), || {
                    let name = |claim: Claim| field(&plugins[claim.plugin])[claim.kind].name().to_owned();
                    (name(old), name(new))
                })
            })?;
        }
    }
    Ok(())
}

/// Two claims for the same: whether the second wins.
fn decide(
    plugins: &[LoadedPlugin],
    selector: &Selector,
    prefer: &[String],
    (old, new): (usize, usize),
    kinds: impl Fn() -> (String, String),
) -> Result<bool, PluginsError> {
    let selector = describe_selector(selector);
    let name = |plugin: usize| plugins[plugin].name.to_string();
    if old == new {
        let (first, second) = kinds();
        return Err(PluginsError::SelfConflict { plugin: name(old), selector, first, second });
    }
    // The earlier one in --prefer wins.
    let rank = |plugin: usize| prefer.iter().position(|other| *other == *plugins[plugin].name);
    match (rank(old), rank(new)) {
        (None, None) => Err(PluginsError::Conflict { selector, first: name(old), second: name(new) }),
        (Some(old), Some(new)) => Ok(new < old),
        (old, _) => Ok(old.is_none()),
    }
}
