//! Which private pages several memory descriptors share since a fork: they map the same page frame.
//!
//! Only the root of the initial user namespace sees frame numbers (pagemap, bits 0-54); bit 56 says that a page is mapped
//! exactly once and so needs no look. Frames stay where they are only while the tree is frozen, hence the comparison
//! happens then. A page that moves between two looks (compaction) is merely stored twice.

use super::{MemoryError, PAGE, scan::PageMapFile};
use std::collections::HashMap;

const FRAME: u64 = (1 << 55) - 1;
const EXCLUSIVE: u64 = 1 << 56;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;
/// Entries read at once.
const WINDOW: usize = 16 * 1024;

/// What identifies a page of contents: a frame, or a swap slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageIdentity(u64);

impl PageIdentity {
    fn of_entry(entry: u64) -> Option<Self> {
        let frame = entry & FRAME;
        let interesting = entry & (PRESENT | SWAPPED) != 0 && entry & EXCLUSIVE == 0 && frame != 0;
        interesting.then_some(Self(frame | entry & SWAPPED))
    }

    #[cfg(test)]
    pub(crate) fn for_test(number: u64) -> Self {
        Self(number)
    }
}

/// A run of pages that may be shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Address of the page.
    pub address: u64,
    /// Its identity.
    pub identity: PageIdentity,
}

/// The pages of `[start, end)` that are not mapped exclusively.
pub fn candidates(
    map: &PageMapFile,
    start: u64,
    end: u64,
    found: &mut Vec<Candidate>,
) -> Result<(), MemoryError> {
    let mut window = vec![0_u64; WINDOW.min(((end - start) / PAGE) as usize)];
    let mut address = start;
    while address < end {
        let count = window.len().min(((end - address) / PAGE) as usize);
        map.entries(address, &mut window[..count])?;
        let pages = window[..count].iter().enumerate();
        found.extend(pages.filter_map(|(index, &entry)| {
            Some(Candidate {
                address: address + index as u64 * PAGE,
                identity: PageIdentity::of_entry(entry)?,
            })
        }));
        address += count as u64 * PAGE;
    }
    Ok(())
}

/// Who stores a page that several have: the first memory descriptor in which it is seen.
#[derive(Debug, Default)]
pub struct Owners {
    first: HashMap<PageIdentity, Place, BuildFrameHasher>,
}

/// A page of a memory descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Index of the memory descriptor.
    pub mm: usize,
    /// Address of the page.
    pub address: u64,
}

impl Owners {
    /// The place that stores this page: `place` itself if nobody had it before.
    pub fn owner(&mut self, identity: PageIdentity, place: Place) -> Place {
        *self.first.entry(identity).or_insert(place)
    }
}

/// Frame numbers are unique and spread well enough by one multiplication; SipHash would cost more than the scan.
#[derive(Debug, Default, Clone, Copy)]
struct FrameHasher(u64);
type BuildFrameHasher = std::hash::BuildHasherDefault<FrameHasher>;

impl std::hash::Hasher for FrameHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }
    fn write_u64(&mut self, number: u64) {
        // 2^64 / golden ratio (Knuth's multiplicative hashing); the high bits are the good ones.
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(26);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exclusive_absent_and_hidden_pages_are_no_candidates() {
        assert_eq!(PageIdentity::of_entry(PRESENT | EXCLUSIVE | 77), None);
        assert_eq!(PageIdentity::of_entry(77), None);
        assert_eq!(PageIdentity::of_entry(PRESENT), None);
        assert_eq!(PageIdentity::of_entry(PRESENT | 77), Some(PageIdentity(77)));
        assert_ne!(PageIdentity::of_entry(SWAPPED | 77), PageIdentity::of_entry(PRESENT | 77));
    }

    #[test]
    fn the_first_to_show_a_page_owns_it() {
        let mut owners = Owners::default();
        let (a, b) = (Place { mm: 0, address: 4096 }, Place { mm: 1, address: 4096 });
        assert_eq!(owners.owner(PageIdentity(5), a), a);
        assert_eq!(owners.owner(PageIdentity(5), b), a);
        assert_eq!(owners.owner(PageIdentity(6), b), b);
    }
}
