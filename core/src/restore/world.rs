//! What every restored process knows: image, plans, plugins, page files. Made once in the root task, before it enters
//! any namespace; all others inherit it by copy-on-write.

use super::{
    RestoreOptions,
    descriptor_plan::{DescriptorPlan, FIXED},
    error::{RestoreError, Result},
    ghosts::{self, Ghosts},
    memory::{MemoryPlan, PageFiles, Parent, Records},
    namespaces::{self, Spaces},
    paths::Paths,
    shared::Shared,
    sys,
    tree_plan::{NodeKind, TreePlan, TreeTask},
    vdso::{Vdso, VdsoError},
};
use crate::{
    image::{
        BlobStore, Image,
        records::{MappedFile, MemoryMap, PageMap, SharedSegment, Task},
    },
    plugins::{HookWatch, Registry},
};
use stasis_plugin_api::Holder;
use std::{
    cell::{OnceCell, RefCell},
    collections::BTreeMap,
    fs::File,
    os::fd::AsRawFd,
    sync::atomic::{AtomicI32, Ordering},
};

/// Image and plans, the same in the command and in the root task: both compute them from the image alone.
pub struct Plans {
    /// The image.
    pub image: &'static Image,
    /// The plugins it needs.
    pub registry: Registry,
    /// Who forks whom.
    pub tree: TreePlan,
    /// Who creates what.
    pub descriptors: DescriptorPlan,
    /// Tasks and numbers that refer to each handle.
    pub holders: BTreeMap<u32, Vec<Holder>>,
    /// Keys that the user named with `--external`.
    pub external: Vec<String>,
    /// Numbers of the descriptors that he gave with `--inherit-fd`, by key.
    pub inherited: BTreeMap<String, i32>,
    /// Whether files must have the mode, size and build id that they had.
    pub file_check: bool,
    /// Options that were given in case a plugin knows them, and none does.
    pub ignored_options: Vec<String>,
}

impl Plans {
    /// Reads the image, loads the plugins and plans.
    pub fn new(options: &RestoreOptions) -> Result<Self> {
        // Kept for the life of the process: the tasks never leave it in the usual way.
        let image: &'static Image = Box::leak(Box::new(Image::open(&options.images_dir)?));
        let mut registry = Registry::load_needed(&options.plugins, &image.header)?;
        let ignored_options = registry.set_options(&options.plugin_options)?;
        registry.adopt_options(&image.header);
        let tasks: Vec<TreeTask> = image
            .tasks
            .iter()
            .map(|t| TreeTask { pid: t.pid, ppid: t.ppid, pgid: t.pgid, sid: t.sid, zombie: t.zombie })
            .collect();
        let tree = TreePlan::new(&tasks, &DescriptorPlan::stand_ins(image))?;
        let after = |plugin: &str, kind: &str| {
            let kind = registry.descriptor_kind(plugin, kind);
            kind.map(|kind| kind.declaration.after.iter().map(ToString::to_string).collect())
                .unwrap_or_default()
        };
        let inherited: BTreeMap<String, i32> =
            options.inherit_fds.iter().map(|given| (given.key.clone(), given.fd)).collect();
        let own = inherited.len() as i32;
        let descriptors = DescriptorPlan::new(image, &tree, &after, own, descriptor_limit())?;
        let mut holders: BTreeMap<u32, Vec<Holder>> = BTreeMap::new();
        for task in image.tasks.iter().filter(|task| !task.zombie) {
            for descriptor in image.tables.get(&task.files).map_or(&[][..], |table| &table.descriptors) {
                let (fd, cloexec) = (descriptor.number as i32, descriptor.cloexec);
                holders.entry(descriptor.handle).or_default().push(Holder { pid: task.pid, fd, cloexec });
            }
        }
        let external = options.external.clone();
        let file_check = !options.no_file_check;
        Ok(Self {
            image,
            registry,
            tree,
            descriptors,
            holders,
            external,
            inherited,
            file_check,
            ignored_options,
        })
    }

    /// The task of a node, if it is one that runs on.
    pub fn task(&self, node: usize) -> Option<&'static Task> {
        match self.tree.nodes.get(node)?.kind {
            NodeKind::Task(at) => self.image.tasks.get(at),
            _ => None,
        }
    }
}

/// The number of descriptors that this process may have.
fn descriptor_limit() -> i32 {
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
    limit.map_or(1024, |(_, hard)| i32::try_from(hard).unwrap_or(i32::MAX))
}

/// Name of a task, for messages.
pub fn task_name(task: &Task) -> String {
    let name = task.threads.first().map_or(&[][..], |thread| &thread.name);
    String::from_utf8_lossy(name).trim_end_matches('\0').to_owned()
}

/// All of it.
pub struct World {
    /// Image, plugins, plans.
    pub plans: Plans,
    /// Memory.
    pub memory: MemoryPlan,
    /// Page files, open and mapped.
    pub pages: PageFiles,
    /// Files without their names; empty until the root task has made them.
    pub ghosts: OnceCell<Ghosts>,
    /// Namespaces of tasks below the root; empty until the root task has made them.
    pub spaces: OnceCell<Spaces>,
    /// Blobs of plugins.
    pub blobs: RefCell<BlobStore<'static>>,
    /// Stage, failure, slots.
    pub shared: Shared,
    /// Which hook runs.
    pub watch: &'static HookWatch,
    /// Where each handle is in the table of its creator.
    pub locations: Locations,
    /// Our own descriptors: the restorer closes them.
    pub own: Vec<i32>,
    /// First number for parked handles.
    pub parking: i32,
    /// What all processes have from the first one.
    pub inherited: Inherited,
}

/// Settings that a fork inherits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Inherited {
    /// proc_pid_oom_score_adj(5).
    pub oom_score_adj: i32,
    /// proc_pid_coredump_filter(5).
    pub coredump_filter: u32,
    /// proc_pid_loginuid(5), where the kernel has it.
    pub login_uid: Option<u32>,
}

impl Inherited {
    fn read() -> Result<Self> {
        let read = |name: &str| {
            let path = format!("/proc/self/{name}");
            std::fs::read_to_string(&path).map_err(RestoreError::system(format!("read {path}")))
        };
        // The kernel writes numbers; what is none differs from any setting, and so is set.
        let oom_score_adj = read("oom_score_adj")?.trim().parse().unwrap_or(i32::MIN);
        let coredump_filter = u32::from_str_radix(read("coredump_filter")?.trim(), 16).unwrap_or(u32::MAX);
        let login_uid = read("loginuid").ok().and_then(|text| text.trim().parse().ok());
        Ok(Self { oom_score_adj, coredump_filter, login_uid })
    }
}

impl World {
    /// How paths of the image are opened by the process of a node.
    pub fn paths(&self, node: usize) -> Paths<'_> {
        let spaces = self.spaces.get();
        let here = spaces.map_or(0, |spaces| spaces.mounts_of(&self.plans, node));
        Paths { ghosts: self.ghosts.get(), spaces, here }
    }

    /// Descriptors of our own, which every process has and the restorer closes.
    pub fn kept(&self) -> impl Iterator<Item = i32> {
        let ghosts = self.ghosts.get().into_iter().flat_map(Ghosts::descriptors);
        let spaces = self.spaces.get().into_iter().flat_map(Spaces::descriptors);
        self.own.iter().copied().chain(ghosts).chain(spaces)
    }

    /// In the root task: opens what is needed, at numbers that no table of the image uses.
    pub fn new(plans: Plans, shared: Shared, watch: &'static HookWatch) -> Result<Self> {
        let image = plans.image;
        let first = plans.descriptors.service.first;
        let mut own: Vec<i32> = plans.inherited.values().copied().collect();
        let mut move_up = |file: File| -> Result<File> {
            let moved = sys::duplicate_above(file.as_raw_fd(), first);
            let moved = moved.map_err(RestoreError::system("move a descriptor out of the way"))?;
            own.push(moved.as_raw_fd());
            Ok(moved.into())
        };
        let last = image.shards.keys().next_back().map_or(0, |last| last + 1);
        let files = (0..last).map(|index| match image.shards.get(&index) {
            Some(_) => move_up(image.shard_file(index)?),
            None => move_up(File::open("/dev/null").map_err(RestoreError::system("open /dev/null"))?),
        });
        let pages = PageFiles::new(files.collect::<Result<_>>()?)?;
        let mut blobs = image.blobs()?;
        if let Some(file) = blobs.file_mut() {
            let old = file.try_clone().map_err(RestoreError::system("duplicate a descriptor"))?;
            *file = move_up(old)?;
        }
        let parking = first
            + FIXED
            + last as i32
            + plans.inherited.len() as i32
            + ghosts::count(image)
            + namespaces::count(image);
        let memory = memory_plan(&plans)?;
        let locations = Locations::new(image)?;
        let blobs = RefCell::new(blobs);
        let inherited = Inherited::read()?;
        let (ghosts, spaces) = (OnceCell::new(), OnceCell::new());
        Ok(Self {
            plans,
            memory,
            pages,
            ghosts,
            spaces,
            blobs,
            shared,
            watch,
            locations,
            own,
            parking,
            inherited,
        })
    }
}

/// The pid by which the memory plan knows a node: its own, or one that no process can have.
pub fn memory_pid(tree: &TreePlan, node: usize) -> i32 {
    match tree.nodes.get(node).map_or(0, |node| node.pid) {
        0 => -1 - node as i32,
        pid => pid,
    }
}

fn memory_plan(plans: &Plans) -> Result<MemoryPlan> {
    let image = plans.image;
    let tree: Vec<Parent> = plans
        .tree
        .nodes
        .iter()
        .enumerate()
        .map(|(number, node)| Parent {
            pid: memory_pid(&plans.tree, number),
            parent: node.creator.map(|by| memory_pid(&plans.tree, by)),
            map: plans.task(number).map(|task| task.mm),
        })
        .collect();
    let maps: Vec<MemoryMap> = image.memory_maps.values().cloned().collect();
    let files: Vec<MappedFile> = image.mapped_files.values().cloned().collect();
    let segments: Vec<SharedSegment> = image.segments.values().cloned().collect();
    let pages: Vec<PageMap> = image.page_maps.values().chain(image.segment_pages.values()).cloned().collect();
    let records = Records { maps: &maps, files: &files, segments: &segments, pages: &pages, tree: &tree };
    let mut plan = MemoryPlan::new(records, &occupied()?)?;
    let header = &image.header;
    let wrong = |what: String| RestoreError::Machine { what };
    let own = crate::machine::vdso().map_err(|error| wrong(error.to_string()))?;
    if header.vdso_digest != own.digest() {
        let leading = |text: u64| {
            let (old, new) = (Vdso::parse(&header.vdso)?, Vdso::parse(&own.contents)?);
            old.leading_to(&new, text)
        };
        let leading = |text| leading(text).map_err(|error: VdsoError| wrong(error.to_string()));
        plan.change_vdso(own.data, leading)?;
    }
    Ok(plan)
}

/// The mappings of this process.
fn occupied() -> Result<Vec<std::ops::Range<u64>>> {
    let path = "/proc/self/maps";
    let text = std::fs::read_to_string(path).map_err(RestoreError::system(format!("read {path}")))?;
    let range = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
    };
    Ok(text.lines().filter_map(range).collect())
}

/// A table in memory shared by all tasks: descriptor number of each handle in its creator, plus one; 0 as long as it is
/// not created. Auxiliary descriptors of an object follow its first handle.
pub struct Locations {
    index: BTreeMap<u32, usize>,
    /// Place of an object's first auxiliary, and how many there are, by each of its handles.
    auxiliaries: BTreeMap<u32, (usize, u32)>,
    table: &'static [AtomicI32],
}

impl Locations {
    fn new(image: &Image) -> Result<Self> {
        let index: BTreeMap<u32, usize> =
            image.handles.keys().enumerate().map(|(at, &id)| (id, at)).collect();
        let mut places = index.len();
        let mut auxiliaries = BTreeMap::new();
        for object in image.objects.values().filter(|object| object.auxiliaries > 0) {
            auxiliaries.extend(object.handles.iter().map(|&handle| (handle, (places, object.auxiliaries))));
            places += object.auxiliaries as usize;
        }
        let size = (places * size_of::<AtomicI32>()).max(1);
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if address == libc::MAP_FAILED {
            return Err(RestoreError::system("map shared memory")(std::io::Error::last_os_error()));
        }
        // SAFETY: zeroed memory of that size, which is never unmapped by this program.
        let table = unsafe { std::slice::from_raw_parts(address.cast::<AtomicI32>(), places) };
        Ok(Self { index, auxiliaries, table })
    }

    /// Where a handle is.
    pub fn get(&self, handle: u32) -> Option<i32> {
        self.read(*self.index.get(&handle)?)
    }

    /// Where an auxiliary descriptor of a handle's object is.
    pub fn auxiliary(&self, handle: u32, index: u32) -> Option<i32> {
        self.read(self.auxiliary_place(handle, index)?)
    }

    fn auxiliary_place(&self, handle: u32, index: u32) -> Option<usize> {
        let &(first, count) = self.auxiliaries.get(&handle)?;
        (index < count).then_some(first + index as usize)
    }

    fn read(&self, place: usize) -> Option<i32> {
        let number = self.table.get(place)?.load(Ordering::Acquire);
        (number > 0).then_some(number - 1)
    }

    /// Says where an auxiliary descriptor is.
    pub fn set_auxiliary(&self, handle: u32, index: u32, number: i32) {
        if let Some(slot) = self.auxiliary_place(handle, index).and_then(|place| self.table.get(place)) {
            slot.store(number + 1, Ordering::Release);
        }
    }

    /// Says where a handle is.
    pub fn set(&self, handle: u32, number: i32) {
        if let Some(slot) = self.index.get(&handle).and_then(|&at| self.table.get(at)) {
            slot.store(number + 1, Ordering::Release);
        }
    }
}
