//! Regions: what one mmap(2) makes.

use super::{MemoryError, PAGE};
use crate::image::records::{MemoryMap, Vma, VmaAdvice, VmaKind};
use std::ops::Range;

/// Widest gap between two mappings of one region. Unmapping a gap costs a fourth of making and moving a mapping.
const GAP: u64 = 16 * PAGE;

/// What a region maps. Equal for mappings that may be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous {
        /// `MAP_*` for mmap(2): the type of mapping included.
        flags: i32,
    },
    /// A private mapping of a file: `base` is the address at which the file would begin.
    PrivateFile {
        /// Id of the MappedFile.
        file: u32,
        /// Address of offset 0.
        base: i64,
        /// MAP_NORESERVE, or 0.
        no_reserve: i32,
    },
    /// A shared mapping of a file.
    SharedFile {
        /// Id of the MappedFile.
        file: u32,
        /// Offset of the region.
        offset: u64,
        /// MAP_NORESERVE, or 0.
        no_reserve: i32,
    },
    /// Part of a shared anonymous segment.
    Segment {
        /// Id of the SharedSegment.
        segment: u32,
        /// Offset of the region.
        offset: u64,
    },
    /// A mapping that a plugin makes.
    Plugin,
}

impl Backing {
    /// Whether its pages can be shared after fork, and so may come from an ancestor.
    pub fn is_private(self) -> bool {
        matches!(self, Self::Anonymous { .. } | Self::PrivateFile { .. })
    }

    /// Whether its pages can be put there by userfaultfd(2), 4 KiB each.
    pub fn is_plain(self) -> bool {
        matches!(self, Self::Anonymous { flags } if flags & (libc::MAP_TYPE | libc::MAP_HUGETLB) == libc::MAP_PRIVATE)
    }
}

/// Since Linux 6.11 (include/uapi/linux/mman.h).
const MAP_DROPPABLE: i32 = 8;

/// The flag of mmap(2) that asks for hugetlb pages of 2^shift bytes; none for 0.
pub fn huge_flags(shift: u32) -> i32 {
    if shift == 0 {
        0
    } else {
        libc::MAP_HUGETLB | ((shift as i32 & libc::MAP_HUGE_MASK) << libc::MAP_HUGE_SHIFT)
    }
}

fn no_reserve(vma: &Vma) -> i32 {
    if has(vma, VmaAdvice::Noreserve) { libc::MAP_NORESERVE } else { 0 }
}

fn anonymous_flags(vma: &Vma) -> i32 {
    let kind = if has(vma, VmaAdvice::Droppable) { MAP_DROPPABLE } else { libc::MAP_PRIVATE };
    let grows_down = if vma.grows_down { libc::MAP_GROWSDOWN } else { 0 };
    kind | libc::MAP_ANONYMOUS | grows_down | no_reserve(vma) | huge_flags(vma.huge_shift)
}

/// A run of mappings that one mmap(2) makes; the restorer unmaps the gaps in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Home addresses.
    pub home: Range<u64>,
    /// What it maps.
    pub backing: Backing,
    /// Transparent huge pages: madvise(2) said yes or no, or nothing.
    pub huge: Option<bool>,
    /// Whether the image has pages for it, so that it must be prepared in an arena.
    pub contents: bool,
    /// Its mappings, indexes into the memory map.
    pub vmas: Range<usize>,
    /// Protection it is made with.
    pub prot: u32,
}

/// Whether `vma` has an advice.
pub fn has(vma: &Vma, advice: VmaAdvice) -> bool {
    vma.advice & advice as u32 != 0
}

fn backing(vma: &Vma) -> Option<Backing> {
    Some(match vma.kind() {
        VmaKind::PrivateAnonymous => Backing::Anonymous { flags: anonymous_flags(vma) },
        VmaKind::PrivateFile => {
            let base = vma.start.wrapping_sub(vma.offset) as i64;
            Backing::PrivateFile { file: vma.file, base, no_reserve: no_reserve(vma) }
        }
        VmaKind::SharedFile => {
            Backing::SharedFile { file: vma.file, offset: vma.offset, no_reserve: no_reserve(vma) }
        }
        VmaKind::SharedAnonymous => Backing::Segment { segment: vma.file, offset: vma.offset },
        VmaKind::Plugin => Backing::Plugin,
        // The restorer asks the kernel for these.
        VmaKind::Vdso | VmaKind::Vvar | VmaKind::Vsyscall => return None,
    })
}

fn huge(vma: &Vma) -> Option<bool> {
    match (has(vma, VmaAdvice::Hugepage), has(vma, VmaAdvice::Nohugepage)) {
        (true, _) => Some(true),
        (_, true) => Some(false),
        _ => None,
    }
}

/// The regions of a memory map. `pages` are its ranges with contents, sorted and disjoint.
pub fn regions(map: &MemoryMap, pages: &[Range<u64>]) -> Result<Vec<Region>, MemoryError> {
    let mut regions: Vec<Region> = Vec::new();
    let mut last_end = 0;
    // Whether the mapping before may be joined with this one.
    let mut joinable = false;
    for (index, vma) in map.vmas.iter().enumerate() {
        let Some(backing) = backing(vma) else {
            joinable = false;
            continue;
        };
        let damaged = |what| MemoryError::Damaged { map: map.id, what, address: vma.start };
        if vma.start >= vma.end || vma.end > 1 << 47 || (vma.start | vma.end | vma.offset) % PAGE != 0 {
            return Err(damaged("the bounds of the mapping"));
        }
        if vma.start < last_end {
            return Err(damaged("mappings overlap"));
        }
        last_end = vma.end;
        let first = pages.partition_point(|page| page.end <= vma.start);
        let contents = pages.get(first).is_some_and(|page| page.start < vma.end);
        let anonymous = backing.is_plain() && !vma.grows_down;
        // Joined to writable ones it would count against the commit limit, and it is often a reservation larger than the
        // machine's memory.
        let reserve = vma.prot & libc::PROT_WRITE as u32 == 0 && !contents && !has(vma, VmaAdvice::Accounted);
        let huge = huge(vma);
        match regions.last_mut() {
            Some(last)
                if anonymous
                    && last.backing == backing
                    && vma.start - last.home.end <= GAP
                    && last.huge == huge
                    && !reserve
                    && joinable =>
            {
                last.home.end = vma.end;
                last.vmas.end = index + 1;
                last.contents |= contents;
                if last.contents || last.prot != vma.prot {
                    last.prot = (libc::PROT_READ | libc::PROT_WRITE) as u32;
                }
            }
            _ => regions.push(Region {
                home: vma.start..vma.end,
                backing,
                huge,
                contents,
                vmas: index..index + 1,
                prot: if contents && backing.is_private() {
                    (libc::PROT_READ | libc::PROT_WRITE) as u32
                } else {
                    vma.prot
                },
            }),
        }
        joinable = !reserve;
    }
    Ok(regions)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vma(start: u64, end: u64, prot: u32) -> Vma {
        Vma { start, end, prot, advice: VmaAdvice::Accounted as u32, ..Vma::default() }
    }

    #[test]
    fn neighbours_make_one_region_and_a_stack_none() {
        let map = MemoryMap {
            id: 1,
            vmas: vec![
                vma(0x1000, 0x2000, 3),
                vma(0x2000, 0x3000, 1),
                vma(0x24000, 0x25000, 0),
                Vma { grows_down: true, ..vma(0x25000, 0x26000, 3) },
            ],
            ..MemoryMap::default()
        };
        let present = 0x24000..0x25000;
        let regions = regions(&map, std::slice::from_ref(&present)).unwrap();
        let homes: Vec<_> = regions.iter().map(|region| (region.home.clone(), region.contents)).collect();
        assert_eq!(homes, [(0x1000..0x3000, false), (0x24000..0x25000, true), (0x25000..0x26000, false)]);
    }

    #[test]
    fn a_small_gap_is_part_of_a_region_unless_something_lies_in_it() {
        let mut map = MemoryMap { id: 1, ..MemoryMap::default() };
        map.vmas = vec![vma(0x1000, 0x2000, 3), vma(0x3000, 0x4000, 3)];
        assert_eq!(regions(&map, &[]).unwrap()[0].home, 0x1000..0x4000);
        map.vmas.insert(1, Vma { kind: VmaKind::Vdso.into(), ..vma(0x2000, 0x3000, 5) });
        assert_eq!(regions(&map, &[]).unwrap().len(), 2);
    }

    #[test]
    fn overlapping_mappings_are_refused() {
        let map = MemoryMap {
            id: 1,
            vmas: vec![vma(0x1000, 0x3000, 3), vma(0x2000, 0x4000, 3)],
            ..MemoryMap::default()
        };
        assert!(matches!(regions(&map, &[]), Err(MemoryError::Damaged { .. })));
    }
}
