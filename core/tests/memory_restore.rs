//! Restores hand-made images under a simple tracer: memory, families, threads, and what the restorer sets.
//!
//! The restored tasks run machine code from the image, which compares words of their memory and exits with 0.

#[path = "memory_restore/image.rs"]
mod image;
#[path = "memory_restore/tracer.rs"]
mod tracer;

use image::{Builder, HEAP, PAGE, STACK};
use stasis::image::records::{MappedFile, PathRef, SharedSegment, Vma, VmaAdvice, VmaKind};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Mutex;
use std::time::Instant;
use tracer::{Restored, restore};

const RW: u32 = 3;
/// The tracer waits for any child of this process: one test at a time.
static ONE: Mutex<()> = Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn assert_good(restored: &[Restored]) {
    for task in restored {
        assert_eq!(
            task.exit,
            Some(0),
            "task {}: first wrong word, or what failed: {:?}",
            task.pid,
            task.failure
        );
    }
}

#[test]
fn a_family_is_shared_and_differs_where_it_differed() {
    let _one = alone();
    let mut image = Builder::new(&[(1, 0), (2, 1), (3, 1), (4, 3)]);
    for task in 1..=4_u32 {
        // The heaps differ in size; a part of the pages is everybody's, a part is of 2 and 3 alone.
        let pages = 300 + 100 * u64::from(task);
        image.vma(task, Vma { start: HEAP, end: HEAP + pages * PAGE, prot: RW, ..Vma::default() });
        image.pages(task, HEAP, 100, 0x1_0000);
        if task == 2 || task == 3 {
            image.pages(task, HEAP + 100 * PAGE, 100, 0x2_0000);
        }
        // A hole in the middle of the family for 4, other contents for 3.
        match task {
            4 => {
                image.hole(task, HEAP + 50 * PAGE);
                image.expect(task, HEAP + 50 * PAGE, 0);
                image.expect(task, HEAP + 150 * PAGE, 0);
            }
            3 => image.pages(task, HEAP + 60 * PAGE, 2, 0x9_0000),
            _ => {}
        }
        image.pages(task, HEAP + 250 * PAGE, 1, 0x5_0000 + u64::from(task) * 0x1000);
    }
    let restored = restore(&image);
    assert_good(&restored);
    // Private_* against Shared_* of the heap: the family's pages are the same frames.
    let shared = |task: &Restored| task.smaps_sum("Shared_Dirty:") + task.smaps_sum("Shared_Clean:");
    assert!(shared(&restored[1]) >= 190 * 4, "{} kB shared", shared(&restored[1]));
    for task in &restored {
        let heap = format!("{HEAP:x}-{:x} rw-p", HEAP + (300 + 100 * task.map as u64) * PAGE);
        assert!(task.maps.contains(&heap), "{heap} in\n{}", task.maps);
    }
}

/// Whether the kernel names anonymous memory (CONFIG_ANON_VMA_NAME): EINVAL without it.
fn can_name() -> bool {
    // SAFETY: names no memory at all.
    unsafe { libc::prctl(0x5356_4d41, 0, 0, 0, c"a".as_ptr()) == 0 }
}

#[test]
fn one_task_with_everything() {
    let _one = alone();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[0x11; 4 * PAGE as usize]).unwrap();
    let mut image = Builder::new(&[(1, 0), (2, 1)]);
    let path = PathRef { path: file.path().as_os_str().as_bytes().to_vec(), ..PathRef::default() };
    image.files.push(MappedFile { id: 1, path: Some(path), writable: true, handle: 0 });
    image.segments.push(SharedSegment { id: 1, size: 4 * PAGE, inode: 5, huge_shift: 0 });
    let low = 0x1234_0000_0000;
    let many = 0x2222_2220_0000;
    let thp = 0x3333_4000_0000;
    for task in [1, 2] {
        let private = Vma { file: 1, prot: 1, kind: VmaKind::PrivateFile.into(), ..Vma::default() };
        image.vma(task, Vma { start: low, end: low + 2 * PAGE, ..private.clone() });
        image.expect(task, low, 0x1111_1111_1111_1111);
        image.pages(task, low + PAGE, 1, 0x7_0000);
        let shared =
            Vma { file: 1, prot: 1, may_write: true, kind: VmaKind::SharedFile.into(), ..Vma::default() };
        image.vma(task, Vma { start: low + 8 * PAGE, end: low + 10 * PAGE, offset: PAGE, ..shared });
        image.expect(task, low + 8 * PAGE, 0x1111_1111_1111_1111);
        let segment = Vma { file: 1, prot: RW, kind: VmaKind::SharedAnonymous.into(), ..Vma::default() };
        image.vma(task, Vma { start: low + 20 * PAGE, end: low + 22 * PAGE, offset: 2 * PAGE, ..segment });
        image.expect(task, low + 21 * PAGE, 0x6_0003);
    }
    image.segment_pages(1, 0, 4, 0x6_0000);
    // Alternating protections, with contents in every other mapping; no access to every eighth.
    for index in 0..2000_u64 {
        let prot = match index % 8 {
            0 => 0,
            odd if odd % 2 == 1 => RW,
            _ => 1,
        };
        let start = many + index * PAGE;
        image.vma(1, Vma { start, end: start + PAGE, prot, ..Vma::default() });
        if index % 2 == 0 {
            image.pages_unchecked(1, start, 1, 0x10_0000 + index);
        }
        if prot != 0 && index % 2 == 0 {
            image.expect(1, start, 0x10_0000 + index);
        }
    }
    let advice = VmaAdvice::Hugepage as u32 | VmaAdvice::Dontdump as u32;
    image.vma(1, Vma { start: thp, end: thp + (4 << 20), prot: RW, advice, ..Vma::default() });
    image.huge_pages(1, thp, 1024, 0x20_0000);
    let reserve = Vma { start: 0x4000_0000_0000, end: 0x4200_0000_0000, prot: 0, ..Vma::default() };
    image.vma(1, Vma { advice: VmaAdvice::Noreserve as u32, ..reserve });
    let named = Vma { start: 0x4300_0000_0000, end: 0x4300_0000_2000, prot: RW, ..Vma::default() };
    // Not every kernel is built with names for anonymous memory.
    let name = if can_name() { "a name" } else { "" };
    image.vma(1, Vma { name: name.into(), advice: VmaAdvice::Locked as u32, ..named });
    image.threads(1, 4);
    let restored = restore(&image);
    assert_good(&restored);
    let root = &restored[0];
    assert!(root.smaps_sum("AnonHugePages:") >= 4 << 10, "{} kB huge", root.smaps_sum("AnonHugePages:"));
    for line in [
        format!("{many:x}-{:x} ---p", many + PAGE),
        format!("{STACK:x}-{:x} rw-p", STACK + 16 * PAGE),
        "400000000000-420000000000 ---p".to_owned(),
        "430000000000-430000002000 rw-p".to_owned(),
        format!("{:x}-{:x} r--s 00001000", low + 8 * PAGE, low + 10 * PAGE),
    ] {
        assert!(root.maps.contains(&line), "{line} in\n{}", root.maps);
    }
    assert!(name.is_empty() || root.maps.contains("[anon:a name]"), "{}", root.maps);
    assert!(root.maps.contains("[vdso]") && root.maps.contains("[vvar]"), "{}", root.maps);
    assert!(root.maps.contains("[stack]"), "{}", root.maps);
    assert_eq!(root.maps.lines().count(), 2000 + 17, "{}", root.maps);
    assert!(root.names.iter().any(|name| name == "worker-3"), "{:?}", root.names);
    for queue in ["SigPnd:\t0000000200000000", "ShdPnd:\t0000000200000000"] {
        assert!(root.status.contains(queue), "{}", root.status);
    }
}

#[test]
fn a_failure_names_its_step() {
    let _one = alone();
    let mut image = Builder::new(&[(1, 0)]);
    image.tasks[0].threads[0].sched_policy = 77;
    let restored = restore(&image);
    let failure = restored[0].failure.as_ref().unwrap();
    assert!(failure.contains("scheduling policy") && failure.contains("Invalid argument"), "{failure}");
}

/// Prints the times of three runs.
fn measure(what: &str, image: &Builder) {
    let _one = alone();
    for _ in 0..3 {
        let start = Instant::now();
        let restored = restore(image);
        assert_good(&restored);
        let steps = restored[0].steps.iter().map(|(step, time)| format!("{step} {time:.1?}"));
        println!("{what}: {:.1?} in all; {}", start.elapsed(), steps.collect::<Vec<_>>().join(", "));
    }
}

// `cargo test --release -p stasis --test memory_restore -- --ignored --nocapture --test-threads 1 speed`

const START: u64 = 0x1000_0000_0000;

#[test]
#[ignore = "measures, and needs 5 GiB"]
fn speed_of_small_pages() {
    let mut image = Builder::new(&[(1, 0)]);
    image.vma(1, Vma { start: START, end: START + (2 << 30), prot: RW, ..Vma::default() });
    image.pages_unchecked(1, START, 2 << 18, 0x1_0000);
    measure("2 GiB of 4 KiB pages", &image);
}

#[test]
#[ignore = "measures, and needs 5 GiB"]
fn speed_of_huge_pages() {
    let mut image = Builder::new(&[(1, 0)]);
    let advice = VmaAdvice::Hugepage as u32;
    image.vma(1, Vma { start: START, end: START + (2 << 30), prot: RW, advice, ..Vma::default() });
    image.huge_pages(1, START, 2 << 18, 0x1_0000);
    measure("2 GiB of huge pages", &image);
}

#[test]
#[ignore = "measures"]
fn speed_of_mappings() {
    for (what, stride) in [("20,000 mappings side by side", 1), ("20,000 mappings apart", 2)] {
        let mut image = Builder::new(&[(1, 0)]);
        for index in 0..20_000_u64 {
            let prot = if index % 2 == 0 { RW } else { 1 };
            let at = START + index * stride * PAGE;
            image.vma(1, Vma { start: at, end: at + PAGE, prot, ..Vma::default() });
            image.pages_unchecked(1, at, 1, index);
        }
        measure(what, &image);
    }
}

#[test]
#[ignore = "measures"]
fn speed_of_threads() {
    let mut image = Builder::new(&[(1, 0)]);
    image.threads(1, 999);
    measure("1,000 threads", &image);
}

#[test]
#[ignore = "measures"]
fn speed_of_tasks() {
    let tree: Vec<_> = (1..=300).map(|task| (task, u32::from(task != 1))).collect();
    let mut image = Builder::new(&tree);
    for &(task, _) in &tree {
        image.vma(task, Vma { start: HEAP, end: HEAP + (1 << 20), prot: RW, ..Vma::default() });
        image.pages_unchecked(task, HEAP, 256, 0x1_0000 + u64::from(task) * 256);
    }
    measure("300 tasks of 1 MiB", &image);
}
