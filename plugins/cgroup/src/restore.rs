//! Groups are made before anything else; the root task is put into its own as soon as it exists, so that all that it forks is born there
//! and memory is charged to it; at the end, every thread that belongs elsewhere is moved, and limits are set.

use crate::{
    BLOB, Mode, ROOT,
    dump::inner,
    hierarchy::{Mounted, Mounts, memberships_of},
    properties::{self, When},
    record::stasis::cgroup::v1::{Cgroups, Group, Hierarchy, Member},
    roots::{NewRoots, moved},
};
use stasis_plugin_api::{HookError, Host, Result, TaskInfo, UndoStep, prost::Message};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// Larger blobs are none of ours.
const LARGEST: u64 = 64 << 20;

/// Groups that this restore has made.
static MADE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// The root task is where the root of its namespace is to be, and stays there until it has made that namespace.
static AT_ROOTS: AtomicBool = AtomicBool::new(false);

fn was_made(directory: &Path) -> bool {
    MADE.lock().unwrap_or_else(PoisonError::into_inner).contains(directory)
}

/// What the image says, and where that is here.
struct Plan {
    mode: Mode,
    cgroups: Cgroups,
    /// By the index of a hierarchy; none if nobody of the tree is anywhere but at its root.
    places: Vec<Option<Place>>,
}

/// A hierarchy of the image on this machine.
struct Place {
    controllers: String,
    mounted: Mounted,
    root: String,
    new: Option<String>,
}

impl Place {
    /// The path of a group of the image on this machine.
    fn path(&self, path: &str) -> String {
        moved(path, &self.root, self.new.as_deref())
    }

    fn directory(&self, path: &str) -> PathBuf {
        self.mounted.group(&self.path(path))
    }
}

/// Paths lead nowhere else than down from the root of a hierarchy.
fn check(path: &str) -> Result<()> {
    match path.starts_with('/') && !path.split('/').any(|part| part == ".." || part == ".") {
        true => Ok(()),
        false => Err(HookError::invalid(format!("{path:?} is no path of a cgroup"))),
    }
}

impl Plan {
    /// None if cgroups are not to be touched, or there are none in the image.
    fn load(host: &Host<'_>) -> Result<Option<Self>> {
        let Some(mode) = Mode::of(host)? else { return Ok(None) };
        let mut bytes = Vec::new();
        let read = host.blob_reader(BLOB).take(LARGEST).read_to_end(&mut bytes);
        read.map_err(|error| HookError::failed("reading the blob of cgroups", error))?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let cgroups = Cgroups::decode(bytes.as_slice())
            .map_err(|error| HookError::invalid(format!("the blob of cgroups: {error}")))?;
        let paths = cgroups.groups.iter().map(|group| &group.path);
        let paths = paths.chain(cgroups.sets.iter().flat_map(|set| &set.paths));
        paths.chain(cgroups.hierarchies.iter().map(|one| &one.root)).try_for_each(|path| check(path))?;
        let sizes = cgroups.sets.iter().all(|set| set.paths.len() == cgroups.hierarchies.len());
        let sets = cgroups.members.iter().all(|member| (member.set as usize) < cgroups.sets.len());
        let groups =
            cgroups.groups.iter().all(|group| (group.hierarchy as usize) < cgroups.hierarchies.len());
        if !(sizes && sets && groups) {
            return Err(HookError::invalid("the blob of cgroups names what it does not have"));
        }
        let places = places(host, &cgroups.hierarchies, |index| {
            cgroups.sets.iter().any(|set| set.paths[index] != "/")
        })?;
        Ok(Some(Self { mode, cgroups, places }))
    }

    /// All groups that are here, with their directories; those of the root of a hierarchy are nobody's.
    fn groups(&self) -> impl Iterator<Item = (&Place, &Group, PathBuf)> {
        self.cgroups.groups.iter().filter_map(|group| {
            let place = self.places[group.hierarchy as usize].as_ref()?;
            (place.path(&group.path) != "/").then(|| (place, group, place.directory(&group.path)))
        })
    }

    /// Whether a group gets the properties of the image.
    fn sets(&self, group: &Group, directory: &Path) -> bool {
        match self.mode {
            Mode::None => false,
            // What is above the root has its own properties, and not those of this tree.
            Mode::Props | Mode::Full | Mode::Strict => !group.above || was_made(directory),
            Mode::Soft => was_made(directory),
        }
    }

    /// The directories that a thread belongs into.
    fn homes(&self, member: &Member) -> Vec<(&Place, String)> {
        let paths = &self.cgroups.sets[member.set as usize].paths;
        let places = paths.iter().zip(&self.places);
        places.filter_map(|(path, place)| Some((place.as_ref()?, place.as_ref()?.path(path)))).collect()
    }
}

fn places(
    host: &Host<'_>,
    hierarchies: &[Hierarchy],
    is_needed: impl Fn(usize) -> bool,
) -> Result<Vec<Option<Place>>> {
    let mounts = Mounts::read()?;
    let values = host.option_values(ROOT);
    let new_roots = NewRoots::parse(values.iter().map(String::as_str));
    let place = |(index, hierarchy): (usize, &Hierarchy)| {
        let Hierarchy { controllers, root } = hierarchy;
        match mounts.find(controllers) {
            Some(mounted) => {
                let new = new_roots.of(mounted).map(str::to_owned);
                new.as_deref().map_or(Ok(()), check)?;
                let (controllers, root) = (controllers.clone(), root.clone());
                Ok(Some(Place { controllers, mounted: mounted.clone(), root, new }))
            }
            None if !is_needed(index) => Ok(None),
            None => {
                let what = format!("the cgroup hierarchy {controllers:?} of the image is not mounted here");
                Err(HookError::invalid(what).remedy("mount it, or --manage-cgroups=ignore"))
            }
        }
    };
    hierarchies.iter().enumerate().map(place).collect()
}

/// Before anything is restored: the groups.
pub fn make(host: &Host<'_>) -> Result<()> {
    let Some(plan) = Plan::load(host)? else { return Ok(()) };
    for (place, group, directory) in plan.groups() {
        match (directory.is_dir(), plan.mode) {
            (true, Mode::Strict) if !group.above && !was_made(&directory) => {
                let what = format!("cgroup {} is there already", directory.display());
                return Err(HookError::invalid(what).remedy("remove it, or --manage-cgroups=soft or full"));
            }
            (true, _) => {}
            (false, Mode::None | Mode::Props) => {
                let what = format!("cgroup {} is not there", directory.display());
                return Err(HookError::invalid(what).remedy("make it, or --manage-cgroups=soft or full"));
            }
            (false, _) => make_group(host, place, &directory)?,
        }
        if was_made(&directory) {
            properties::give(&directory, &group.owners)?;
        }
        if plan.sets(group, &directory) {
            properties::write(&directory, &group.properties, When::Empty)?;
        }
    }
    Ok(())
}

/// Makes a group and those above it that are not there. The guardian takes them away again if the restore does not end well.
fn make_group(host: &Host<'_>, place: &Place, directory: &Path) -> Result<()> {
    let failed =
        |error: io::Error| HookError::failed(format!("making cgroup {}", directory.display()), error);
    let mut missing: Vec<&Path> = directory.ancestors().take_while(|path| !path.is_dir()).collect();
    while let Some(path) = missing.pop() {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str()))
        else {
            return Err(HookError::invalid(format!("{} is no cgroup", path.display())));
        };
        let above = File::open(parent).map_err(failed)?;
        host.undo(above.as_fd(), &[UndoStep::RemoveDirectory(name.into())])?;
        match fs::create_dir(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(failed(error)),
        }
        MADE.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned());
        // Version 1: an empty set of processors takes no task.
        if place.mounted.controllers.iter().any(|name| name == "cpuset") {
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let empty = fs::read_to_string(path.join(file)).is_ok_and(|text| text.trim().is_empty());
                if empty {
                    let text = fs::read_to_string(parent.join(file)).map_err(failed)?;
                    fs::write(path.join(file), text.trim()).map_err(failed)?;
                }
            }
        }
    }
    Ok(())
}

/// The root task exists and waits: what it forks will be where it is.
pub fn place_root(host: &Host<'_>) -> Result<()> {
    if AT_ROOTS.load(Ordering::Relaxed) {
        return Ok(());
    }
    let Some(plan) = Plan::load(host)? else { return Ok(()) };
    let Some(task) = host.tasks().into_iter().find(|task| task.host_pid != 0) else { return Ok(()) };
    let member = plan.cgroups.members.iter().find(|member| member.pid == task.pid);
    member.map_or(Ok(()), |member| {
        plan.homes(member).iter().try_for_each(|(place, path)| move_process(place, path, task.host_pid))
    })
}

/// The first task of a cgroup namespace waits: puts it where the root of the namespace is to be.
pub fn place_at_roots(host: &Host<'_>, hierarchies: &[Hierarchy], host_pid: i32) -> Result<()> {
    let Some(plan) = Plan::load(host)? else {
        host.warn("the root of the cgroup namespace will be the cgroup that stasis is in (--manage-cgroups)");
        return Ok(());
    };
    AT_ROOTS.store(true, Ordering::Relaxed);
    for hierarchy in hierarchies {
        check(&hierarchy.root)?;
        let places = plan.places.iter().flatten();
        if let Some(place) = places.clone().find(|place| place.controllers == hierarchy.controllers) {
            move_process(place, &place.path(&hierarchy.root), host_pid)?;
        }
    }
    Ok(())
}

fn move_to(file: &Path, number: i32) -> Result<()> {
    fs::write(file, number.to_string()).map_err(|error| {
        HookError::failed(format!("writing {number} to {}", file.display()), error)
            .remedy("a restore without its cgroups: --manage-cgroups=ignore")
    })
}

fn move_process(place: &Place, path: &str, host_pid: i32) -> Result<()> {
    let now = memberships_of(&PathBuf::from(format!("/proc/{host_pid}")))?;
    // Each move waits for all processors.
    if now.iter().any(|(controllers, now)| *controllers == place.controllers && now == path) {
        return Ok(());
    }
    move_to(&place.mounted.group(path).join("cgroup.procs"), host_pid)
}

/// Everything is in place and nothing runs: who belongs elsewhere is moved, and limits come into force.
pub fn settle(host: &Host<'_>) -> Result<()> {
    let Some(plan) = Plan::load(host)? else { return Ok(()) };
    let mut members: BTreeMap<i32, Vec<&Member>> = BTreeMap::new();
    for member in &plan.cgroups.members {
        members.entry(member.pid).or_default().push(member);
    }
    for task in host.tasks().iter().filter(|task| task.host_pid != 0) {
        settle_task(&plan, task, members.get(&task.pid).map_or(&[][..], Vec::as_slice))?;
    }
    for (_, group, directory) in plan.groups() {
        if !plan.sets(group, &directory) {
            continue;
        }
        for name in properties::write(&directory, &group.properties, When::Populated)? {
            host.warn(&format!("cgroup {} has no {name} here, so it is not set", directory.display()));
        }
    }
    Ok(())
}

fn settle_task(plan: &Plan, task: &TaskInfo, members: &[&Member]) -> Result<()> {
    let directory = PathBuf::from(format!("/proc/{}/task", task.host_pid));
    let failed = |error| HookError::failed(format!("reading {}", directory.display()), error);
    let mut threads: BTreeMap<i32, i32> = BTreeMap::new();
    if members.len() == 1 {
        threads.insert(members[0].tid, task.host_pid);
    } else {
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let status = fs::read_to_string(directory.join(&name).join("status")).map_err(failed)?;
            let number = name.to_str().and_then(|name| name.parse().ok());
            threads.extend(inner(&status).zip(number));
        }
    }
    // The process as a whole first: threads of version 2 stay near it.
    let Some(main) = members.iter().find(|member| member.tid == member.pid).or(members.first()) else {
        return Ok(());
    };
    for (place, path) in plan.homes(main) {
        move_process(place, &path, task.host_pid)?;
    }
    for member in members.iter().filter(|member| member.set != main.set) {
        let Some(&number) = threads.get(&member.tid) else {
            let what = format!("task {} ({}) has no thread {}", task.pid, task.name, member.tid);
            return Err(HookError::invalid(what));
        };
        let now = memberships_of(&directory.join(number.to_string()))?;
        for (place, path) in plan.homes(member) {
            if now.iter().any(|(controllers, now)| *controllers == place.controllers && *now == path) {
                continue;
            }
            let file = if place.mounted.is_unified() { "cgroup.threads" } else { "tasks" };
            move_to(&place.mounted.group(&path).join(file), number)?;
        }
    }
    Ok(())
}
