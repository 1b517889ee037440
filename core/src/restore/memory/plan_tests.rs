//! Tests of the plan.

use super::*;
use crate::image::records::{PageExtent, Vma};

const HEAP: u64 = 0x5555_0000_0000;

fn map(id: u32, pages: u64) -> MemoryMap {
    let vma = Vma { start: HEAP, end: HEAP + pages * PAGE, prot: 3, ..Vma::default() };
    MemoryMap { id, vmas: vec![vma], ..MemoryMap::default() }
}

fn page_map(mm: u32, extents: &[(u64, u32, u64)]) -> PageMap {
    let extents = extents
        .iter()
        .map(|&(page, pages, offset)| PageExtent {
            address: HEAP + page * PAGE,
            pages,
            offset: offset * PAGE,
            shared: true,
            ..PageExtent::default()
        })
        .collect();
    PageMap { mm, extents, ..PageMap::default() }
}

fn plan(maps: &[MemoryMap], pages: &[PageMap], tree: &[(i32, i32)]) -> MemoryPlan {
    let tree: Vec<_> = tree
        .iter()
        .map(|&(pid, parent)| Parent { pid, parent: (parent != 0).then_some(parent), map: Some(pid as u32) })
        .collect();
    let records = Records { maps, files: &[], segments: &[], pages, tree: &tree };
    MemoryPlan::new(records, &[]).unwrap()
}

#[test]
fn siblings_share_through_their_parent() {
    // 2 and 3 share pages 0-3, 1 has none of them; 3 has grown; 2 has written page 1.
    let maps = [map(1, 2), map(2, 4), map(3, 8)];
    let pages = [page_map(2, &[(0, 1, 0), (1, 1, 50), (2, 2, 2)]), page_map(3, &[(0, 4, 0), (6, 1, 60)])];
    let plan = plan(&maps, &pages, &[(1, 0), (2, 1), (3, 1)]);
    let root = plan.task(1).unwrap();
    assert_eq!(plan.components[root.premap[0]].home, HEAP..HEAP + 8 * PAGE);
    let prefilled: Vec<_> = root
        .prefill
        .iter()
        .map(|fill| (fill.extent.home.start - HEAP) / PAGE..(fill.extent.home.end - HEAP) / PAGE)
        .collect();
    assert_eq!(prefilled, [0..1, 2..4]);
    assert!(root.fill.is_empty());
    // The root's own heap has no contents: nothing of what it premapped stays.
    assert_eq!(root.inherits, [false]);
    let second = plan.task(2).unwrap();
    assert_eq!(second.inherits, [true]);
    assert_eq!(second.fill.len(), 1);
    assert_eq!(second.fill[0].extent.offset, 50 * PAGE);
    let third = plan.task(3).unwrap();
    let filled: Vec<_> = third.fill.iter().map(|fill| fill.extent.offset / PAGE).collect();
    assert_eq!(filled, [1, 60]);
    assert!(third.discard.is_empty());
}

#[test]
fn a_task_between_overwrites_and_discards() {
    // 1 and 3 share pages 0-3; 2, between them, has other contents in page 1 and nothing in page 2.
    let maps = [map(1, 4), map(2, 4), map(3, 4)];
    let pages = [
        page_map(1, &[(0, 4, 0)]),
        page_map(2, &[(0, 1, 0), (1, 1, 90), (3, 1, 3)]),
        page_map(3, &[(0, 4, 0)]),
    ];
    let plan = plan(&maps, &pages, &[(1, 0), (2, 1), (3, 2)]);
    assert!(plan.task(1).unwrap().fill.is_empty());
    let between = plan.task(2).unwrap();
    assert_eq!(between.fill.len(), 1);
    assert!(between.fill[0].over);
    assert_eq!(between.discard, std::slice::from_ref(&(HEAP + 2 * PAGE..HEAP + 3 * PAGE)));
    assert!(plan.task(3).unwrap().fill.is_empty());
    assert!(plan.task(3).unwrap().discard.is_empty());
}

#[test]
fn competing_families_lose_sharing_but_no_contents() {
    let maps = [map(1, 1), map(2, 1), map(3, 1), map(4, 1), map(5, 1), map(6, 1)];
    let pages: Vec<_> = [(2, 7), (3, 7), (4, 8), (5, 8), (6, 8)]
        .into_iter()
        .map(|(id, offset)| page_map(id, &[(0, 1, offset)]))
        .collect();
    let plan = plan(&maps, &pages, &[(1, 0), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1)]);
    assert_eq!(plan.task(1).unwrap().prefill[0].extent.offset, 8 * PAGE);
    for pid in [2, 3] {
        let task = plan.task(pid).unwrap();
        assert_eq!(task.fill[0].extent.offset, 7 * PAGE);
        assert!(task.fill[0].over);
    }
    assert!(plan.task(6).unwrap().fill.is_empty());
}

#[test]
fn damaged_records_are_refused() {
    let maps = [map(1, 1)];
    let tree = [Parent { pid: 1, parent: None, map: Some(1) }];
    let refuse = |pages: &[PageMap], tree: &[Parent]| {
        let records = Records { maps: &maps, files: &[], segments: &[], pages, tree };
        MemoryPlan::new(records, &[]).unwrap_err()
    };
    assert!(matches!(refuse(&[page_map(1, &[(1, 1, 0)])], &tree), MemoryError::Damaged { .. }));
    assert!(matches!(refuse(&[page_map(9, &[(0, 1, 0)])], &tree), MemoryError::Missing { .. }));
    assert!(matches!(refuse(&[page_map(1, &[(0, 1, 0), (0, 1, 5)])], &tree), MemoryError::Damaged { .. }));
    let circle =
        [Parent { pid: 1, parent: Some(2), map: None }, Parent { pid: 2, parent: Some(1), map: None }];
    assert!(matches!(refuse(&[], &circle), MemoryError::Tree { .. }));
}
