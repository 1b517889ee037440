//! Whether the records of an image fit together: every number names something, every range is where it may be.

use super::{Image, RecordKind, records::*};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// First address that user space cannot have, with four page-table levels (arch/x86/include/asm/page_64_types.h).
pub const TASK_SIZE: u64 = (1 << 47) - PAGE;
/// Where the kernel shows its vsyscall page (arch/x86/include/uapi/asm/vsyscall.h).
const VSYSCALL: std::ops::Range<u64> = 0xffff_ffff_ff60_0000..0xffff_ffff_ff60_1000;
const PAGE: u64 = 4096;
/// The kernel's own limit of fs.nr_open (fs/file.c, sysctl_nr_open_max).
const MAX_DESCRIPTOR: u32 = 1 << 30;
/// Highest pid that the kernel gives (include/linux/threads.h, PID_MAX_LIMIT).
const MAX_PID: i32 = 1 << 22;
/// More than any object has use for; each takes a descriptor number while a tree is restored.
const MAX_AUXILIARIES: u32 = 16;
/// Largest extended state accepted; AMX needs 11 KiB.
const MAX_XSTATE: usize = 64 << 10;
/// `struct user_regs_struct`.
const REGISTERS: usize = std::mem::size_of::<libc::user_regs_struct>();
/// `siginfo_t`.
const SIGINFO: usize = std::mem::size_of::<libc::siginfo_t>();
/// `TASK_COMM_LEN` less the zero.
const MAX_COMM: usize = 15;

/// A record, for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its kind.
    pub kind: RecordKind,
    /// Its id, or the pid of a task.
    pub id: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            RecordKind::Header => f.write_str(self.kind.name()),
            kind => write!(f, "{} {}", kind.name(), self.id),
        }
    }
}

/// How records contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A number is used twice.
    #[error("there are two {} records numbered {id}", kind.name())]
    Duplicate {
        /// Kind of record.
        kind: RecordKind,
        /// The number.
        id: u64,
    },
    /// A number names nothing.
    #[error("{place} refers to {missing}, which does not exist")]
    Missing {
        /// Who refers.
        place: Place,
        /// To what.
        missing: Place,
    },
    /// A field has a value that it cannot have.
    #[error("{place}: {field} cannot be {value:#x}")]
    Field {
        /// Which record.
        place: Place,
        /// Which field.
        field: &'static str,
        /// Its value, or length.
        value: u64,
    },
    /// A range is empty, out of place or out of order.
    #[error("{place}: {what} {start:#x}-{end:#x} is empty, out of order or out of bounds")]
    Range {
        /// Which record.
        place: Place,
        /// What kind of range.
        what: &'static str,
        /// First address or offset.
        start: u64,
        /// End.
        end: u64,
    },
    /// A plugin is used that the header does not list.
    #[error("{place} needs plugin {plugin:?}, which the header does not list")]
    Plugin {
        /// Which record.
        place: Place,
        /// The plugin.
        plugin: String,
    },
    /// Not one root task, the one that the header names.
    #[error("the tree has {roots} root tasks, and the header names {named}")]
    Roots {
        /// How many tasks have no parent.
        roots: usize,
        /// Pid in the header.
        named: i32,
    },
    /// A task that is its own ancestor.
    #[error("task {0} descends from itself")]
    Orbit(i32),
    /// Objects that must each be created before the other.
    #[error("objects {0:?} must each be created before the others")]
    Cycle(Vec<u32>),
}

type Check = Result<(), Fault>;

impl Place {
    fn new(kind: RecordKind, id: impl Into<u64>) -> Self {
        Self { kind, id: id.into() }
    }

    fn task(pid: i32) -> Self {
        Self { kind: RecordKind::Task, id: u64::from(pid.unsigned_abs()) }
    }

    /// `value` stands in `field` and `good` says whether it may.
    fn field(self, field: &'static str, value: impl TryInto<u64>, good: bool) -> Check {
        if good {
            return Ok(());
        }
        Err(Fault::Field { place: self, field, value: value.try_into().unwrap_or(u64::MAX) })
    }

    fn exists<T>(self, kind: RecordKind, map: &BTreeMap<u32, T>, id: u32) -> Check {
        if map.contains_key(&id) {
            return Ok(());
        }
        Err(Fault::Missing { place: self, missing: Self::new(kind, id) })
    }

    fn range(self, what: &'static str, start: u64, end: u64, good: bool) -> Check {
        if good { Ok(()) } else { Err(Fault::Range { place: self, what, start, end }) }
    }

    fn path(self, image: &Image, path: Option<&PathRef>) -> Check {
        let Some(path) = path else { return Ok(()) };
        self.field("a path", path.path.len(), is_path(&path.path))?;
        self.field("process of a path", path.process, (0..=MAX_PID).contains(&path.process))?;
        if path.space != 0 {
            self.exists(RecordKind::Namespace, &image.namespaces, path.space)?;
        }
        if path.ghost == 0 {
            return Ok(());
        }
        self.exists(RecordKind::GhostFile, &image.ghosts, path.ghost)?;
        let ghost = &image.ghosts[&path.ghost];
        let known = !ghost.nameless.is_empty() || ghost.paths.contains(&path.path);
        self.field("name of a ghost file", path.path.len(), known)
    }
}

/// What several checks look up.
struct Known<'a> {
    image: &'a Image,
    pids: BTreeSet<i32>,
    plugins: BTreeSet<&'a str>,
}

impl Known<'_> {
    fn plugin(&self, place: Place, plugin: &str) -> Check {
        if self.plugins.contains(plugin) {
            return Ok(());
        }
        Err(Fault::Plugin { place, plugin: plugin.into() })
    }
}

/// Checks everything but page contents.
pub(super) fn check(image: &Image) -> Check {
    let header = Place::new(RecordKind::Header, 0u32);
    header.field("format", image.header.format, image.header.format == super::FORMAT_VERSION)?;
    header.field("page_size", image.header.page_size, u64::from(image.header.page_size) == PAGE)?;
    let known = Known {
        image,
        pids: image.tasks.iter().map(|task| task.pid).collect(),
        plugins: image.header.plugins.iter().map(|plugin| plugin.name.as_str()).collect(),
    };
    header.field(
        "number of plugins",
        image.header.plugins.len(),
        known.plugins.len() == image.header.plugins.len(),
    )?;
    check_tree(image)?;
    image.tasks.iter().try_for_each(|task| check_task(&known, task))?;
    for (id, map) in &image.memory_maps {
        let place = Place::new(RecordKind::MemoryMap, *id);
        place.field("id", *id, *id != 0)?;
        check_vmas(&known, place, map)?;
    }
    for (id, file) in &image.mapped_files {
        let place = Place::new(RecordKind::MappedFile, *id);
        place.path(image, file.path.as_ref())?;
        if file.handle != 0 {
            place.exists(RecordKind::Handle, &image.handles, file.handle)?;
        }
    }
    image.ghosts.iter().try_for_each(|(id, ghost)| check_ghost(*id, ghost))?;
    for (id, segment) in &image.segments {
        let place = Place::new(RecordKind::SharedSegment, *id);
        place.field("id", *id, *id != 0)?;
        place.field("size", segment.size, segment.size.is_multiple_of(PAGE) && segment.size <= TASK_SIZE)?;
        check_huge(place, segment.huge_shift, 0, segment.size)?;
    }
    check_pages(image)?;
    check_tables(image)?;
    check_handles(image)?;
    check_objects(&known)?;
    check_namespaces(&known)?;
    for record in &image.task_records {
        let place = Place::new(RecordKind::TaskRecord, record.pid.unsigned_abs());
        known.plugin(place, &record.plugin)?;
        if !known.pids.contains(&record.pid) {
            return Err(Fault::Missing { place, missing: Place::task(record.pid) });
        }
    }
    Ok(())
}

/// One root, every other task below it.
fn check_tree(image: &Image) -> Check {
    let mut seen = BTreeSet::new();
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for task in &image.tasks {
        children.entry(task.ppid).or_default().push(task.pid);
        let threads = task.threads.iter().map(|thread| thread.tid).filter(|tid| *tid != task.pid);
        for id in std::iter::once(task.pid).chain(threads) {
            Place::task(task.pid).field("pid or tid", id, id > 0 && id <= MAX_PID)?;
            if !seen.insert(id) {
                return Err(Fault::Duplicate { kind: RecordKind::Task, id: u64::from(id.unsigned_abs()) });
            }
        }
    }
    let named = image.header.root_pid;
    let roots = children.get(&0).map_or(0, Vec::len);
    if children.get(&0).is_none_or(|roots| roots[..] != [named]) {
        return Err(Fault::Roots { roots, named });
    }
    let pids: BTreeSet<i32> = image.tasks.iter().map(|task| task.pid).collect();
    if let Some(task) = image.tasks.iter().find(|task| task.ppid != 0 && !pids.contains(&task.ppid)) {
        return Err(Fault::Missing { place: Place::task(task.pid), missing: Place::task(task.ppid) });
    }
    let mut reached = BTreeSet::from([named]);
    let mut next = vec![named];
    while let Some(pid) = next.pop() {
        for child in children.get(&pid).into_iter().flatten() {
            if reached.insert(*child) {
                next.push(*child);
            }
        }
    }
    pids.difference(&reached).next().map_or(Ok(()), |pid| Err(Fault::Orbit(*pid)))
}

fn check_task(known: &Known<'_>, task: &Task) -> Check {
    let place = Place::task(task.pid);
    place.field("pgid", task.pgid, task.pgid >= 0)?;
    place.field("sid", task.sid, task.sid >= 0)?;
    for namespace in task.namespaces.iter().filter(|namespace| namespace.id != 0) {
        place.exists(RecordKind::Namespace, &known.image.namespaces, namespace.id)?;
        let object = &known.image.namespaces[&namespace.id];
        place.field("namespace type", namespace.id, object.kind == namespace.kind)?;
    }
    if task.zombie {
        return place.field("threads of a zombie", task.threads.len(), task.threads.len() <= 1);
    }
    place.exists(RecordKind::MemoryMap, &known.image.memory_maps, task.mm)?;
    place.exists(RecordKind::DescriptorTable, &known.image.tables, task.files)?;
    place.field("umask", task.umask, task.umask <= 0o777)?;
    place.field("signal actions", task.actions.len(), task.actions.len() <= 64)?;
    place.field("interval timers", task.itimers.len(), task.itimers.len() <= 3)?;
    place.field("limits", task.limits.len(), task.limits.len() <= 16)?;
    for path in [&task.exe, &task.cwd, &task.root] {
        place.path(known.image, path.as_ref())?;
    }
    check_credentials(place, task.credentials.as_ref())?;
    check_siginfos(place, &task.pending)?;
    let first = task.threads.first().map_or(0, |thread| thread.tid);
    place.field("first thread", first, first == task.pid)?;
    let dead = usize::from(task.dead_leader);
    place.field("live threads", task.threads.len().saturating_sub(dead), task.threads.len() > dead)?;
    check_timers(place, task)?;
    for (index, thread) in task.threads.iter().enumerate() {
        let length = thread.registers.len();
        let expected = if index < dead { 0 } else { REGISTERS };
        place.field("length of registers", length, length == expected)?;
        // MAX_NUMNODES is at most 1024 (arch/x86/Kconfig).
        let nodes = thread.memory_nodes.len();
        place.field("length of a set of nodes", nodes, nodes % 8 == 0 && nodes <= 128)?;
        place.field("length of xstate", thread.xstate.len(), thread.xstate.len() <= MAX_XSTATE)?;
        let name = &thread.name;
        place.field("length of a thread's name", name.len(), name.len() <= MAX_COMM && !name.contains(&0))?;
        check_credentials(place, thread.credentials.as_ref())?;
        check_siginfos(place, &thread.pending)?;
    }
    Ok(())
}

fn check_timers(place: Place, task: &Task) -> Check {
    let mut seen = BTreeSet::new();
    task.posix_timers.iter().try_for_each(|timer| {
        place.field("number of a timer", timer.id, timer.id >= 0 && seen.insert(timer.id))?;
        // SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID.
        place.field("notification of a timer", timer.notify, [0, 1, 2, 4].contains(&timer.notify))?;
        let mine = timer.tid == 0 || task.threads.iter().any(|thread| thread.tid == timer.tid);
        place.field("thread of a timer", timer.tid, mine)
    })
}

fn check_credentials(place: Place, credentials: Option<&Credentials>) -> Check {
    let Some(credentials) = credentials else { return Ok(()) };
    place.field("number of uids", credentials.uid.len(), credentials.uid.len() == 4)?;
    place.field("number of gids", credentials.gid.len(), credentials.gid.len() == 4)?;
    // NGROUPS_MAX (include/uapi/linux/limits.h).
    place.field("number of groups", credentials.groups.len(), credentials.groups.len() <= 65_536)?;
    credentials.seccomp_filters.iter().try_for_each(|filter| {
        let length = filter.program.len();
        // BPF_MAXINSNS instructions of eight bytes (include/uapi/linux/bpf_common.h).
        place.field("length of a seccomp filter", length, length % 8 == 0 && length <= 4096 * 8)
    })
}

fn check_siginfos(place: Place, pending: &[Vec<u8>]) -> Check {
    pending.iter().try_for_each(|info| place.field("length of a siginfo", info.len(), info.len() == SIGINFO))
}

fn check_vmas(known: &Known<'_>, place: Place, map: &MemoryMap) -> Check {
    // Nothing, MCL_FUTURE, or that with MCL_ONFAULT.
    place.field("locking of memory", map.lock_future, [0, 2, 6].contains(&map.lock_future))?;
    let mut last = 0;
    for vma in &map.vmas {
        let Vma { start, end, .. } = *vma;
        let kind = VmaKind::try_from(vma.kind).map_err(|_| Fault::Field {
            place,
            field: "mapping kind",
            value: u64::from(vma.kind.unsigned_abs()),
        })?;
        let aligned = start % PAGE == 0 && end % PAGE == 0 && vma.offset % PAGE == 0;
        let home = match kind {
            VmaKind::Vsyscall => (start..end) == VSYSCALL,
            _ => end <= TASK_SIZE,
        };
        place.range("mapping", start, end, aligned && home && start < end && start >= last)?;
        last = end;
        // PROT_READ, PROT_WRITE, PROT_EXEC.
        place.field("mapping protection", vma.prot, vma.prot <= 7)?;
        check_huge(place, vma.huge_shift, start, end)?;
        place.field(
            "length of a mapping's name",
            vma.name.len(),
            vma.name.len() < 80 && !vma.name.contains(&0),
        )?;
        match kind {
            VmaKind::PrivateFile | VmaKind::SharedFile => {
                place.exists(RecordKind::MappedFile, &known.image.mapped_files, vma.file)?;
            }
            VmaKind::SharedAnonymous => {
                place.exists(RecordKind::SharedSegment, &known.image.segments, vma.file)?;
                let size = known.image.segments[&vma.file].size;
                let same = known.image.segments[&vma.file].huge_shift == vma.huge_shift;
                place.field("size of hugetlb pages", vma.huge_shift, same)?;
                let inside = vma.offset.checked_add(end - start).is_some_and(|last| last <= size);
                place.range(
                    "part of a segment",
                    vma.offset,
                    vma.offset.saturating_add(end - start),
                    inside,
                )?;
            }
            VmaKind::Plugin => known.plugin(place, &vma.plugin)?,
            VmaKind::PrivateAnonymous | VmaKind::Vdso | VmaKind::Vvar | VmaKind::Vsyscall => {}
        }
    }
    Ok(())
}

/// Sizes of hugetlb pages: 2 MiB and 1 GiB (arch/x86/mm/hugetlbpage.c).
fn check_huge(place: Place, shift: u32, start: u64, end: u64) -> Check {
    place.field("size of hugetlb pages", shift, [0, 21, 30].contains(&shift))?;
    place.range(
        "mapping of hugetlb pages",
        start,
        end,
        shift == 0 || (start | end).is_multiple_of(1 << shift),
    )
}

/// Extents lie in the mappings (or in the segment) and in the page files, in ascending order.
fn check_pages(image: &Image) -> Check {
    for (id, pages) in &image.page_maps {
        let place = Place { kind: RecordKind::PageMap, id: u64::from(*id) };
        place.exists(RecordKind::MemoryMap, &image.memory_maps, *id)?;
        let private =
            |vma: &&Vma| [VmaKind::PrivateAnonymous as i32, VmaKind::PrivateFile as i32].contains(&vma.kind);
        // Neighbours joined, since an extent may span them.
        let mut homes: Vec<(u64, u64)> = Vec::new();
        for vma in image.memory_maps[id].vmas.iter().filter(private) {
            match homes.last_mut() {
                Some(last) if last.1 == vma.start => last.1 = vma.end,
                _ => homes.push((vma.start, vma.end)),
            }
        }
        check_extents(image, place, pages, &homes)?;
        check_guards(place, pages, &image.memory_maps[id])?;
    }
    for (id, pages) in &image.segment_pages {
        let place = Place { kind: RecordKind::PageMap, id: u64::from(*id) };
        place.exists(RecordKind::SharedSegment, &image.segments, *id)?;
        place.field("mm", pages.mm, pages.mm == 0)?;
        place.field("guard regions of a segment", pages.guards.len(), pages.guards.is_empty())?;
        check_extents(image, place, pages, &[(0, image.segments[id].size)])?;
    }
    Ok(())
}

/// Guard regions lie in mappings, in ascending order.
fn check_guards(place: Place, pages: &PageMap, map: &MemoryMap) -> Check {
    let mut last = 0;
    let mut vmas = map.vmas.iter().peekable();
    for guard in &pages.guards {
        while vmas.next_if(|vma| vma.end <= guard.start).is_some() {}
        let inside = vmas.peek().is_some_and(|vma| vma.start <= guard.start && guard.end <= vma.end);
        let aligned = guard.start % PAGE == 0 && guard.end % PAGE == 0 && guard.start < guard.end;
        place.range("guard region", guard.start, guard.end, inside && aligned && guard.start >= last)?;
        last = guard.end;
    }
    Ok(())
}

fn check_extents(image: &Image, place: Place, pages: &PageMap, homes: &[(u64, u64)]) -> Check {
    let mut last = 0;
    let mut homes = homes.iter().peekable();
    for extent in &pages.extents {
        let length = u64::from(extent.pages) * PAGE;
        let (start, end) = (extent.address, extent.address.saturating_add(length));
        while homes.next_if(|home| home.1 <= start).is_some() {}
        let inside = homes.peek().is_some_and(|home| home.0 <= start && end <= home.1);
        place.range("pages", start, end, inside && start < end && start % PAGE == 0 && start >= last)?;
        last = end;
        place.exists(RecordKind::Shard, &image.shards, extent.shard)?;
        let (from, to) = (extent.offset, extent.offset.saturating_add(length));
        let stored = from % PAGE == 0 && to <= image.shards[&extent.shard].length;
        place.range("part of a page file", from, to, stored)?;
    }
    Ok(())
}

fn check_tables(image: &Image) -> Check {
    for (id, table) in &image.tables {
        let place = Place::new(RecordKind::DescriptorTable, *id);
        place.field("id", *id, *id != 0)?;
        let mut next = 0;
        for descriptor in &table.descriptors {
            let number = descriptor.number;
            place.field("descriptor number", number, number >= next && number < MAX_DESCRIPTOR)?;
            next = number + 1;
            place.exists(RecordKind::Handle, &image.handles, descriptor.handle)?;
        }
    }
    Ok(())
}

fn check_handles(image: &Image) -> Check {
    for (id, handle) in &image.handles {
        let place = Place::new(RecordKind::Handle, *id);
        if handle.object != 0 {
            place.exists(RecordKind::Object, &image.objects, handle.object)?;
        } else {
            place.field("path", 0u32, handle.path.is_some() == handle.external.is_empty())?;
            if handle.external.is_empty() {
                place.path(image, handle.path.as_ref())?;
            }
        }
        let kind = handle.owner.as_ref().map_or(0, |owner| owner.kind);
        // F_OWNER_TID, F_OWNER_PID, F_OWNER_PGRP.
        place.field("owner kind", kind, (0..=2).contains(&kind))?;
        // SIGRTMAX.
        place.field("signal", handle.signal, (0..=64).contains(&handle.signal))?;
    }
    Ok(())
}

fn is_path(path: &[u8]) -> bool {
    !path.contains(&0) && !path.is_empty()
}

fn check_ghost(id: u32, ghost: &GhostFile) -> Check {
    let place = Place::new(RecordKind::GhostFile, id);
    place.field("id", id, id != 0)?;
    let absolute = |path: &Vec<u8>| is_path(path) && path.first() == Some(&b'/');
    let named = ghost.paths.iter().all(absolute) && (ghost.nameless.is_empty() || absolute(&ghost.nameless));
    place.field("paths", ghost.paths.len(), named && ghost.paths.is_empty() != ghost.nameless.is_empty())?;
    place.field("link", ghost.link.len(), ghost.link.is_empty() || absolute(&ghost.link))?;
    place.field("size", ghost.size, i64::try_from(ghost.size).is_ok())?;
    let mut last = 0;
    for extent in &ghost.extents {
        let end = extent.offset.saturating_add(extent.length);
        let good = extent.offset >= last && extent.length != 0 && end <= ghost.size;
        place.range("contents", extent.offset, end, good)?;
        last = end;
    }
    let attributes = ghost.attributes.iter().all(|attribute| is_path(&attribute.name));
    place.field("attributes", ghost.attributes.len(), attributes)
}

fn check_objects(known: &Known<'_>) -> Check {
    let image = known.image;
    let mut owned = 0;
    for (id, object) in &image.objects {
        let place = Place::new(RecordKind::Object, *id);
        place.field("id", *id, *id != 0)?;
        known.plugin(place, &object.plugin)?;
        let mut own = BTreeSet::new();
        for handle in &object.handles {
            place.exists(RecordKind::Handle, &image.handles, *handle)?;
            let mine = image.handles[handle].object == *id && own.insert(*handle);
            place.field("handle", *handle, mine)?;
        }
        owned += own.len();
        let few = object.auxiliaries <= if own.is_empty() { 0 } else { MAX_AUXILIARIES };
        place.field("number of auxiliaries", object.auxiliaries, few)?;
        object.after.iter().try_for_each(|other| place.exists(RecordKind::Object, &image.objects, *other))?;
        object
            .uses
            .iter()
            .try_for_each(|handle| place.exists(RecordKind::Handle, &image.handles, *handle))?;
        for actor in [&object.create_as, &object.link_as, &object.settle_as].into_iter().flatten() {
            check_actor(known, place, actor)?;
        }
    }
    // Every object owns only its own handles, so equal numbers mean that every handle is in its object's list.
    let refer = image.handles.values().filter(|handle| handle.object != 0).count();
    Place::new(RecordKind::Header, 0u32).field(
        "handles that no object lists",
        refer - owned.min(refer),
        refer == owned,
    )?;
    check_order(image)
}

fn check_actor(known: &Known<'_>, place: Place, actor: &Actor) -> Check {
    let is_task = known.pids.contains(&actor.pid);
    let good = match ActorKind::try_from(actor.kind) {
        Ok(ActorKind::Any) => true,
        Ok(ActorKind::Task | ActorKind::SessionLeader) => is_task,
        Ok(ActorKind::StandIn) => !is_task && actor.pid > 0 && actor.pid <= MAX_PID,
        Err(_) => false,
    };
    place.field("pid of the actor", actor.pid, good)
}

/// The order of creation exists (Kahn's algorithm: take away what depends on nothing, until nothing is left).
fn check_order(image: &Image) -> Check {
    let mut waiting: BTreeMap<u32, usize> = BTreeMap::new();
    let mut followers: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (id, object) in &image.objects {
        waiting.insert(*id, object.after.len());
        object.after.iter().for_each(|other| followers.entry(*other).or_default().push(*id));
    }
    let mut ready: Vec<u32> = waiting.iter().filter(|(_, n)| **n == 0).map(|(id, _)| *id).collect();
    while let Some(id) = ready.pop() {
        waiting.remove(&id);
        for follower in followers.remove(&id).into_iter().flatten() {
            if let Some(n) = waiting.get_mut(&follower) {
                *n -= 1;
                if *n == 0 {
                    ready.push(follower);
                }
            }
        }
    }
    if waiting.is_empty() { Ok(()) } else { Err(Fault::Cycle(waiting.into_keys().collect())) }
}

fn check_namespaces(known: &Known<'_>) -> Check {
    for (id, namespace) in &known.image.namespaces {
        let place = Place::new(RecordKind::Namespace, *id);
        place.field("id", *id, *id != 0)?;
        known.plugin(place, &namespace.plugin)?;
        if namespace.owner != 0 {
            place.exists(RecordKind::Namespace, &known.image.namespaces, namespace.owner)?;
            place.field("owner", namespace.owner, namespace.owner != *id)?;
        }
    }
    Ok(())
}
