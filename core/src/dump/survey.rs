//! `stasis dump --dry-run`: what a dump would find, without stopping anything. Steps 3 and 4 of a dump are taken on the running
//! tree, and plugins are asked for their records, which go nowhere. What only stopped tasks can tell is not looked at.

use super::{
    Context, DumpError, DumpOptions,
    claim::{self, place},
    collect::{self, FrozenTree},
    inventory::{Claim, Inventory},
    resources,
    unclaimed::Unclaimed,
};
use crate::{
    guardian::Guardian,
    plugins::{HookWatch, PluginError},
    proc::{ProcDir, status::Stat},
    ptrace::who,
    tree::{Found, Process, Sharing, Tree, sharing},
};
use stasis_plugin_api::{ErrorKind, NamespaceInfo};
use std::collections::{HashMap, HashSet};

/// A resource of a task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resource {
    /// Descriptor number, mapping, namespace; "itself" for what is the task's own.
    pub place: String,
    /// What it is.
    pub what: String,
    /// "core", or a plugin and its kind; `None` if nobody would take it.
    pub taken_by: Option<String>,
    /// Why a dump would fail because of it.
    pub refusal: Option<String>,
    /// What the user can do about that.
    pub remedy: String,
}

/// A task and what it holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskResources {
    /// Its pid.
    pub pid: i32,
    /// Its name.
    pub name: String,
    /// How many mappings it has; those that core does not know are among the resources.
    pub mappings: usize,
    /// Everything else.
    pub resources: Vec<Resource>,
}

/// What a dump would find.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// Every living task.
    pub tasks: Vec<TaskResources>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

impl Survey {
    /// How many resources would make a dump fail.
    pub fn refusals(&self) -> usize {
        let resources = self.tasks.iter().flat_map(|task| &task.resources);
        resources.filter(|resource| resource.refusal.is_some()).count()
    }
}

/// Why, and what to do about it.
type Refusal = (String, String);

/// Looks at the tree.
pub(super) fn survey(
    options: &DumpOptions,
    guardian: Guardian,
    watch: &'static HookWatch,
) -> Result<Survey, DumpError> {
    let context = Context::new(options, guardian, watch, || Ok(None))?;
    let tree = Tree::read(&walk(options.tree)?)?;
    let mut found: Vec<Unclaimed> = Vec::new();
    let root = tree.root();
    let mut of_tree = |error: String| {
        let (pid, task, place) = (root.host_pid, root.name.clone(), "itself".to_owned());
        found.push(Unclaimed { pid, task, place, what: error, remedy: String::new() });
    };
    if let Err(error) = tree.check_leaders(options.shell_job) {
        of_tree(error.to_string());
    }
    let shared = sharing(&tree).unwrap_or_else(|error| {
        of_tree(error.to_string());
        Sharing::default()
    });
    let (frozen, missing) = collect::look(&context, tree, shared)?;
    found.extend(missing);
    let by_object = ask_for_records(&context, &frozen, &mut found);
    let survey = report(&context, &frozen, found, &by_object);
    Ok(Survey { warnings: context.warnings.into_inner(), ..survey })
}

/// All processes below `root`, parents first, with their threads.
fn walk(root: i32) -> Result<Vec<Found>, DumpError> {
    let mut found = Vec::new();
    let mut next = vec![root];
    let mut seen = HashSet::new();
    while let Some(pid) = next.pop() {
        let proc = match ProcDir::open(pid) {
            // It ended meanwhile, as it might have before.
            Err(error) if error.is_gone() && pid != root => continue,
            proc => proc?,
        };
        let mut tids = who::threads(pid);
        tids.sort_unstable_by_key(|&tid| (tid != pid, tid));
        let zombie = Stat::read(&proc)?.state() == b'Z';
        let children: Vec<i32> = tids.iter().flat_map(|&tid| who::children(pid, tid)).collect();
        next.extend(children.into_iter().filter(|&child| seen.insert(child)));
        found.push(Found { pid, tids, zombie, group_stop: 0 });
    }
    Ok(found)
}

/// Has plugins write their records, for what they refuse; the refusals by index of the object.
fn ask_for_records(
    context: &Context<'_>,
    frozen: &FrozenTree,
    found: &mut Vec<Unclaimed>,
) -> HashMap<usize, Refusal> {
    let inventory = context.inventory.borrow();
    let mut by_object = HashMap::new();
    for index in 0..inventory.objects.len() {
        let object = &inventory.objects[index];
        let Some(kind) = context.registry.descriptor_kind(&object.plugin, &object.kind) else { continue };
        let (task, name, resource) = resources::whose(&inventory, index);
        let host = context.host(&kind.plugin);
        let dumped = context.call(&host, task, &name, &resource).dump(kind, &inventory.object_info(index));
        let refused = dumped.err().and_then(|error| {
            let error = match object.handles.first() {
                Some(&handle) => claim::with_other_taker(context, &inventory, handle, error),
                None => error,
            };
            refusal(context, error)
        });
        by_object.extend(refused.map(|refusal| (index, refusal)));
    }
    let mut add = |process: &Process, place: String, error: PluginError| {
        if let Some((what, remedy)) = refusal(context, error) {
            found.push(Unclaimed { pid: process.host_pid, task: process.name.clone(), place, what, remedy });
        }
    };
    let living: Vec<&Process> = inventory.tree.living().collect();
    for (process, plugin, kind, info) in frozen.plugin_mappings() {
        let Some(hook) = context.registry.mapping_kind(plugin, kind) else { continue };
        let host = context.host(plugin);
        let place = place(info.start, info.end);
        if let Err(error) = context.call(&host, info.pid, "", &place).dump_mapping(hook, info) {
            add(living[process], place, error);
        }
    }
    for namespace in &frozen.namespaces.foreign {
        let Some(kind) = context.registry.namespace(namespace.kind) else { continue };
        let info = NamespaceInfo {
            id: namespace.id,
            kind: namespace.kind.into(),
            ino: namespace.ino,
            members: namespace.members.iter().copied().collect(),
        };
        let place = namespace_name(namespace.kind, namespace.ino);
        let host = context.host(&kind.plugin);
        let dumped = context.call(&host, 0, "", &place).dump_namespace(kind, &info);
        let first = namespace.members.first().and_then(|&pid| inventory.tree.by_pid(pid));
        if let (Err(error), Some(first)) = (dumped, first) {
            add(first, place, error);
        }
    }
    for kind in context.registry.tasks() {
        for (task, process) in inventory.tasks().iter().zip(&living) {
            let host = context.host(&kind.plugin);
            if let Err(error) = context.call(&host, task.pid, &task.name, "").dump_task(kind, task) {
                add(process, "itself".to_owned(), error);
            }
        }
    }
    by_object
}

/// What a plugin refuses. Other errors may come from the tree running meanwhile: they are warnings.
fn refusal(context: &Context<'_>, error: PluginError) -> Option<Refusal> {
    if error.source.kind == ErrorKind::Unsupported {
        return Some((error.source.what.to_string(), error.source.remedy.to_string()));
    }
    context.warnings.borrow_mut().push(format!("only a dump can tell: {error}"));
    None
}

fn namespace_name(kind: &str, ino: u64) -> String {
    format!("namespace {kind}:[{ino}]")
}

fn report(
    context: &Context<'_>,
    frozen: &FrozenTree,
    found: Vec<Unclaimed>,
    by_object: &HashMap<usize, Refusal>,
) -> Survey {
    let inventory = context.inventory.borrow();
    let mut refused: HashMap<(i32, String), Unclaimed> = HashMap::new();
    let mut rest = Vec::new();
    for one in found {
        match one.place.starts_with("descriptor ") {
            true => drop(refused.insert((one.pid, one.place.clone()), one)),
            false => rest.push(one),
        }
    }
    let mut tasks = Vec::new();
    for (process, mappings) in inventory.tree.living().zip(frozen.mapping_counts()) {
        let mut resources = Vec::new();
        for entry in inventory.tables.get(&process.host_pid).into_iter().flatten() {
            let claim = inventory.claims[entry.handle];
            let info = inventory.handle_info(Inventory::handle_id(entry.handle)).unwrap_or_default();
            let (pid, number) = inventory.handles.all[entry.handle].subject();
            let refusal = match claim {
                Claim::Object { index, .. } => by_object.get(&index).cloned(),
                _ => refused
                    .get(&(pid, format!("descriptor {number}")))
                    .map(|one| (one.what.clone(), one.remedy.clone())),
            };
            let taken_by = match claim {
                Claim::Path => Some("core".to_owned()),
                Claim::External => Some("--inherit-fd, at the restore".to_owned()),
                Claim::LeftOut { null } => {
                    Some(if null { "nobody: /dev/null" } else { "nobody: left out" }.to_owned())
                }
                Claim::Refused => None,
                Claim::Object { index, .. } => {
                    let object = &inventory.objects[index];
                    Some(format!("{}/{}", object.plugin, object.kind))
                }
            };
            let (refusal, remedy) = refusal.map_or((None, String::new()), |(why, what)| (Some(why), what));
            let place = format!("descriptor {}", entry.number);
            resources.push(Resource { place, what: info.link.to_string(), taken_by, refusal, remedy });
        }
        let own = rest.iter().filter(|one| one.pid == process.host_pid);
        resources.extend(own.map(|one| Resource {
            place: one.place.clone(),
            refusal: Some(one.what.clone()),
            remedy: one.remedy.clone(),
            ..Resource::default()
        }));
        for (at, plugin, kind, info) in frozen.plugin_mappings() {
            let place = place(info.start, info.end);
            let known = resources.iter().any(|resource| resource.place == place);
            if !known && inventory.tree.living().nth(at).is_some_and(|p| p.host_pid == process.host_pid) {
                let taken_by = Some(format!("{plugin}/{kind}"));
                let what = info.path.to_string();
                resources.push(Resource { place, what, taken_by, ..Resource::default() });
            }
        }
        for namespace in &frozen.namespaces.foreign {
            let place = namespace_name(namespace.kind, namespace.ino);
            let known = resources.iter().any(|resource| resource.place == place);
            if known || !namespace.members.contains(&process.pid) {
                continue;
            }
            let kind = context.registry.namespace(namespace.kind);
            let taken_by = kind.map(|kind| format!("{}/{}", kind.plugin, kind.name()));
            resources.push(Resource { place, taken_by, ..Resource::default() });
        }
        tasks.push(TaskResources { pid: process.host_pid, name: process.name.clone(), mappings, resources });
    }
    Survey { tasks, warnings: Vec::new() }
}
