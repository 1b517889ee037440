//! Page families: pages that several tasks share after fork.
//!
//! Two memory maps share a page when both have the same page of the same page file at the same address. Such pages are
//! filled in the lowest common ancestor of their tasks, before it forks.

use super::arena::subtract;
use super::region::{Backing, Region};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

/// Pages with contents, and where those are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Home addresses (offsets, for a shared segment).
    pub home: Range<u64>,
    /// Page file.
    pub shard: u32,
    /// Offset in it.
    pub offset: u64,
    /// Was backed by transparent huge pages.
    pub huge: bool,
}

impl Extent {
    /// Equal for extents that have the same contents at the same address.
    fn key(&self) -> (u32, i64) {
        (self.shard, self.home.start.wrapping_sub(self.offset) as i64)
    }

    /// The part of it in `range`, which must overlap it.
    pub fn part(&self, range: &Range<u64>) -> Self {
        let home = self.home.start.max(range.start)..self.home.end.min(range.end);
        Self { offset: self.offset + (home.start - self.home.start), home, ..*self }
    }
}

/// Regions of several memory maps that overlap and map the same: an ancestor maps them as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Component {
    /// Home addresses of the union.
    pub home: Range<u64>,
    /// What it maps.
    pub backing: Backing,
    /// Advice that all its regions share.
    pub huge: Option<bool>,
}

/// Joins the regions of all memory maps to components; the second result has the component of each region of each map.
/// `shareable` tells which private backings an ancestor can map at all.
pub fn components(
    maps: &BTreeMap<u32, Vec<Region>>,
    shareable: impl Fn(Backing) -> bool,
) -> (Vec<Component>, BTreeMap<u32, Vec<Option<usize>>>) {
    let mut order: Vec<(&Region, u32, usize)> = maps
        .iter()
        .flat_map(|(&map, regions)| regions.iter().enumerate().map(move |(at, region)| (region, map, at)))
        .filter(|(region, ..)| region.contents && region.backing.is_private() && shareable(region.backing))
        .collect();
    order.sort_by_key(|(region, map, _)| (region.backing, region.home.start, *map));
    let mut of: BTreeMap<u32, Vec<Option<usize>>> =
        maps.iter().map(|(&map, regions)| (map, vec![None; regions.len()])).collect();
    let mut components: Vec<Component> = Vec::new();
    for (region, map, at) in order {
        match components.last_mut() {
            Some(last) if last.backing == region.backing && region.home.start < last.home.end => {
                last.home.end = last.home.end.max(region.home.end);
                if last.huge != region.huge {
                    last.huge = None;
                }
            }
            _ => components.push(Component {
                home: region.home.clone(),
                backing: region.backing,
                huge: region.huge,
            }),
        }
        if let Some(slot) = of.get_mut(&map).and_then(|slots| slots.get_mut(at)) {
            *slot = Some(components.len() - 1);
        }
    }
    (components, of)
}

/// A shared extent and the memory maps that have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shared {
    /// The pages.
    pub extent: Extent,
    /// Ids of memory maps, at least two.
    pub maps: BTreeSet<u32>,
}

/// Splits extents where sharing differs, and gives the pieces that at least two maps have.
pub fn shared<'a>(extents: impl Iterator<Item = (u32, &'a Extent)>) -> Vec<Shared> {
    /// Address, whether the extent begins there, its map, itself.
    type Event<'e> = (u64, bool, u32, &'e Extent);
    let mut groups: HashMap<(u32, i64), Vec<Event<'_>>> = HashMap::new();
    for (map, extent) in extents {
        let group = groups.entry(extent.key()).or_default();
        group.push((extent.home.start, true, map, extent));
        group.push((extent.home.end, false, map, extent));
    }
    let mut pieces = Vec::new();
    for mut events in groups.into_values() {
        // Ends before starts: adjoining extents of one map must not cancel each other.
        events.sort_by_key(|&(at, starts, map, _)| (at, starts, map));
        let mut present: BTreeMap<u32, &Extent> = BTreeMap::new();
        let mut since = 0;
        for (at, starts, map, extent) in events {
            if at > since
                && present.len() > 1
                && let Some(whole) = present.values().next()
            {
                let extent = whole.part(&(since..at));
                pieces.push(Shared { extent, maps: present.keys().copied().collect() });
            }
            since = at;
            if starts {
                present.insert(map, extent);
            } else {
                present.remove(&map);
            }
        }
    }
    pieces.sort_by_key(|piece| (piece.extent.home.start, piece.extent.shard, piece.extent.offset));
    pieces
}

/// Lays `new` over `state` (both sorted and disjoint), as writing over pages does.
pub fn overlay(state: &[Extent], new: &[Extent]) -> Vec<Extent> {
    let covered: Vec<_> = new.iter().map(|extent| extent.home.clone()).collect();
    let mut result: Vec<Extent> = state
        .iter()
        .flat_map(|extent| subtract(&extent.home, &covered).into_iter().map(|rest| extent.part(&rest)))
        .chain(new.iter().cloned())
        .collect();
    result.sort_by_key(|extent| extent.home.start);
    result
}

/// An extent to fill; `over` tells that a page may be there already, with other contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fill {
    /// What goes where.
    pub extent: Extent,
    /// Over something.
    pub over: bool,
}

/// What of `wanted` the pages of `state` do not already have (both sorted and disjoint).
pub fn missing(wanted: &[Extent], state: &[Extent]) -> Vec<Fill> {
    let mut fills = Vec::new();
    for extent in wanted {
        let first = state.partition_point(|present| present.home.end <= extent.home.start);
        let mut at = extent.home.start;
        for present in state[first..].iter().take_while(|present| present.home.start < extent.home.end) {
            let common = present.part(&extent.home);
            if at < common.home.start {
                fills.push(Fill { extent: extent.part(&(at..common.home.start)), over: false });
            }
            if common.key() != extent.key() {
                fills.push(Fill { extent: extent.part(&common.home), over: true });
            }
            at = common.home.end;
        }
        if at < extent.home.end {
            fills.push(Fill { extent: extent.part(&(at..extent.home.end)), over: false });
        }
    }
    fills
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, end: u64, offset: u64) -> Extent {
        Extent { home: start..end, shard: 0, offset, huge: false }
    }

    #[test]
    fn extents_are_split_where_sharing_differs() {
        let (one, two, three) = (extent(0, 8, 100), extent(4, 12, 104), extent(4, 6, 50));
        let pieces = shared([(1, &one), (2, &two), (3, &three)].into_iter());
        assert_eq!(pieces, [Shared { extent: extent(4, 8, 104), maps: [1, 2].into() }]);
    }

    #[test]
    fn three_maps_share_in_parts() {
        let (one, two, three) = (extent(0, 8, 0), extent(0, 8, 0), extent(4, 8, 4));
        let pieces = shared([(1, &one), (2, &two), (3, &three)].into_iter());
        let seen: Vec<_> = pieces.iter().map(|piece| (piece.extent.home.clone(), piece.maps.len())).collect();
        assert_eq!(seen, [(0..4, 2), (4..8, 3)]);
    }

    #[test]
    fn missing_tells_what_is_written_over() {
        let state = [extent(0, 4, 0), extent(4, 8, 50)];
        let fills = missing(&[extent(0, 10, 0)], &state);
        assert_eq!(
            fills,
            [Fill { extent: extent(4, 8, 4), over: true }, Fill { extent: extent(8, 10, 8), over: false }]
        );
    }

    #[test]
    fn overlay_replaces() {
        let state = overlay(&[extent(0, 8, 0)], &[extent(2, 4, 90)]);
        assert_eq!(state, [extent(0, 2, 0), extent(2, 4, 90), extent(4, 8, 4)]);
    }
}
