//! Hugetlb pages for the time of the tests.

use std::fs;

/// How many pages may be made when they are asked for (Documentation/admin-guide/mm/hugetlbpage.rst).
const LIMIT: &str = "/proc/sys/vm/nr_overcommit_hugepages";
const PAGES: u64 = 64;

/// Allows hugetlb pages beyond those that the machine has set aside, until it is dropped. Counted, not set: another test
/// executable may do the same meanwhile.
#[derive(Debug)]
pub struct HugePages(());

impl HugePages {
    /// None if this is not ours to change.
    pub fn allow() -> Option<Self> {
        change(|pages| pages.saturating_add(PAGES)).map(|()| HugePages(()))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = change(|pages| pages.saturating_sub(PAGES));
    }
}

fn change(new: impl Fn(u64) -> u64) -> Option<()> {
    let now = fs::read_to_string(LIMIT).ok()?.trim().parse().ok()?;
    fs::write(LIMIT, new(now).to_string()).ok()
}
