//! What every task does with memory, worked out from the image alone.

use super::arena::{Arenas, join, subtract};
use super::families::{Component, Extent, Fill, components, missing, overlay, shared};
use super::region::{Backing, Region, has, regions};
use super::{MemoryError, PAGE};
use crate::image::records::{MappedFile, MemoryMap, PageMap, SharedSegment, VmaAdvice, VmaKind};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

/// A task and the one that forks it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parent {
    /// The task.
    pub pid: i32,
    /// Who forks it; none for the root task.
    pub parent: Option<i32>,
    /// Its memory map; none for a zombie or a stand-in.
    pub map: Option<u32>,
}

/// The records of an image that the plan is made of.
#[derive(Debug, Clone, Copy)]
pub struct Records<'a> {
    /// Memory maps.
    pub maps: &'a [MemoryMap],
    /// Mapped files.
    pub files: &'a [MappedFile],
    /// Shared anonymous segments.
    pub segments: &'a [SharedSegment],
    /// Pages of both.
    pub pages: &'a [PageMap],
    /// The process tree as it will be forked; parents may come after their children.
    pub tree: &'a [Parent],
}

/// What one memory map consists of.
#[derive(Debug, Clone)]
pub struct MapPlan {
    /// The record.
    pub map: MemoryMap,
    /// Its regions, ascending.
    pub regions: Vec<Region>,
    /// Its pages, ascending.
    pub pages: Vec<Extent>,
    /// Its guard regions, ascending.
    pub guards: Vec<Range<u64>>,
}

/// A shared segment, mapped once in the root task.
#[derive(Debug, Clone)]
pub struct SegmentPlan {
    /// Where it is mapped.
    pub address: u64,
    /// Its size.
    pub size: u64,
    /// MAP_NORESERVE.
    pub no_reserve: bool,
    /// Hugetlb pages of 2^huge_shift bytes; 0: none.
    pub huge_shift: u32,
    /// Its pages, by offset.
    pub pages: Vec<Extent>,
}

/// What one task does.
#[derive(Debug, Clone, Default)]
pub struct TaskPlan {
    /// Its memory map.
    pub map: Option<u32>,
    /// Components that an ancestor has mapped.
    pub carried: BTreeSet<usize>,
    /// Components that it maps for its descendants.
    pub premap: Vec<usize>,
    /// Pages that it fills for its descendants.
    pub prefill: Vec<Fill>,
    /// For each region, whether it comes from a component that was carried or premapped.
    pub inherits: Vec<bool>,
    /// Pages that it fills for itself, ascending.
    pub fill: Vec<Fill>,
    /// Inherited pages that it does not have.
    pub discard: Vec<Range<u64>>,
}

/// The tasks come from a kernel with another vdso.
#[derive(Debug, Clone)]
pub struct ChangedVdso {
    /// Where this kernel maps its own, data pages first.
    pub address: u64,
    /// What lies where the old one was.
    pub contents: Vec<u8>,
}

/// The plan of all tasks.
#[derive(Debug, Clone)]
pub struct MemoryPlan {
    pub(super) maps: BTreeMap<u32, MapPlan>,
    pub(super) tasks: HashMap<i32, TaskPlan>,
    pub(super) components: Vec<Component>,
    pub(super) segments: BTreeMap<u32, SegmentPlan>,
    pub(super) files: BTreeMap<u32, MappedFile>,
    pub(super) arenas: Arenas,
    pub(super) blob: u64,
    pub(super) vdso: Option<ChangedVdso>,
}

impl MemoryPlan {
    /// Plans the memory of all tasks. `occupied` are the mappings of the process that will fork the root task.
    pub fn new(records: Records<'_>, occupied: &[Range<u64>]) -> Result<Self, MemoryError> {
        let mut pages: BTreeMap<u32, (Vec<Extent>, Vec<bool>)> = BTreeMap::new();
        let mut segment_pages: BTreeMap<u32, Vec<Extent>> = BTreeMap::new();
        let mut guards: BTreeMap<u32, Vec<Range<u64>>> = BTreeMap::new();
        for record in records.pages {
            let (extents, shares) = extents(record)?;
            if record.mm == 0 {
                segment_pages.insert(record.segment, extents);
            } else {
                pages.insert(record.mm, (extents, shares));
                guards.insert(record.mm, record.guards.iter().map(|guard| guard.start..guard.end).collect());
            }
        }
        let mut maps = BTreeMap::new();
        let mut shares = BTreeMap::new();
        for map in records.maps {
            let (extents, share) = pages.remove(&map.id).unwrap_or_default();
            let present = join(extents.iter().map(|extent| extent.home.clone()).collect());
            let regions = regions(map, &present)?;
            check_pages(map, &regions, &present)?;
            shares.insert(map.id, share);
            let guards = guards.remove(&map.id).unwrap_or_default();
            maps.insert(map.id, MapPlan { map: map.clone(), regions, pages: extents, guards });
        }
        if let Some((&id, _)) = pages.iter().next() {
            return Err(MemoryError::Missing { what: "memory map", id, map: id });
        }
        let files: BTreeMap<_, _> = records.files.iter().map(|file| (file.id, file.clone())).collect();
        check_names(&maps, &files, records.segments)?;
        let homes: Vec<Range<u64>> =
            records.maps.iter().flat_map(|map| map.vmas.iter().map(|vma| vma.start..vma.end)).collect();
        let mut arenas = Arenas::new(&homes, occupied)?;
        let unreserved: BTreeSet<u32> = records
            .maps
            .iter()
            .flat_map(|map| &map.vmas)
            .filter(|vma| vma.kind() == VmaKind::SharedAnonymous && has(vma, VmaAdvice::Noreserve))
            .map(|vma| vma.file)
            .collect();
        let mut segments = BTreeMap::new();
        for segment in records.segments {
            let size = segment.size.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
            let address = arenas.reserve(size).ok_or(MemoryError::NoRoom { home: 0, size })?;
            let pages = segment_pages.remove(&segment.id).unwrap_or_default();
            if let Some(last) = pages.last().filter(|last| last.home.end > size) {
                let address = last.home.start;
                return Err(MemoryError::Damaged { map: 0, what: "a page beyond its segment", address });
            }
            let no_reserve = unreserved.contains(&segment.id);
            let huge_shift = segment.huge_shift;
            segments.insert(segment.id, SegmentPlan { address, size, no_reserve, huge_shift, pages });
        }
        if let Some((&id, _)) = segment_pages.iter().next() {
            return Err(MemoryError::Missing { what: "shared segment", id, map: 0 });
        }
        let blob = arenas.reserve(BLOB_ROOM).ok_or(MemoryError::NoRoom { home: 0, size: BLOB_ROOM })?;
        let (components, tasks) = tasks(records.tree, &maps, &shares, &files)?;
        Ok(Self { maps, tasks, components, segments, files, arenas, blob, vdso: None })
    }

    /// Finds a place for this kernel's vdso, whose text comes `data` bytes behind; `contents` makes what lies where the old one was.
    pub fn change_vdso<E>(
        &mut self,
        data: u64,
        contents: impl FnOnce(u64) -> Result<Vec<u8>, E>,
    ) -> Result<(), E>
    where
        E: From<MemoryError>,
    {
        let address =
            self.arenas.reserve(VDSO_ROOM).ok_or(MemoryError::NoRoom { home: 0, size: VDSO_ROOM })?;
        let contents = contents(address + data)?;
        self.vdso = Some(ChangedVdso { address, contents });
        Ok(())
    }

    /// Address for the restorer's region, with [`BLOB_ROOM`] bytes of room.
    pub fn blob_address(&self) -> u64 {
        self.blob
    }

    /// Where `home` is prepared.
    pub fn arena(&self, home: u64) -> u64 {
        self.arenas.of(home)
    }

    /// Plan of one task.
    pub fn task(&self, pid: i32) -> Result<&TaskPlan, MemoryError> {
        self.tasks.get(&pid).ok_or(MemoryError::Tree { pid })
    }
}

/// More than any vdso and its data pages need.
const VDSO_ROOM: u64 = 1 << 20;
/// Room for the blob, its tables and the stacks of its threads.
pub const BLOB_ROOM: u64 = 4 << 30;

/// Checks and converts the extents of a record; the second result tells which are shared.
fn extents(record: &PageMap) -> Result<(Vec<Extent>, Vec<bool>), MemoryError> {
    let mut extents: Vec<Extent> = Vec::with_capacity(record.extents.len());
    let mut shares = Vec::with_capacity(record.extents.len());
    let mut last = 0;
    for extent in &record.extents {
        let damaged = |what| MemoryError::Damaged { map: record.mm, what, address: extent.address };
        let end =
            extent.address.checked_add(u64::from(extent.pages) * PAGE).ok_or(damaged("a page extent"))?;
        if extent.address < last || extent.pages == 0 || extent.address % PAGE != 0 {
            return Err(damaged("a page extent"));
        }
        if extent.offset.checked_add(end - extent.address).is_none() {
            return Err(damaged("the offset of a page extent"));
        }
        last = end;
        extents.push(Extent {
            home: extent.address..end,
            shard: extent.shard,
            offset: extent.offset,
            huge: extent.huge,
        });
        shares.push(extent.shared);
    }
    Ok((extents, shares))
}

/// Pages belong to private mappings.
fn check_pages(map: &MemoryMap, regions: &[Region], present: &[Range<u64>]) -> Result<(), MemoryError> {
    let private: Vec<_> = regions
        .iter()
        .filter(|region| region.backing.is_private())
        .flat_map(|region| map.vmas.get(region.vmas.clone()).into_iter().flatten())
        .map(|vma| vma.start..vma.end)
        .collect();
    let private = join(private);
    match present.iter().flat_map(|range| subtract(range, &private)).next() {
        Some(stray) => Err(MemoryError::Damaged {
            map: map.id,
            what: "pages outside every private mapping",
            address: stray.start,
        }),
        None => Ok(()),
    }
}

/// Files and segments that regions name exist.
fn check_names(
    maps: &BTreeMap<u32, MapPlan>,
    files: &BTreeMap<u32, MappedFile>,
    segments: &[SharedSegment],
) -> Result<(), MemoryError> {
    for (&map, plan) in maps {
        for region in &plan.regions {
            let size = region.home.end - region.home.start;
            match region.backing {
                Backing::PrivateFile { file, .. } | Backing::SharedFile { file, .. }
                    if !files.contains_key(&file) =>
                {
                    return Err(MemoryError::Missing { what: "mapped file", id: file, map });
                }
                Backing::Segment { segment, offset } => {
                    let record = segments.iter().find(|record| record.id == segment);
                    let record =
                        record.ok_or(MemoryError::Missing { what: "shared segment", id: segment, map })?;
                    if offset.checked_add(size).is_none_or(|end| end > record.size.next_multiple_of(PAGE)) {
                        let address = region.home.start;
                        return Err(MemoryError::Damaged {
                            map,
                            what: "a mapping beyond its segment",
                            address,
                        });
                    }
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// The process tree, parents before children.
struct Tree {
    order: Vec<Parent>,
    /// Index of the parent, and depth.
    up: Vec<(Option<usize>, usize)>,
    /// The task that stands for a memory map: the first that has it.
    of_map: HashMap<u32, usize>,
}

impl Tree {
    fn new(tree: &[Parent]) -> Result<Self, MemoryError> {
        let mut children: HashMap<Option<i32>, Vec<&Parent>> = HashMap::new();
        for task in tree {
            children.entry(task.parent).or_default().push(task);
        }
        let mut made = Self { order: Vec::new(), up: Vec::new(), of_map: HashMap::new() };
        let mut todo: Vec<(&Parent, Option<usize>, usize)> =
            children.remove(&None).unwrap_or_default().into_iter().map(|root| (root, None, 0)).collect();
        while let Some((task, parent, depth)) = todo.pop() {
            let index = made.order.len();
            made.order.push(*task);
            made.up.push((parent, depth));
            if let Some(map) = task.map {
                made.of_map.entry(map).or_insert(index);
            }
            let below = children.remove(&Some(task.pid)).unwrap_or_default();
            todo.extend(below.into_iter().map(|child| (child, Some(index), depth + 1)));
        }
        match children.into_values().flatten().next() {
            Some(stray) => Err(MemoryError::Tree { pid: stray.pid }),
            None => Ok(made),
        }
    }

    fn common_ancestor(&self, maps: &BTreeSet<u32>) -> Option<usize> {
        let mut nodes = maps.iter().map(|map| self.of_map.get(map).copied());
        let first = nodes.next()??;
        nodes.try_fold(first, |mut one, two| {
            let mut two = two?;
            while one != two {
                if self.up[one].1 >= self.up[two].1 {
                    one = self.up[one].0?;
                } else {
                    two = self.up[two].0?;
                }
            }
            Some(one)
        })
    }
}

type Tasks = HashMap<i32, TaskPlan>;

fn tasks(
    tree: &[Parent],
    maps: &BTreeMap<u32, MapPlan>,
    shares: &BTreeMap<u32, Vec<bool>>,
    files: &BTreeMap<u32, MappedFile>,
) -> Result<(Vec<Component>, Tasks), MemoryError> {
    let tree = Tree::new(tree)?;
    let regions = maps.iter().map(|(&id, map)| (id, map.regions.clone())).collect();
    // What plugins make does not exist yet when tasks are forked.
    let early = |backing| match backing {
        Backing::PrivateFile { file, .. } => files.get(&file).is_some_and(|file| file.handle == 0),
        _ => true,
    };
    let (components, component_of) = components(&regions, early);
    let wanted = families(&tree, maps, shares, &component_of);

    let mut plans = Tasks::new();
    // Components and pages that a task has when it forks.
    let mut after: Vec<(BTreeSet<usize>, Vec<Extent>)> = Vec::with_capacity(tree.order.len());
    for (index, task) in tree.order.iter().enumerate() {
        let (carried, state) = tree.up[index].0.map(|parent| after[parent].clone()).unwrap_or_default();
        let mut plan = TaskPlan { map: task.map, carried: carried.clone(), ..TaskPlan::default() };
        let mut mapped = carried;
        let mut own: Vec<Extent> = Vec::new();
        for (component, extent) in wanted.get(&index).into_iter().flatten() {
            let place = &components[*component];
            let clear = |other: &usize| {
                let other = &components[*other];
                other.home.end <= place.home.start || place.home.end <= other.home.start
            };
            if !mapped.contains(component) {
                if !mapped.iter().all(clear) {
                    continue;
                }
                mapped.insert(*component);
                plan.premap.push(*component);
            }
            own.push(extent.clone());
        }
        own.sort_by_key(|extent| extent.home.start);
        plan.prefill = missing(&own, &state);
        let state = overlay(&state, &own);
        if let Some(map) = task.map {
            let map_plan = maps.get(&map).ok_or(MemoryError::Missing { what: "memory map", id: map, map })?;
            let slots = component_of.get(&map).map(Vec::as_slice).unwrap_or_default();
            plan.inherits =
                slots.iter().map(|slot| slot.is_some_and(|slot| mapped.contains(&slot))).collect();
            own_pages(&mut plan, map_plan, &state);
        }
        plans.insert(task.pid, plan);
        after.push((mapped, state));
    }
    Ok((components, plans))
}

/// What a task fills and discards for itself, when it has forked all children.
fn own_pages(plan: &mut TaskPlan, map: &MapPlan, state: &[Extent]) {
    let inherited: Vec<_> = map
        .regions
        .iter()
        .zip(&plan.inherits)
        .filter(|(_, inherits)| **inherits)
        .map(|(region, _)| region.home.clone())
        .collect();
    let inherited = join(inherited);
    let lost: Vec<_> = subtract(&(0..u64::MAX), &inherited);
    let kept: Vec<Extent> = state
        .iter()
        .flat_map(|extent| subtract(&extent.home, &lost).into_iter().map(|part| extent.part(&part)))
        .collect();
    plan.fill = missing(&map.pages, &kept);
    let present = join(map.pages.iter().map(|extent| extent.home.clone()).collect());
    plan.discard = kept.iter().flat_map(|extent| subtract(&extent.home, &present)).collect();
}

/// For each task (index in the tree) the pages that it fills for its descendants, with their components.
fn families(
    tree: &Tree,
    maps: &BTreeMap<u32, MapPlan>,
    shares: &BTreeMap<u32, Vec<bool>>,
    component_of: &BTreeMap<u32, Vec<Option<usize>>>,
) -> HashMap<usize, Vec<(usize, Extent)>> {
    let candidates = maps.iter().filter(|(id, _)| tree.of_map.contains_key(id)).flat_map(|(&id, map)| {
        let shares = shares.get(&id).map(Vec::as_slice).unwrap_or_default();
        map.pages.iter().zip(shares).filter(|(_, shared)| **shared).map(move |(extent, _)| (id, extent))
    });
    let mut pieces: Vec<(usize, usize, Extent, usize)> = Vec::new();
    let mut ancestors: HashMap<BTreeSet<u32>, Option<usize>> = HashMap::new();
    for piece in shared(candidates) {
        let mut rest = piece.extent.home.clone();
        while !rest.is_empty() {
            let mut end = rest.end;
            let mut groups: BTreeMap<usize, BTreeSet<u32>> = BTreeMap::new();
            for &id in &piece.maps {
                let Some(map) = maps.get(&id) else { continue };
                let at = map.regions.partition_point(|region| region.home.end <= rest.start);
                let Some(region) = map.regions.get(at) else { continue };
                end = end.min(region.home.end);
                if let Some(component) = component_of.get(&id).and_then(|of| of.get(at).copied().flatten()) {
                    groups.entry(component).or_default().insert(id);
                }
            }
            let part = piece.extent.part(&(rest.start..end));
            rest.start = end;
            let largest = groups.into_iter().max_by_key(|(_, members)| members.len());
            let Some((component, members)) = largest.filter(|(_, members)| members.len() > 1) else {
                continue;
            };
            let count = members.len();
            let ancestor =
                *ancestors.entry(members).or_insert_with_key(|members| tree.common_ancestor(members));
            if let Some(ancestor) = ancestor {
                pieces.push((ancestor, component, part, count));
            }
        }
    }
    // One page at one address: where families compete for it in the same ancestor, the largest gets it.
    pieces.sort_by_key(|(_, _, extent, count)| (std::cmp::Reverse(*count), extent.home.start));
    let mut result: HashMap<usize, Vec<(usize, Extent)>> = HashMap::new();
    let mut taken: HashMap<usize, BTreeMap<u64, u64>> = HashMap::new();
    for (ancestor, component, extent, _) in pieces {
        let taken = taken.entry(ancestor).or_default();
        let free =
            taken.range(..extent.home.end).next_back().is_none_or(|(_, &end)| end <= extent.home.start);
        if free {
            taken.insert(extent.home.start, extent.home.end);
            result.entry(ancestor).or_default().push((component, extent));
        }
    }
    result
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
