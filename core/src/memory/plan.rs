//! Gives every page of contents a place in a page file, once, and says who copies it there.
//!
//! Places are fixed before anything is copied, so that several writers work at once without a word to each other; pages
//! that turn out to be all zeros stay holes in the page file and leave the extents afterwards.

use super::{
    PAGE,
    scan::{Region, category},
    sharing::{Candidate, Owners, Place},
};
use crate::image::records::PageExtent;
use std::{collections::HashMap, ops::Range};

/// A memory descriptor's (or segment's) pages with contents, ascending.
#[derive(Debug, Clone, Default)]
pub struct Contents {
    /// Runs of pages to keep.
    pub regions: Vec<Region>,
    /// Those of them that others may share, ascending.
    pub candidates: Vec<Candidate>,
    /// Whether its pages may be copied from inside the task.
    pub inside: bool,
    /// Guard regions, ascending: nobody can read them.
    pub guards: Vec<Range<u64>>,
}

impl Contents {
    /// Bytes in all regions.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.end - region.start).sum()
    }
}

/// Who copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Way {
    /// A thread of the command, reading from outside; the number is the thread's.
    Outside(u32),
    /// The task itself.
    Inside,
}

/// A run of pages to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// Place in the page file.
    pub offset: u64,
    /// Transparent huge pages: not looked through for zeros.
    pub huge: bool,
}

/// What one copier does for one memory descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Index of the contents.
    pub contents: usize,
    /// Who copies.
    pub way: Way,
    /// Page file.
    pub shard: u32,
    /// Ascending.
    pub runs: Vec<Run>,
}

/// The result: extents of every contents, the jobs, and the length of each page file.
#[derive(Debug, Default)]
pub struct PagePlan {
    /// As in the image, per contents.
    pub extents: Vec<Vec<PageExtent>>,
    /// Work to do.
    pub jobs: Vec<Job>,
    /// Bytes of each page file.
    pub shards: Vec<u64>,
}

/// The share of all bytes that a thread outside takes while tasks copy the rest themselves: the ratio of the two speeds
/// (KERNEL.md, "Copying memory out").
const OUTSIDE_SHARE: f64 = 0.38;
/// Below this, stopping to set up a copier inside costs more than it saves.
const INSIDE_MINIMUM: u64 = 8 << 20;

/// What is to be done with a run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    Own { address: u64, pages: u64, huge: bool, shared: bool },
    Other { address: u64, pages: u64, huge: bool, owner: Place },
}

/// Plans the copying of `contents`, with up to `threads` copiers, behind what is in the page files already: `shards` bytes.
pub fn plan(contents: &[Contents], threads: u32, mut shards: Vec<u64>) -> PagePlan {
    let pieces = resolve_sharing(contents);
    let lanes = Lanes::choose(contents, &pieces, threads);
    shards.resize(shards.len().max(lanes.count as usize), 0);
    let mut plan = PagePlan { shards, ..PagePlan::default() };
    let mut offsets: Vec<Vec<(u64, u64, u32, u64)>> = Vec::with_capacity(contents.len());
    let mut state = lanes;
    for (index, pieces) in pieces.iter().enumerate() {
        let mut jobs: HashMap<Way, Job> = HashMap::new();
        let mut placed = Vec::new();
        for &piece in pieces {
            let Piece::Own { address, pages, huge, .. } = piece else { continue };
            let (mut address, mut rest) = (address, pages * PAGE);
            while rest > 0 {
                let (way, shard, length) = state.take(contents[index].inside, rest);
                let offset = plan.shards[shard as usize];
                plan.shards[shard as usize] += length;
                placed.push((address, length, shard, offset));
                let job =
                    jobs.entry(way).or_insert_with(|| Job { contents: index, way, shard, runs: Vec::new() });
                job.runs.push(Run { address, length, offset, huge });
                address += length;
                rest -= length;
            }
        }
        let mut jobs: Vec<_> = jobs.into_values().collect();
        jobs.sort_by_key(|job| job.way);
        plan.jobs.extend(jobs);
        offsets.push(placed);
    }
    plan.extents = pieces
        .iter()
        .enumerate()
        .map(|(index, pieces)| {
            let mut extents = Vec::new();
            for &piece in pieces {
                place_piece(&mut extents, piece, index, &offsets);
            }
            extents
        })
        .collect();
    plan
}

/// Splits each region where the owner of its pages changes.
fn resolve_sharing(contents: &[Contents]) -> Vec<Vec<Piece>> {
    let mut owners = Owners::default();
    let mut shared: std::collections::HashSet<(usize, u64)> = std::collections::HashSet::new();
    let mut resolved: Vec<Vec<Place>> = Vec::with_capacity(contents.len());
    for (mm, one) in contents.iter().enumerate() {
        let places = one.candidates.iter().map(|candidate| {
            let place = Place { mm, address: candidate.address };
            let owner = owners.owner(candidate.identity, place);
            if owner != place {
                shared.insert((owner.mm, owner.address));
            }
            owner
        });
        resolved.push(places.collect());
    }
    contents
        .iter()
        .enumerate()
        .map(|(mm, one)| {
            let mut pieces = Vec::new();
            let mut next = 0;
            for region in &one.regions {
                let huge = region.categories & category::HUGE != 0;
                let mut address = region.start;
                while address < region.end {
                    while next < one.candidates.len() && one.candidates[next].address < address {
                        next += 1;
                    }
                    let candidate = one.candidates.get(next).map_or(u64::MAX, |candidate| candidate.address);
                    if candidate > address {
                        let end = candidate.min(region.end);
                        push(
                            &mut pieces,
                            Piece::Own { address, pages: (end - address) / PAGE, huge, shared: false },
                        );
                        address = end;
                        continue;
                    }
                    let owner = resolved[mm][next];
                    push(
                        &mut pieces,
                        match owner == (Place { mm, address }) {
                            true => Piece::Own {
                                address,
                                pages: 1,
                                huge,
                                shared: shared.contains(&(mm, address)),
                            },
                            false => Piece::Other { address, pages: 1, huge, owner },
                        },
                    );
                    address += PAGE;
                }
            }
            pieces
        })
        .collect()
}

/// Appends, joining what continues the last piece.
fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    match (pieces.last_mut(), piece) {
        (
            Some(Piece::Own { address: a, pages, huge: h, shared: s }),
            Piece::Own { address, pages: more, huge, shared },
        ) if *a + *pages * PAGE == address && *h == huge && *s == shared => *pages += more,
        (
            Some(Piece::Other { address: a, pages, huge: h, owner: o }),
            Piece::Other { address, pages: more, huge, owner },
        ) if *a + *pages * PAGE == address
            && *h == huge
            && o.mm == owner.mm
            && o.address + *pages * PAGE == owner.address =>
        {
            *pages += more;
        }
        (_, piece) => pieces.push(piece),
    }
}

/// Turns a piece into extents, cut where its owner's pages are not in one stretch of a page file.
fn place_piece(
    extents: &mut Vec<PageExtent>,
    piece: Piece,
    index: usize,
    offsets: &[Vec<(u64, u64, u32, u64)>],
) {
    let (mut address, pages, huge, shared, owner) = match piece {
        Piece::Own { address, pages, huge, shared } => {
            (address, pages, huge, shared, Place { mm: index, address })
        }
        Piece::Other { address, pages, huge, owner } => (address, pages, huge, true, owner),
    };
    let placed = &offsets[owner.mm];
    let mut at = owner.address;
    let mut rest = pages * PAGE;
    let mut slot = placed.partition_point(|&(start, length, ..)| start + length <= at);
    while rest > 0 {
        let (start, length, shard, offset) = placed[slot];
        let count = rest.min(start + length - at);
        extents.push(PageExtent {
            address,
            pages: (count / PAGE) as u32,
            shard,
            offset: offset + (at - start),
            huge,
            shared,
        });
        address += count;
        at += count;
        rest -= count;
        slot += 1;
    }
}

/// Hands out bytes to copiers: either one thread outside and the tasks themselves, or several threads outside.
struct Lanes {
    count: u32,
    inside: bool,
    /// Bytes that tasks may still copy themselves.
    inside_budget: u64,
    /// Bytes that the current thread outside may still take.
    outside_budget: u64,
    outside_step: u64,
    thread: u32,
}

impl Lanes {
    fn choose(contents: &[Contents], pieces: &[Vec<Piece>], threads: u32) -> Self {
        let own = |pieces: &Vec<Piece>| -> u64 {
            pieces
                .iter()
                .map(|piece| if let Piece::Own { pages, .. } = piece { pages * PAGE } else { 0 })
                .sum()
        };
        let total: u64 = pieces.iter().map(own).sum();
        let able: u64 = contents.iter().zip(pieces).filter(|(c, _)| c.inside).map(|(_, p)| own(p)).sum();
        let inside = able >= INSIDE_MINIMUM;
        let share =
            if inside && threads > 1 { (total as f64 * (1.0 - OUTSIDE_SHARE)) as u64 } else { u64::MAX };
        // One copier for less than a megabyte: a second thread would cost more than it brings.
        let outside = if inside || total < 1 << 20 { 1 } else { threads.max(1) };
        let step = (total / u64::from(outside)).next_multiple_of(PAGE).max(PAGE);
        Self {
            count: outside + u32::from(inside),
            inside,
            inside_budget: if inside { share.min(able).next_multiple_of(PAGE) } else { 0 },
            outside_budget: if inside { u64::MAX } else { step },
            outside_step: step,
            thread: 0,
        }
    }

    /// Who copies the next `length` bytes, or the first part of them.
    fn take(&mut self, inside: bool, length: u64) -> (Way, u32, u64) {
        if inside && self.inside && self.inside_budget > 0 {
            let length = length.min(self.inside_budget);
            self.inside_budget -= length;
            return (Way::Inside, self.count - 1, length);
        }
        if self.outside_budget == 0 && self.thread + 1 < self.count {
            self.thread += 1;
            self.outside_budget = self.outside_step;
        }
        let last = self.thread + 1 + u32::from(self.inside) >= self.count;
        let length = if last { length } else { length.min(self.outside_budget) };
        self.outside_budget = self.outside_budget.saturating_sub(length);
        (Way::Outside(self.thread), self.thread, length)
    }
}

/// A run of pages in a page file that proved to be all zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ZeroRun {
    /// Page file.
    pub shard: u32,
    /// Place in it.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// Takes the zero runs out of the extents: a page that was never stored restores as an untouched one, which reads the
/// same. Shared ones stay, since who shares a page must share it still.
pub fn drop_zeros(extents: &mut Vec<PageExtent>, zeros: &[ZeroRun]) {
    if zeros.is_empty() {
        return;
    }
    let mut kept = Vec::with_capacity(extents.len());
    for extent in extents.drain(..) {
        if extent.shared {
            kept.push(extent);
            continue;
        }
        let (mut from, end) = (extent.offset, extent.offset + u64::from(extent.pages) * PAGE);
        let part = |from: u64, to: u64| PageExtent {
            address: extent.address + (from - extent.offset),
            pages: ((to - from) / PAGE) as u32,
            offset: from,
            ..extent
        };
        let first =
            zeros.partition_point(|zero| (zero.shard, zero.offset + zero.length) <= (extent.shard, from));
        for zero in zeros[first..].iter().take_while(|zero| zero.shard == extent.shard && zero.offset < end) {
            if zero.offset > from {
                kept.push(part(from, zero.offset));
            }
            from = (zero.offset + zero.length).max(from);
        }
        if from < end {
            kept.push(part(from, end));
        }
    }
    *extents = kept;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::sharing::PageIdentity;

    fn region(start: u64, pages: u64) -> Region {
        Region { start, end: start + pages * PAGE, categories: 0 }
    }

    fn candidates(start: u64, frames: std::ops::Range<u64>) -> Vec<Candidate> {
        let first = frames.start;
        let identity = |frame: u64| PageIdentity::for_test(frame);
        frames.map(|f| Candidate { address: start + (f - first) * PAGE, identity: identity(f) }).collect()
    }

    /// Every page of every extent, as (address, shard, offset).
    fn pages(extents: &[PageExtent]) -> Vec<(u64, u32, u64)> {
        let of = |e: &PageExtent| {
            let e = *e;
            (0..u64::from(e.pages)).map(move |i| (e.address + i * PAGE, e.shard, e.offset + i * PAGE))
        };
        extents.iter().flat_map(of).collect()
    }

    #[test]
    fn a_shared_page_is_stored_once_and_all_refer_to_it() {
        let parent = Contents {
            regions: vec![region(0x10000, 8)],
            candidates: candidates(0x10000, 1..9),
            ..Contents::default()
        };
        // The child wrote its third page, so that frame is its own.
        let mut theirs = candidates(0x10000, 1..9);
        theirs.remove(2);
        let child = Contents { regions: vec![region(0x10000, 8)], candidates: theirs, ..Contents::default() };
        let plan = plan(&[parent, child], 2, vec![]);
        assert_eq!(plan.shards.iter().sum::<u64>(), 9 * PAGE);
        let (parent, child) = (pages(&plan.extents[0]), pages(&plan.extents[1]));
        assert_eq!((parent.len(), child.len()), (8, 8));
        let equal: Vec<bool> = parent.iter().zip(&child).map(|(a, b)| a == b).collect();
        assert_eq!(equal, [true, true, false, true, true, true, true, true]);
        assert!(plan.extents[0].iter().all(|extent| extent.shared == (extent.address != 0x12000)));
    }

    #[test]
    fn every_page_gets_exactly_one_place_whatever_the_lanes() {
        for inside in [false, true] {
            for threads in 1..4 {
                let contents: Vec<_> = (0..5)
                    .map(|i| Contents {
                        regions: vec![region(0x100000, 1000 + i), region(0x9000000, 900)],
                        inside,
                        ..Contents::default()
                    })
                    .collect();
                let plan = plan(&contents, threads, vec![]);
                let mut places: Vec<_> =
                    plan.extents.iter().flat_map(|e| pages(e)).map(|p| (p.1, p.2)).collect();
                places.sort_unstable();
                let count = places.len();
                places.dedup();
                assert_eq!(places.len(), count);
                assert_eq!(count as u64 * PAGE, plan.shards.iter().sum::<u64>());
                let copied: u64 = plan.jobs.iter().flat_map(|j| &j.runs).map(|r| r.length).sum();
                assert_eq!(copied, plan.shards.iter().sum::<u64>());
                assert_eq!(plan.jobs.iter().any(|j| j.way == Way::Inside), inside);
                for job in &plan.jobs {
                    for run in &job.runs {
                        assert!(run.offset + run.length <= plan.shards[job.shard as usize]);
                    }
                }
            }
        }
    }

    #[test]
    fn a_second_batch_goes_behind_the_first() {
        let of =
            |start, inside| Contents { regions: vec![region(start, 5000)], inside, ..Contents::default() };
        let first = plan(&[of(0x100000, false)], 2, vec![]);
        let second = plan(&[of(0x9000000, true)], 2, first.shards.clone());
        let mut places: Vec<_> = [&first, &second].iter().flat_map(|plan| pages(&plan.extents[0])).collect();
        assert_eq!(places.len(), 10_000);
        places.sort_unstable_by_key(|page| (page.1, page.2));
        places.dedup_by_key(|page| (page.1, page.2));
        assert_eq!(places.len(), 10_000);
        assert_eq!(second.shards.iter().sum::<u64>(), 10_000 * PAGE);
    }

    #[test]
    fn zero_runs_leave_the_extents_but_shared_pages_stay() {
        let extent = |address, pages, offset, shared| PageExtent {
            address,
            pages,
            shard: 1,
            offset,
            huge: false,
            shared,
        };
        let mut extents = vec![
            extent(0x1000, 4, 0, false),
            extent(0x9000, 2, 0x4000, true),
            extent(0xf000, 1, 0x6000, false),
        ];
        let zero = |offset, length| ZeroRun { shard: 1, offset, length };
        drop_zeros(&mut extents, &[zero(0x1000, 0x1000), zero(0x3000, 0x4000)]);
        assert_eq!(
            extents,
            [extent(0x1000, 1, 0, false), extent(0x3000, 1, 0x2000, false), extent(0x9000, 2, 0x4000, true),]
        );
    }
}
