//! The flattened no_std programs that run inside other tasks (made by `core/build.rs`).

/// A page-aligned piece of a blob that wants a protection of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Offset from the blob's start; a multiple of the page size.
    pub offset: usize,
    /// Length; a multiple of the page size.
    pub len: usize,
    /// `PROT_*` bits of mmap(2).
    pub protection: i32,
}

/// A program as it lies in memory, position independent but for [`Blob::relocations`].
#[derive(Debug)]
pub struct Blob {
    /// The bytes, loaded as if at address 0; whole pages.
    pub image: &'static [u8],
    /// Offset of the first instruction.
    pub entry: usize,
    /// Offsets of 64-bit words to which the load address must be added (R_X86_64_RELATIVE).
    pub relocations: &'static [u32],
    /// What to map where.
    pub segments: &'static [Segment],
}

impl Blob {
    /// The image as it must look when it is loaded at `base`.
    pub fn at(&self, base: u64) -> Vec<u8> {
        let mut image = self.image.to_vec();
        for &offset in self.relocations {
            if let Some(word) = image.get_mut(offset as usize..).and_then(|rest| rest.first_chunk_mut::<8>())
            {
                *word = u64::from_le_bytes(*word).wrapping_add(base).to_le_bytes();
            }
        }
        image
    }
}

/// What runs inside a task while it is dumped.
pub static PARASITE: Blob = include!(concat!(env!("OUT_DIR"), "/parasite.rs"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parasite_has_code_at_its_entry_and_no_writable_segment() {
        let entry = PARASITE.entry;
        let holds = |s: &&Segment| (s.offset..s.offset + s.len).contains(&entry);
        assert_eq!(PARASITE.segments.iter().find(holds).map(|s| s.protection & 4), Some(4));
        assert_eq!(PARASITE.image.len() % 4096, 0);
    }

    #[test]
    fn relocation_adds_the_base_and_nothing_else() {
        let (low, high) = (PARASITE.at(0), PARASITE.at(0x10_0000));
        let changed = low.chunks(8).zip(high.chunks(8)).filter(|(a, b)| a != b).count();
        assert_eq!(changed, PARASITE.relocations.len());
    }
}
