//! Doing what the plan says, in the tasks.

use super::arena::subtract;
use super::families::{Extent, Fill};
use super::fill::{self, Job, PageFiles};
use super::moves::RestorerMoves;
use super::plan::{MapPlan, MemoryPlan, TaskPlan};
use super::region::{Backing, Region, huge_flags};
use super::{MemoryError, PAGE};
use crate::image::records::{MappedFile, Vma};
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Opens files that are mapped.
pub trait OpenMapped {
    /// Opens `file`, for writing too when `write`.
    fn open(&mut self, file: &MappedFile, write: bool) -> Result<File, MemoryError>;
}

/// Files that one phase has opened: a library has several mappings.
struct Opened<'a> {
    by: &'a mut dyn OpenMapped,
    files: HashMap<(u32, bool), File>,
}

impl Opened<'_> {
    fn get(&mut self, file: &MappedFile, write: bool) -> Result<i32, MemoryError> {
        let key = (file.id, write);
        if let Some(opened) = self.files.get(&key) {
            return Ok(opened.as_raw_fd());
        }
        let opened = self.by.open(file, write)?;
        Ok(self.files.entry(key).or_insert(opened).as_raw_fd())
    }
}

/// Memory of the calling task, on its way.
#[derive(Debug)]
pub struct TaskMemory<'a> {
    plan: &'a MemoryPlan,
    task: &'a TaskPlan,
    pid: i32,
    root: bool,
}

impl<'a> TaskMemory<'a> {
    /// In the root task, before anything else.
    pub fn root(plan: &'a MemoryPlan, pid: i32) -> Result<Self, MemoryError> {
        Ok(Self { plan, task: plan.task(pid)?, pid, root: true })
    }

    /// In a task that has just been forked: from its parent's, which the fork copied.
    pub fn into_child(self, pid: i32) -> Result<Self, MemoryError> {
        Ok(Self { plan: self.plan, task: self.plan.task(pid)?, pid, root: false })
    }

    /// Maps and fills what descendants inherit. Call it before the first fork.
    pub fn before_forks(&mut self, pages: &PageFiles, files: &mut dyn OpenMapped) -> Result<(), MemoryError> {
        let mut opened = Opened { by: files, files: HashMap::new() };
        if self.root {
            self.segments(pages)?;
        }
        let mut fresh = Vec::new();
        for component in self.task.premap.iter().filter_map(|&index| self.plan.components.get(index)) {
            let writable = (libc::PROT_READ | libc::PROT_WRITE) as u32;
            self.map(&component.home, component.backing, component.huge, writable, false, &mut opened)?;
            if component.backing.is_plain() {
                fresh.push(self.plan.arenas.range(&component.home));
            }
        }
        fresh.sort_by_key(|range| range.start);
        self.fill_pages(&self.task.prefill, &fresh, pages)
    }

    /// Takes away what was only mapped for others. Call it after the last fork.
    pub fn after_forks(&mut self) -> Result<(), MemoryError> {
        let Some(map) = self.map_plan() else { return Ok(()) };
        let kept: Vec<_> = inherited(map, self.task).map(|region| region.home.clone()).collect();
        for &index in self.task.carried.iter().chain(&self.task.premap) {
            let Some(component) = self.plan.components.get(index) else { continue };
            for rest in subtract(&component.home, &kept) {
                let arena = self.plan.arenas.range(&rest);
                // SAFETY: part of an arena, which only descendants need.
                let result =
                    unsafe { libc::munmap(arena.start as *mut _, (arena.end - arena.start) as usize) };
                self.check(result, "trimming the inherited memory", &rest)?;
            }
        }
        for range in &self.task.discard {
            self.advise(range, libc::MADV_DONTNEED, "dropping inherited pages of")?;
        }
        for region in inherited(map, self.task) {
            self.advise_huge(&region.home, region.huge)?;
        }
        Ok(())
    }

    /// Mappings that plugins make, and where: at that address, to be moved home by the restorer.
    pub fn plugin_mappings(&self) -> impl Iterator<Item = (&'a Vma, Range<u64>)> {
        let plan = self.plan;
        let map = self.map_plan();
        map.into_iter().flat_map(move |map| {
            let plugins = map.regions.iter().filter(|region| region.backing == Backing::Plugin);
            plugins.filter_map(move |region| {
                Some((map.map.vmas.get(region.vmas.start)?, plan.arenas.range(&region.home)))
            })
        })
    }

    /// Maps everything else and fills all pages.
    pub fn fill(&mut self, pages: &PageFiles, files: &mut dyn OpenMapped) -> Result<(), MemoryError> {
        let Some(map) = self.map_plan() else { return Ok(()) };
        let mut opened = Opened { by: files, files: HashMap::new() };
        let mut anonymous = Vec::new();
        for (region, &inherits) in map.regions.iter().zip(&self.task.inherits) {
            if in_arena(region) && !inherits {
                let may_write = map.map.vmas.get(region.vmas.start).is_some_and(|vma| vma.may_write);
                self.map(&region.home, region.backing, region.huge, region.prot, may_write, &mut opened)?;
            }
            if region.contents && region.backing.is_plain() {
                anonymous.push(self.plan.arenas.range(&region.home));
            }
        }
        // Clusters of homes may lie in another order than their arenas.
        anonymous.sort_by_key(|range| range.start);
        self.fill_pages(&self.task.fill, &anonymous, pages)
    }

    /// What is left for the restorer.
    pub fn finish(self) -> RestorerMoves {
        match self.map_plan() {
            Some(map) => {
                RestorerMoves::new(map, &self.plan.arenas, self.plan.blob_address(), self.plan.vdso.as_ref())
            }
            None => RestorerMoves::default(),
        }
    }

    fn map_plan(&self) -> Option<&'a MapPlan> {
        self.task.map.and_then(|map| self.plan.maps.get(&map))
    }

    fn check(&self, result: i32, operation: &'static str, home: &Range<u64>) -> Result<(), MemoryError> {
        if result == 0 { Ok(()) } else { Err(MemoryError::last(operation, home, self.pid)) }
    }

    /// Maps and fills the shared segments, which all tasks take from the root task.
    fn segments(&self, pages: &PageFiles) -> Result<(), MemoryError> {
        for segment in self.plan.segments.values().filter(|segment| segment.size > 0) {
            let range = segment.address..segment.address + segment.size;
            let flags = libc::MAP_SHARED
                | libc::MAP_ANONYMOUS
                | if segment.no_reserve { libc::MAP_NORESERVE } else { 0 }
                | huge_flags(segment.huge_shift);
            self.mmap(&range, &range, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)?;
            let job = |extent: &Extent| Job {
                home: extent.home.clone(),
                arena: segment.address + extent.home.start,
                shard: extent.shard,
                offset: extent.offset,
                fresh: false,
            };
            fill::fill(segment.pages.iter().map(job).collect(), &[], pages, self.pid)?;
        }
        Ok(())
    }

    fn mmap(
        &self,
        home: &Range<u64>,
        arena: &Range<u64>,
        prot: i32,
        flags: i32,
        fd: i32,
        offset: u64,
    ) -> Result<(), MemoryError> {
        let flags = flags | libc::MAP_FIXED_NOREPLACE;
        let size = (arena.end - arena.start) as usize;
        // SAFETY: MAP_FIXED_NOREPLACE replaces nothing.
        let got = unsafe { libc::mmap(arena.start as *mut _, size, prot, flags, fd, offset as i64) };
        if got as u64 == arena.start {
            Ok(())
        } else {
            let operation = match flags & libc::MAP_HUGETLB {
                0 => "mapping the memory",
                _ => "mapping hugetlb pages (are there enough? see vm.nr_hugepages)",
            };
            Err(MemoryError::last(operation, home, self.pid))
        }
    }

    /// Makes one region in its arena.
    fn map(
        &self,
        home: &Range<u64>,
        backing: Backing,
        huge: Option<bool>,
        prot: u32,
        may_write: bool,
        opened: &mut Opened<'_>,
    ) -> Result<(), MemoryError> {
        let arena = self.plan.arenas.range(home);
        let prot = prot as i32;
        let missing = |what, id| MemoryError::Missing { what, id, map: self.task.map.unwrap_or(0) };
        let file = |id| self.plan.files.get(&id).ok_or(missing("mapped file", id));
        match backing {
            Backing::Anonymous { flags } => {
                self.mmap(home, &arena, prot, flags, -1, 0)?;
                self.advise_huge(home, huge)
            }
            Backing::PrivateFile { file: id, base, no_reserve } => {
                let fd = opened.get(file(id)?, false)?;
                let offset = home.start.wrapping_sub(base as u64);
                self.mmap(home, &arena, prot, libc::MAP_PRIVATE | no_reserve, fd, offset)
            }
            Backing::SharedFile { file: id, offset, no_reserve } => {
                let write = may_write || prot & libc::PROT_WRITE != 0;
                let fd = opened.get(file(id)?, write)?;
                self.mmap(home, &arena, prot, libc::MAP_SHARED | no_reserve, fd, offset)
            }
            Backing::Segment { segment: id, offset } => {
                let segment = self.plan.segments.get(&id).ok_or(missing("shared segment", id))?;
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let size = (arena.end - arena.start) as usize;
                // Hugetlb pages cannot be mapped once more; but neither could the task that has them from its parent.
                let old_size = if segment.huge_shift == 0 { 0 } else { size };
                // SAFETY: with an old size of 0 a shared mapping is mapped once more, else a part of it goes, which this task
                // needs nowhere else; the arena is ours.
                let got = unsafe {
                    libc::mremap(
                        (segment.address + offset) as *mut _,
                        old_size,
                        size,
                        flags,
                        arena.start as *mut libc::c_void,
                    )
                };
                if got as u64 != arena.start {
                    return Err(MemoryError::last("mapping the shared memory", home, self.pid));
                }
                Ok(())
            }
            Backing::Plugin => Ok(()),
        }
    }

    fn advise_huge(&self, home: &Range<u64>, huge: Option<bool>) -> Result<(), MemoryError> {
        match huge {
            Some(true) => self.advise(home, libc::MADV_HUGEPAGE, "asking for huge pages in"),
            Some(false) => self.advise(home, libc::MADV_NOHUGEPAGE, "refusing huge pages in"),
            None => Ok(()),
        }
    }

    fn advise(&self, home: &Range<u64>, advice: i32, operation: &'static str) -> Result<(), MemoryError> {
        let arena = self.plan.arenas.range(home);
        // SAFETY: advice on an arena of ours.
        let result =
            unsafe { libc::madvise(arena.start as *mut _, (arena.end - arena.start) as usize, advice) };
        self.check(result, operation, home)
    }

    fn fill_pages(
        &self,
        fills: &[Fill],
        anonymous: &[Range<u64>],
        pages: &PageFiles,
    ) -> Result<(), MemoryError> {
        let mut jobs: Vec<Job> = fills
            .iter()
            .map(|fill| Job {
                home: fill.extent.home.clone(),
                arena: self.plan.arenas.of(fill.extent.home.start),
                shard: fill.extent.shard,
                offset: fill.extent.offset,
                fresh: !fill.over && !fill.extent.huge && fill.extent.offset % PAGE == 0,
            })
            .collect();
        jobs.sort_by_key(|job| job.arena);
        fill::fill(jobs, anonymous, pages, self.pid)
    }
}

/// Whether a region is made in an arena; others the restorer makes at home.
pub(super) fn in_arena(region: &Region) -> bool {
    region.contents || !matches!(region.backing, Backing::Anonymous { .. })
}

fn inherited<'p>(map: &'p MapPlan, task: &'p TaskPlan) -> impl Iterator<Item = &'p Region> {
    map.regions.iter().zip(&task.inherits).filter(|(_, inherits)| **inherits).map(|(region, _)| region)
}
