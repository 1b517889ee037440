//! Where memory is prepared before it can go home.
//!
//! Homes of all tasks are rounded to 1 GiB and joined to clusters; each cluster gets one displacement, a multiple of
//! 1 GiB, the same in every task. So an arena is congruent to its home, and mremap(2) moves whole page-table levels
//! (move_page_tables in mm/mremap.c); what an ancestor prepares is at the right place in its descendants; and neighbours
//! at home are neighbours in the arena.

use super::MemoryError;
use std::ops::Range;

/// Arenas are congruent to homes modulo this.
pub const GRAIN: u64 = 1 << 30;
/// Arenas lie here: well above any non-PIE executable, well below the mappings, stack and heap that the kernel places.
const ZONE: Range<u64> = 0x0100_0000_0000..0x7fff_0000_0000;
/// Room that is left free around the mappings of the restoring process, for those it makes later.
const MARGIN: u64 = 64 << 30;

/// Maps homes to arenas.
#[derive(Debug, Clone, Default)]
pub struct Arenas {
    /// (cluster, displacement), ascending.
    clusters: Vec<(Range<u64>, u64)>,
    taken: Vec<Range<u64>>,
}

impl Arenas {
    /// Places an arena for each home, clear of all homes and of `occupied`.
    pub fn new(homes: &[Range<u64>], occupied: &[Range<u64>]) -> Result<Self, MemoryError> {
        let grains: Vec<_> = homes
            .iter()
            .filter(|home| !home.is_empty())
            .map(|home| home.start / GRAIN * GRAIN..home.end.next_multiple_of(GRAIN))
            .collect();
        let clusters = join(grains);
        let around = occupied.iter().map(|range| {
            range.start.saturating_sub(MARGIN) / GRAIN * GRAIN
                ..range.end.saturating_add(MARGIN).min(u64::MAX - GRAIN).next_multiple_of(GRAIN)
        });
        let mut arenas =
            Self { taken: join(clusters.iter().cloned().chain(around).collect()), clusters: Vec::new() };
        // Large ones first: small ones fit everywhere.
        let mut order = clusters;
        order.sort_by_key(|cluster| std::cmp::Reverse(cluster.end - cluster.start));
        for cluster in order {
            let place = arenas
                .reserve(cluster.end - cluster.start)
                .ok_or(MemoryError::NoRoom { home: cluster.start, size: cluster.end - cluster.start })?;
            arenas.clusters.push((cluster.clone(), place.wrapping_sub(cluster.start)));
        }
        arenas.clusters.sort_by_key(|(cluster, _)| cluster.start);
        Ok(arenas)
    }

    /// Takes a range of addresses that nobody else gets; a multiple of [`GRAIN`] is used up.
    pub fn reserve(&mut self, size: u64) -> Option<u64> {
        let size = size.checked_next_multiple_of(GRAIN)?;
        let mut start = ZONE.start;
        let mut at = self.taken.len();
        for (index, taken) in self.taken.iter().enumerate() {
            if taken.start >= start.checked_add(size)? {
                at = index;
                break;
            }
            start = start.max(taken.end);
        }
        if start.checked_add(size)? > ZONE.end {
            return None;
        }
        // Neighbours are joined, so that the list stays short.
        match self.taken.get_mut(at.wrapping_sub(1)) {
            Some(before) if before.end == start => before.end = start + size,
            _ => self.taken.insert(at, start..start + size),
        }
        Some(start)
    }

    /// Arena of a home address; the address itself where no arena was asked for.
    pub fn of(&self, home: u64) -> u64 {
        let at = self.clusters.partition_point(|(cluster, _)| cluster.end <= home);
        match self.clusters.get(at) {
            Some((cluster, displacement)) if cluster.start <= home => home.wrapping_add(*displacement),
            _ => home,
        }
    }

    /// Arena of a range of homes.
    pub fn range(&self, home: &Range<u64>) -> Range<u64> {
        let start = self.of(home.start);
        start..start + (home.end - home.start)
    }
}

/// Sorts ranges and joins those that overlap or touch.
pub fn join(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// What of `whole` is in none of `parts`, which are sorted and disjoint.
pub fn subtract(whole: &Range<u64>, parts: &[Range<u64>]) -> Vec<Range<u64>> {
    let first = parts.partition_point(|part| part.end <= whole.start);
    let mut rest = Vec::new();
    let mut start = whole.start;
    for part in parts[first..].iter().take_while(|part| part.start < whole.end) {
        if start < part.start {
            rest.push(start..part.start);
        }
        start = start.max(part.end);
    }
    if start < whole.end {
        rest.push(start..whole.end);
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arenas_are_congruent_and_clear() {
        let homes =
            [0x40_0000..0x50_0000, 0x5555_5555_4000..0x5555_5557_0000, 0x7fff_0000_0000..0x7fff_ffff_f000];
        let occupied = [0x7f00_0000_0000..0x7f00_0010_0000, 0x0100_0000_0000..0x0100_0000_1000];
        let arenas = Arenas::new(&homes, &occupied).unwrap();
        let placed: Vec<_> = homes.iter().map(|home| arenas.range(home)).collect();
        for (home, arena) in homes.iter().zip(&placed) {
            assert_eq!(home.start % GRAIN, arena.start % GRAIN);
            for other in homes.iter().chain(&occupied) {
                assert!(arena.end <= other.start || other.end <= arena.start, "{arena:x?} over {other:x?}");
            }
        }
        for (index, one) in placed.iter().enumerate() {
            assert!(placed[index + 1..].iter().all(|two| one.end <= two.start || two.end <= one.start));
        }
    }

    #[test]
    fn a_home_that_fills_the_address_space_is_refused() {
        let home = 0x1_0000..0x6000_0000_0000;
        assert!(matches!(Arenas::new(std::slice::from_ref(&home), &[]), Err(MemoryError::NoRoom { .. })));
    }

    #[test]
    fn subtract_leaves_the_gaps() {
        assert_eq!(subtract(&(0..10), &[1..2, 4..6, 9..20]), [0..1, 2..4, 6..9]);
        let whole = 0..10;
        assert_eq!(subtract(&whole, &[]), std::slice::from_ref(&whole));
        assert!(subtract(&(3..5), std::slice::from_ref(&whole)).is_empty());
    }
}
