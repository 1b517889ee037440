//! Steps 2, 3 and 5: stop the tree, describe it from outside, ask what only the tasks can tell.

use super::{
    Context, DumpError, claim, ghosts,
    inventory::{Claim, Inventory},
    mapped,
    pages::Pages,
    unclaimed::{self, Policy, Unclaimed, unclaimed},
};
use crate::{
    files::{
        Names,
        names::{Allowed, Space},
        table::{Entry, Handles, read_table},
    },
    image::records::{self, Header, MemoryMap},
    machine,
    memory::describe::{self, MappedObjects, MemoryDescription, Refused},
    parallel,
    plugins::Wanted,
    proc::mappings,
    task::{self, ProcessContext, TaskPaths},
    tree::{Found, NamespaceMap, Process, Sharing, Tree, sharing},
};
use nix::time::{ClockId, clock_gettime};
use stasis_plugin_api::VmaInfo;
use std::collections::{BTreeMap, HashMap};

/// The frozen tree, described.
pub(super) struct FrozenTree {
    /// Namespaces of the tree.
    pub namespaces: NamespaceMap,
    memory: Vec<MemoryDescription>,
    objects: MappedObjects,
    /// Executable, working directory and root of each living process.
    paths: Vec<TaskPaths>,
    contexts: HashMap<i32, ProcessContext>,
    /// Number of each living process, by pid as stasis sees it; of its memory map, too, and of what it is the first to have
    /// of several that share it.
    numbers: HashMap<i32, u32>,
    sharing: Sharing,
    /// Mappings of plugins: (index of the process among the living, index of the mapping, plugin, kind).
    plugin_mappings: Vec<(usize, usize, String, String, VmaInfo)>,
}

/// Step 2: stops every thread of the tree.
pub(super) fn seize(context: &Context<'_>) -> Result<Vec<Found>, DumpError> {
    let options = context.options;
    let mut guardian = context.guardian.borrow_mut();
    let seized = guardian.seize(options.tree, options.timeout, options.freeze_cgroup.clone())?;
    Ok(seized
        .into_iter()
        .map(|task| Found {
            pid: task.pid,
            tids: task.tids,
            zombie: task.zombie,
            group_stop: task.group_stop.unwrap_or_default(),
        })
        .collect())
}

/// Steps 3 and 4: reads /proc, and finds somebody for every resource.
pub(super) fn describe(context: &Context<'_>, found: &[Found]) -> Result<FrozenTree, DumpError> {
    let tree = Tree::read(found)?;
    tree.check_leaders(context.options.shell_job)?;
    let sharing = sharing(&tree)?;
    let (frozen, missing) = look(context, tree, sharing)?;
    if missing.is_empty() { Ok(frozen) } else { Err(DumpError::Unclaimed(missing)) }
}

/// The same of a tree that was read, with a list of what nobody takes.
pub(super) fn look(
    context: &Context<'_>,
    tree: Tree,
    sharing: Sharing,
) -> Result<(FrozenTree, Vec<Unclaimed>), DumpError> {
    let namespaces = NamespaceMap::read(&tree)?;
    let living: Vec<&Process> = tree.living().collect();
    let owner = |pid: i32| sharing.files.get(&pid).copied().unwrap_or(pid);
    let facts = parallel::map(&living, |process| -> Result<_, DumpError> {
        let owns = owner(process.host_pid) == process.host_pid;
        let table = if owns { read_table(&process.proc)? } else { Vec::new() };
        Ok((mappings::read(&process.proc)?, table))
    })?;
    let root = tree.root();
    let (mounts, users) = (namespaces.is_foreign("mnt", root), namespaces.is_foreign("user", root));
    let allowed =
        Allowed { ghost_limit: context.options.ghost_limit, link_remap: context.options.link_remap };
    let pids = tree.processes.iter().map(|process| process.pid).collect();
    let names = Names::new(allowed, &root.proc, mounts, users)?
        .with_processes(pids, namespaces.is_foreign("pid", root))
        .with_spaces(spaces(&tree, &namespaces)?);
    let mut objects = MappedObjects::new(names);
    let mut missing = Vec::new();
    let mut paths = Vec::with_capacity(living.len());
    let mut memory = Vec::with_capacity(living.len());
    let mut handles = Handles::default();
    let mut tables: BTreeMap<i32, Vec<Entry>> = BTreeMap::new();
    for (process, (mappings, descriptors)) in living.iter().zip(facts) {
        memory.push(describe::describe(&process.proc, mappings, &mut objects)?);
        paths.push(TaskPaths::read(&process.proc, &mut objects.names, |what, link, refusal| {
            let text = format!("{} {refusal}", String::from_utf8_lossy(&link));
            let (place, remedy) = (what.to_owned(), refusal.remedy());
            missing.push(unclaimed(&tree, process.host_pid, place, text, remedy));
        })?);
        // Who shares a table comes after the one that had it first.
        let table = match tables.get(&owner(process.host_pid)) {
            Some(shared) => handles.add_sharer(process.host_pid, shared),
            None => handles.add_table(process.host_pid, process.worker(), descriptors)?,
        };
        tables.insert(process.host_pid, table);
    }
    let numbers = living.iter().zip(1..).map(|(process, number)| (process.host_pid, number)).collect();
    drop(living);
    *context.inventory.borrow_mut() = Inventory::new(tree, tables, handles);
    let mut frozen = FrozenTree {
        namespaces,
        memory,
        objects,
        paths,
        contexts: HashMap::new(),
        numbers,
        sharing,
        plugin_mappings: Vec::new(),
    };
    frozen.claim(context, &mut missing)?;
    Ok((frozen, missing))
}

/// Mount namespaces of tasks below the root.
fn spaces(tree: &Tree, namespaces: &NamespaceMap) -> Result<Vec<Space>, DumpError> {
    let root = tree.root().pid;
    let others = namespaces.foreign.iter().filter(|one| one.kind == "mnt" && !one.members.contains(&root));
    let mut spaces = Vec::new();
    for namespace in others {
        let members: Vec<&Process> = tree.living().filter(|p| namespace.members.contains(&p.pid)).collect();
        if let Some(first) = members.first() {
            let pids = members.iter().map(|process| process.worker()).collect();
            spaces.push(Space::new(namespace.id, &first.proc, pids)?);
        }
    }
    Ok(spaces)
}

impl FrozenTree {
    fn claim(&mut self, context: &Context<'_>, missing: &mut Vec<Unclaimed>) -> Result<(), DumpError> {
        claim::sessions(context, missing)?;
        mapped::adopt(context, &mut self.memory, &mut self.objects)?;
        claim::descriptors(context, &mut self.objects.names, missing)?;
        self.mapped_but_left_out(context, missing);
        let inventory = context.inventory.borrow();
        for (index, (process, memory)) in inventory.tree.living().zip(&mut self.memory).enumerate() {
            let mut holes = Vec::new();
            for (mapping, why) in &memory.refused {
                let (why, remedy) = match why {
                    Refused::State(why) => ((*why).to_owned(), String::new()),
                    Refused::File(refusal) => (refusal.to_string(), refusal.remedy()),
                };
                let what = format!("{} {why}", name_of(&mapping.path));
                let place = claim::place(mapping.start, mapping.end);
                missing.push(unclaimed(&inventory.tree, process.host_pid, place, what, remedy));
            }
            for unknown in &memory.unknown {
                if let Some((kind, info)) = claim::mapping_kind(context, process, &unknown.mapping)? {
                    let vma = unknown.vma - holes.len();
                    let claimed = (index, vma, kind.plugin.to_string(), kind.name().to_string(), info);
                    self.plugin_mappings.push(claimed);
                    continue;
                }
                let entry = claim::unclaimed_mapping(context, &inventory.tree, process, unknown);
                if unclaimed::policy(&context.options.on_unclaimed, unclaimed::MAPPING) == Policy::Skip {
                    context.warnings.borrow_mut().push(format!("left out: {entry}"));
                    holes.push(unknown.vma);
                } else {
                    missing.push(entry);
                }
            }
            holes.iter().rev().for_each(|&hole| drop(memory.vmas.remove(hole)));
        }
        for namespace in &self.namespaces.foreign {
            if context.registry.namespace(namespace.kind).is_some() {
                continue;
            }
            let first = namespace.members.first().and_then(|&pid| inventory.tree.by_pid(pid));
            let remedy = context.registry.remedy(Wanted::Namespace(namespace.kind), None);
            let what = "is not the one of stasis, and claimed by no enabled plugin".to_string();
            let place = format!("namespace {}:[{}]", namespace.kind, namespace.ino);
            let pid = first.map_or(0, |process| process.host_pid);
            missing.push(unclaimed(&inventory.tree, pid, place, what, remedy));
        }
        Ok(())
    }

    /// A mapping of a file refers to one of its descriptions, which cannot be left out then.
    fn mapped_but_left_out(&self, context: &Context<'_>, missing: &mut Vec<Unclaimed>) {
        let inventory = context.inventory.borrow();
        for file in &self.objects.files {
            let index = (file.handle as usize).wrapping_sub(1);
            let Some(handle) = inventory.handles.all.get(index) else { continue };
            if matches!(inventory.claims.get(index), Some(Claim::LeftOut { .. })) {
                let (pid, number) = handle.subject();
                let what = format!("{} is mapped, too", String::from_utf8_lossy(&handle.facts.link));
                let remedy = "it cannot be left out".to_owned();
                missing.push(unclaimed(&inventory.tree, pid, format!("descriptor {number}"), what, remedy));
            }
        }
    }

    /// Mappings that plugins take: the process as stasis sees it, plugin and kind, and what the plugin is shown.
    pub fn plugin_mappings(&self) -> impl Iterator<Item = (usize, &str, &str, &VmaInfo)> {
        self.plugin_mappings
            .iter()
            .map(|(process, _, plugin, kind, info)| (*process, plugin.as_str(), kind.as_str(), info))
    }

    /// How many mappings each living process has.
    pub fn mapping_counts(&self) -> impl Iterator<Item = usize> {
        self.memory.iter().map(|memory| memory.vmas.len())
    }

    /// Number of a process' memory map.
    pub fn number(&self, host_pid: i32) -> u32 {
        self.numbers.get(&host_pid).copied().unwrap_or_default()
    }

    /// Number of a process' descriptor table.
    pub fn table_number(&self, host_pid: i32) -> u32 {
        self.number(self.sharing.files.get(&host_pid).copied().unwrap_or(host_pid))
    }

    /// How the tree's user namespace calls a user.
    pub fn uid_inside(&self, uid: u32) -> u32 {
        self.objects.names.uid_inside(uid)
    }

    /// Step 5: registers, signals, and what only injected code can ask.
    pub fn inspect(&mut self, context: &Context<'_>) -> Result<(), DumpError> {
        let inventory = context.inventory.borrow();
        let pids: Vec<i32> = inventory.tree.living().map(|process| process.host_pid).collect();
        self.contexts = super::context::inspect(&mut context.guardian.borrow_mut(), &pids)?;
        Ok(())
    }

    /// Writes header, tasks and memory maps.
    pub fn write(&mut self, context: &Context<'_>) -> Result<(), DumpError> {
        let inventory = context.inventory.borrow();
        let tree = &inventory.tree;
        for (process, vma, plugin, kind, info) in &self.plugin_mappings {
            // Both exist: they were found a moment ago.
            let Some(hook) = context.registry.mapping_kind(plugin, kind) else { continue };
            let host = context.host(plugin);
            let resource = claim::place(info.start, info.end);
            let dumped = context.call(&host, info.pid, "", &resource).dump_mapping(hook, info)?;
            let record = &mut self.memory[*process].vmas[*vma];
            record.plugin = plugin.clone();
            record.plugin_kind = kind.clone();
            record.record = dumped.into();
        }
        context.writer()?.write(&self.header(context, tree)?)?;
        for file in &self.objects.files {
            context.writer()?.write(file)?;
        }
        for (segment, _) in &self.objects.segments {
            context.writer()?.write(segment)?;
        }
        ghosts::write(context, &self.objects.names)?;
        let living: Vec<(&Process, &TaskPaths)> = tree.living().zip(&self.paths).collect();
        let empty = ProcessContext::default();
        let described = parallel::map(&living, |&(process, paths)| {
            let found = self.contexts.get(&process.host_pid).unwrap_or(&empty);
            let number = self.number(process.host_pid);
            let fs = self.sharing.fs.get(&process.host_pid).map_or(0, |&first| self.number(first));
            let ids = task::Ids { memory: number, files: self.table_number(process.host_pid), fs };
            Ok::<_, DumpError>((
                task::describe(process, found, &self.namespaces, paths, ids)?,
                task::memory_map(process, found, number)?,
            ))
        })?;
        for ((record, map), memory) in described.into_iter().zip(&self.memory) {
            context.writer()?.write(&record)?;
            context.writer()?.write(&MemoryMap { vmas: memory.vmas.clone(), ..map })?;
        }
        for zombie in tree.processes.iter().filter(|process| process.zombie) {
            context.writer()?.write(&task::describe_zombie(zombie)?)?;
        }
        Ok(())
    }

    fn header(&self, context: &Context<'_>, tree: &Tree) -> Result<Header, DumpError> {
        let inventory = context.inventory.borrow();
        let objects = inventory.objects.iter().map(|object| (object.plugin.as_str(), object.kind.as_str()));
        let mappings =
            self.plugin_mappings.iter().map(|(_, _, plugin, kind, _)| (plugin.as_str(), kind.as_str()));
        let namespaces = self.namespaces.foreign.iter().filter_map(|namespace| {
            let kind = context.registry.namespace(namespace.kind)?;
            Some((&*kind.plugin, kind.name()))
        });
        let tasks = context.registry.tasks().map(|kind| (&*kind.plugin, kind.name()));
        let lifecycles = context.registry.lifecycles().map(|kind| (&*kind.plugin, kind.name()));
        let used = objects.chain(mappings).chain(namespaces).chain(tasks).chain(lifecycles);
        let vdso = machine::vdso()?;
        let uname = nix::sys::utsname::uname().map_err(|errno| DumpError::Kernel { errno })?;
        let nanoseconds = |clock| {
            clock_gettime(clock).map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
        };
        Ok(Header {
            format: crate::image::FORMAT_VERSION,
            tool_version: env!("CARGO_PKG_VERSION").into(),
            plugins: context.registry.uses(used),
            kernel_release: uname.release().to_string_lossy().into_owned(),
            machine: uname.machine().to_string_lossy().into_owned(),
            xsave_features: machine::xsave_features(),
            root_pid: tree.root().pid,
            shell_job: context.options.shell_job,
            vdso_digest: vdso.digest(),
            vdso: vdso.contents,
            realtime_ns: nanoseconds(ClockId::CLOCK_REALTIME),
            monotonic_ns: nanoseconds(ClockId::CLOCK_MONOTONIC),
            boottime_ns: nanoseconds(ClockId::CLOCK_BOOTTIME),
            page_size: crate::memory::PAGE as u32,
            options: context.registry.options(),
            root_path: String::from_utf8_lossy(&tree.root().proc.link("root")?).into_owned(),
        })
    }

    /// Finds the pages to keep.
    pub fn pages(&self, context: &Context<'_>, may_snapshot: bool) -> Result<Pages, DumpError> {
        let inventory = context.inventory.borrow();
        let memory: Vec<(&Process, u32, &[records::Vma])> = inventory
            .tree
            .living()
            .zip(&self.memory)
            .map(|(process, memory)| (process, self.number(process.host_pid), memory.vmas.as_slice()))
            .collect();
        let outside_only = context.options.outside_only;
        Pages::find(&memory, &self.objects.segments, context.writer()?, outside_only, may_snapshot)
    }
}

fn name_of(path: &[u8]) -> String {
    if path.is_empty() { "anonymous memory".into() } else { String::from_utf8_lossy(path).into_owned() }
}
