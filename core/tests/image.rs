//! The image format: what is written is read back, and what was changed since is refused.

use proptest::prelude::*;
use stasis::image::{
    BLOBS_FILE, CORE_FILE, Damage, Fault, Image, ImageError, ImageWriter, MANIFEST_FILE, ShardChecksums,
    checksum_shards, records::*,
};
use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::{FileExt, PermissionsExt},
    path::Path,
};

fn header() -> Header {
    Header {
        format: stasis::image::FORMAT_VERSION,
        root_pid: 1,
        page_size: 4096,
        plugins: vec![PluginUse { name: "p".into(), ..Default::default() }],
        ..Default::default()
    }
}

fn path(path: &str) -> Option<PathRef> {
    Some(PathRef { path: path.into(), ..Default::default() })
}

fn task(pid: i32, ppid: i32) -> Task {
    let thread = Thread { tid: pid, registers: vec![0; 216], name: b"t".to_vec(), ..Default::default() };
    Task { pid, ppid, mm: 1, files: 1, exe: path("/bin/t"), threads: vec![thread], ..Default::default() }
}

fn vma(start: u64, end: u64) -> Vma {
    Vma { start, end, prot: 3, ..Default::default() }
}

/// The parts of a small sound image, for tests to spoil.
struct Parts {
    header: Header,
    tasks: Vec<Task>,
    map: MemoryMap,
    pages: PageMap,
    table: DescriptorTable,
    handles: Vec<Handle>,
    objects: Vec<Object>,
}

impl Parts {
    fn new() -> Self {
        let extent = |address, offset| PageExtent { address, pages: 2, offset, ..Default::default() };
        let descriptor = |number, handle| Descriptor { number, handle, cloexec: false };
        Self {
            header: header(),
            tasks: vec![task(1, 0), task(2, 1)],
            map: MemoryMap {
                id: 1,
                vmas: vec![vma(0x1000, 0x4000), vma(0x4000, 0x6000), vma(0x9000, 0xb000)],
                ..Default::default()
            },
            // The first one spans two mappings.
            pages: PageMap {
                mm: 1,
                extents: vec![extent(0x3000, 0), extent(0x9000, 0x2000)],
                ..PageMap::default()
            },
            table: DescriptorTable { id: 1, descriptors: vec![descriptor(0, 1), descriptor(7, 2)] },
            handles: vec![
                Handle { id: 1, path: path("/dev/null"), ..Default::default() },
                Handle { id: 2, object: 1, ..Default::default() },
            ],
            objects: vec![Object { id: 1, plugin: "p".into(), handles: vec![2], ..Default::default() }],
        }
    }

    fn write(&self, directory: &Path) -> Result<(), ImageError> {
        let writer = ImageWriter::create(directory)?;
        writer.write(&self.header)?;
        self.tasks.iter().try_for_each(|task| writer.write(task))?;
        writer.write(&self.map)?;
        writer.write_page_map(&self.pages)?;
        writer.write(&self.table)?;
        self.handles.iter().try_for_each(|handle| writer.write(handle))?;
        self.objects.iter().try_for_each(|object| writer.write(object))?;
        let mut shard = writer.shard(0)?;
        shard.write_all(&[7; 0x4000]).expect("page file");
        for piece in ["some ", "piece", "s"] {
            writer.append_blob("p", "blob", piece.as_bytes())?;
        }
        let shards = checksum_shards(&[(0, &shard, 0x4000)], 2)?;
        writer.finish(shards, false).map(drop)
    }

    fn fault(&self) -> String {
        let directory = tempfile::tempdir().unwrap();
        self.write(directory.path()).unwrap();
        let seen = Image::inspect(directory.path()).unwrap().fault.expect("inspect notes the fault");
        match Image::open(directory.path()) {
            Err(ImageError::Inconsistent { fault, .. }) => {
                assert_eq!(*fault, seen);
                Fault::to_string(&fault)
            }
            other => panic!("expected a fault, got {other:?}"),
        }
    }
}

#[test]
fn round_trip() {
    let directory = tempfile::tempdir().unwrap();
    let parts = Parts::new();
    parts.write(directory.path()).unwrap();
    let image = Image::open(directory.path()).unwrap();
    assert_eq!(image.header, parts.header);
    assert_eq!(image.tasks, parts.tasks);
    assert_eq!(image.memory_maps[&1], parts.map);
    assert_eq!(image.page_maps[&1], parts.pages);
    assert_eq!(image.tables[&1], parts.table);
    assert_eq!(image.handles.values().cloned().collect::<Vec<_>>(), parts.handles);
    image.verify_pages(2).unwrap();
    let mut text = String::new();
    image.blob_reader("p", "blob").unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "some pieces");
    assert_eq!(image.blob_reader("p", "never").unwrap().read(&mut [0; 9]).unwrap(), 0);
    assert_eq!(image.blob_list().unwrap(), [("p", "blob", 11)]);
    for entry in fs::read_dir(directory.path()).unwrap() {
        assert_eq!(entry.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn big_blobs_are_read_by_position() {
    let directory = tempfile::tempdir().unwrap();
    let data: Vec<u8> = (0..3_500_000u64).map(|i| ((i * i) >> 3) as u8).collect();
    let writer = ImageWriter::create(directory.path()).unwrap();
    writer.write(&header()).unwrap();
    writer.write(&Task { zombie: true, ..task(1, 0) }).unwrap();
    writer.append_blob("p", "a", &data).unwrap();
    for piece in data.chunks(300_000) {
        writer.append_blob("p", "b", piece).unwrap();
        writer.append_blob("q", "b", &piece[..9]).unwrap();
    }
    writer.finish(Vec::new(), false).unwrap();
    let image = Image::open(directory.path()).unwrap();
    for name in ["a", "b"] {
        let mut back = Vec::new();
        image.blob_reader("p", name).unwrap().read_to_end(&mut back).unwrap();
        assert!(back == data, "{name}");
    }
    let mut store = image.blobs().unwrap();
    let mut buffer = [0; 10];
    assert_eq!(store.read_at("p", "a", 3_499_995, &mut buffer).unwrap(), 5);
    assert_eq!(buffer[..5], data[3_499_995..]);
    assert_eq!(store.read_at("p", "a", 1 << 40, &mut buffer).unwrap(), 0);
    assert_eq!(store.length("q", "b"), 9 * 12);
}

#[test]
fn unfinished_images_leave_nothing_and_are_refused() {
    let outer = tempfile::tempdir().unwrap();
    let directory = outer.path().join("image");
    drop(ImageWriter::create(&directory).unwrap());
    assert!(!directory.exists());

    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("dump.log"), "kept").unwrap();
    let writer = ImageWriter::create(&directory).unwrap();
    writer.shard(3).unwrap();
    assert!(matches!(Image::open(&directory), Err(ImageError::Incomplete { .. })));
    // Killed: no destructor runs.
    std::mem::forget(writer);
    Parts::new().write(&directory).unwrap();
    assert!(!directory.join("pages-3.img").exists());
    assert!(matches!(ImageWriter::create(&directory), Err(ImageError::AlreadyComplete { .. })));
    Image::open(&directory).unwrap();
    assert_eq!(fs::read_to_string(directory.join("dump.log")).unwrap(), "kept");
}

#[test]
fn errors_name_file_errno_and_remedy() {
    let error = ImageWriter::create(Path::new("/proc/self/nothing")).err().unwrap().to_string();
    assert_eq!(error, "cannot create /proc/self/nothing: No such file or directory (os error 2) (check -D)");
    let error = Image::open(Path::new("/proc/self/fdinfo")).err().unwrap().to_string();
    assert!(error.contains("holds no complete image"), "{error}");
}

#[test]
fn changed_pages_are_found() {
    let directory = tempfile::tempdir().unwrap();
    Parts::new().write(directory.path()).unwrap();
    let file = fs::OpenOptions::new().write(true).open(directory.path().join("pages-0.img")).unwrap();
    file.write_all_at(b"!", 0x2345).unwrap();
    let image = Image::open(directory.path()).unwrap();
    let error = image.verify_pages(2).unwrap_err().to_string();
    assert!(error.contains("pages-0.img is damaged at offset 0: checksum"), "{error}");
    file.set_len(0x3000).unwrap();
    assert!(Image::open(directory.path()).is_err());
}

#[test]
fn checksums_follow_the_writer() {
    let directory = tempfile::tempdir().unwrap();
    let writer = ImageWriter::create(directory.path()).unwrap();
    let mut file = writer.shard(0).unwrap();
    let following = ShardChecksums::start(0, file.try_clone().unwrap()).unwrap();
    let mut length = 0;
    for i in 0..40u8 {
        file.write_all(&vec![i; 200_704]).unwrap();
        length += 200_704;
        following.written(length);
    }
    let shard = following.finish(length).unwrap();
    assert_eq!(shard.checksums.len(), 8);
    assert_eq!(checksum_shards(&[(0, &file, length)], 2).unwrap(), [shard]);
    drop(ShardChecksums::start(1, file).unwrap());
}

type Spoil = fn(&mut Parts);

#[test]
fn contradictions_are_named() {
    let cases: &[(Spoil, &str)] = &[
        (|p| p.tasks.push(task(2, 1)), "there are two task records numbered 2"),
        (|p| p.tasks.push(task(3, 0)), "2 root tasks"),
        (|p| p.tasks.push(task(-3, 1)), "task 3: pid or tid cannot be"),
        (|p| p.tasks[1].ppid = 9, "task 2 refers to task 9"),
        (|p| p.tasks.extend([task(3, 4), task(4, 3)]), "task 3 descends from itself"),
        (|p| p.tasks[1].mm = 5, "task 2 refers to memory map 5"),
        (|p| p.tasks[1].files = 5, "task 2 refers to descriptor table 5"),
        (|p| p.tasks[0].threads[0].registers.truncate(9), "task 1: length of registers"),
        (|p| p.map.vmas[1].start = 0x3000, "memory map 1: mapping 0x3000-0x6000"),
        (|p| p.map.vmas[2].end = 0xb001, "mapping 0x9000-0xb001"),
        (|p| p.map.vmas[2].end = 1 << 47, "mapping 0x9000-0x800000000000"),
        (|p| p.map.vmas[2].kind = 77, "mapping kind cannot be 0x4d"),
        (|p| p.map.vmas[2].kind = VmaKind::SharedFile as i32, "refers to mapped file 0"),
        (|p| p.pages.extents[1].address = 0xa000, "page map 1: pages 0xa000-0xc000"),
        (|p| p.pages.extents[1].address = 0x1000, "page map 1: pages 0x1000-0x3000"),
        (|p| p.pages.extents[1].offset = 0x3000, "part of a page file 0x3000-0x5000"),
        (|p| p.pages.extents[0].shard = 1, "refers to page file 1"),
        (|p| p.table.descriptors[0].number = 7, "descriptor number cannot be 0x7"),
        (|p| p.table.descriptors[0].handle = 70, "descriptor table 1 refers to handle 70"),
        (|p| p.handles[0].path = None, "handle 1: path"),
        (|p| p.handles[0].object = 3, "handle 1 refers to object 3"),
        (|p| p.handles[0].object = 1, "handles that no object lists cannot be 0x1"),
        (|p| p.objects[0].after = vec![1], "objects [1] must each be created before the others"),
        (|p| p.objects[0].plugin = "q".into(), "object 1 needs plugin \"q\""),
        (|p| p.header.page_size = 65536, "page_size cannot be 0x10000"),
    ];
    for (spoil, expected) in cases {
        let mut parts = Parts::new();
        spoil(&mut parts);
        let message = parts.fault();
        assert!(message.contains(expected), "{message:?} instead of {expected:?}");
    }
}

#[test]
fn any_change_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    Parts::new().write(directory.path()).unwrap();
    for name in [CORE_FILE, BLOBS_FILE, MANIFEST_FILE] {
        let path = directory.path().join(name);
        let good = fs::read(&path).unwrap();
        for i in 0..good.len() {
            for flip in [0x01, 0x20, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[i] ^= flip;
                fs::write(&path, &bad).unwrap();
                assert!(Image::open(directory.path()).is_err(), "{name} byte {i} ^ {flip:#x}");
            }
            fs::write(&path, &good[..i]).unwrap();
            assert!(Image::open(directory.path()).is_err(), "{name} cut at {i}");
        }
        fs::write(&path, [&good[..], b"x"].concat()).unwrap();
        assert!(Image::open(directory.path()).is_err(), "{name} with a byte more");
        fs::write(&path, &good).unwrap();
        Image::open(directory.path()).unwrap();
    }
}

/// Writes `core.img` anew with one byte of a record changed and every checksum right: what a malicious author can do.
fn forge(directory: &Path, good: &[u8], at: usize, value: u8) -> bool {
    let (mut file, mut checksums, mut records, mut seen) = (good[..12].to_vec(), Vec::new(), 0u64, 0);
    let mut rest = &good[12..];
    let mut changed = false;
    while rest.len() > 12 && rest[..2] != 14u16.to_le_bytes() {
        let length = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize;
        let mut payload = rest[12..12 + length].to_vec();
        if (seen..seen + length).contains(&at) {
            payload[at - seen] = value;
            changed = true;
        }
        seen += length;
        let checksum = crc32fast::hash(&[&rest[..8], &payload].concat()).to_le_bytes();
        file.extend([&rest[..8], &checksum, &payload].concat());
        checksums.extend(checksum);
        records += 1;
        rest = &rest[12 + length..];
    }
    let total = crc32fast::hash(&checksums);
    let trailer = prost::Message::encode_to_vec(&Trailer { records, checksum: total });
    let head =
        [&14u16.to_le_bytes()[..], &1u16.to_le_bytes(), &(trailer.len() as u32).to_le_bytes()].concat();
    let checksum = crc32fast::hash(&[&head[..], &trailer].concat()).to_le_bytes();
    file.extend([&head[..], &checksum, &trailer].concat());
    fs::write(directory.join(CORE_FILE), &file).unwrap();
    let manifest = fs::read_to_string(directory.join(MANIFEST_FILE)).unwrap();
    let mut lines: Vec<String> = manifest.lines().map(Into::into).collect();
    lines.pop();
    for line in lines.iter_mut().filter(|line| line.starts_with(CORE_FILE)) {
        *line = format!("{CORE_FILE} {} {total:08x}", file.len());
    }
    let text = lines.join("\n") + "\n";
    let manifest = format!("{text}checksum {:08x}\n", crc32fast::hash(text.as_bytes()));
    fs::write(directory.join(MANIFEST_FILE), manifest).unwrap();
    changed
}

#[test]
fn forged_records_never_panic() {
    let directory = tempfile::tempdir().unwrap();
    Parts::new().write(directory.path()).unwrap();
    let good = fs::read(directory.path().join(CORE_FILE)).unwrap();
    forge(directory.path(), &good, usize::MAX, 0);
    Image::open(directory.path()).expect("forging without a change changes nothing");
    let (mut refused, mut at) = (0, 0);
    while forge(directory.path(), &good, at, 0) {
        for value in [0, 2, 0x7f, 0xff] {
            forge(directory.path(), &good, at, value);
            match Image::open(directory.path()) {
                Ok(image) => drop(image.verify_pages(1)),
                Err(_) => refused += 1,
            }
            // Shows what it can.
            let _ = Image::inspect(directory.path());
        }
        at += 1;
    }
    assert!(at > 500 && refused > 200, "{refused} of {at} bytes");
}

#[test]
fn lengths_are_not_believed() {
    let directory = tempfile::tempdir().unwrap();
    Parts::new().write(directory.path()).unwrap();
    let file = fs::OpenOptions::new().write(true).open(directory.path().join(CORE_FILE)).unwrap();
    file.write_all_at(&u32::MAX.to_le_bytes(), 12 + 4).unwrap();
    match Image::open(directory.path()) {
        Err(ImageError::Damaged { damage: Damage::Length { length: 0xffff_ffff, .. }, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn big_images_open_fast() {
    let directory = tempfile::tempdir().unwrap();
    let writer = ImageWriter::create(directory.path()).unwrap();
    writer.write(&header()).unwrap();
    writer.write(&task(1, 0)).unwrap();
    let vmas = (1..=20_000).map(|i| vma(i << 20, (i << 20) + 0x3000)).collect();
    writer.write(&MemoryMap { id: 1, vmas, ..Default::default() }).unwrap();
    let extents = (1..=20_000)
        .map(|i| PageExtent { address: i << 20, pages: 1, offset: (i % 4) << 12, ..Default::default() })
        .collect();
    writer.write_page_map(&PageMap { mm: 1, extents, ..Default::default() }).unwrap();
    let descriptors = (0..15_000).map(|i| Descriptor { number: i, handle: i + 1, cloexec: false }).collect();
    writer.write(&DescriptorTable { id: 1, descriptors }).unwrap();
    for id in 1..=15_000 {
        writer.write(&Object { id, plugin: "p".into(), handles: vec![id], ..Default::default() }).unwrap();
        writer.write(&Handle { id, object: id, ..Default::default() }).unwrap();
    }
    let mut shard = writer.shard(0).unwrap();
    shard.write_all(&[1; 0x4000]).unwrap();
    let shards = checksum_shards(&[(0, &shard, 0x4000)], 2).unwrap();
    writer.finish(shards, false).unwrap();
    let start = std::time::Instant::now();
    let image = Image::open(directory.path()).unwrap();
    let elapsed = start.elapsed();
    println!("20,000 mappings, 15,000 handles and objects: opened in {elapsed:?}");
    assert_eq!(image.handles.len(), 15_000);
    assert!(elapsed.as_millis() < 2_000, "{elapsed:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(32) })]

    /// Arbitrary contents of records and blobs come back as they were.
    #[test]
    fn any_contents(
        names in prop::collection::vec("[a-z]{1,12}", 1..20),
        pieces in prop::collection::vec((0usize..3, prop::collection::vec(any::<u8>(), 0..5000)), 0..30),
        lengths in prop::collection::vec(1u64..50, 1..40),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let writer = ImageWriter::create(directory.path()).unwrap();
        writer.write(&header()).unwrap();
        writer.write(&task(1, 0)).unwrap();
        let handles: Vec<Handle> = (1u32..).zip(&names).map(|(id, name)| Handle {
            id, path: path(&format!("/{name}")), position: u64::from(id) << 33, ..Default::default()
        }).collect();
        handles.iter().for_each(|handle| writer.write(handle).unwrap());
        let descriptors = handles.iter().map(|h| Descriptor { number: h.id * 3, handle: h.id, cloexec: true });
        writer.write(&DescriptorTable { id: 1, descriptors: descriptors.collect() }).unwrap();
        let mut at = 0x10000;
        let vmas: Vec<Vma> = lengths.iter().map(|n| {
            let start = at + (n % 3) * 0x1000;
            at = start + n * 0x1000;
            vma(start, at)
        }).collect();
        writer.write(&MemoryMap { id: 1, vmas: vmas.clone(), ..Default::default() }).unwrap();
        let mut blobs = vec![Vec::new(); 3];
        for (n, piece) in &pieces {
            writer.append_blob("p", &n.to_string(), piece).unwrap();
            blobs[*n].extend_from_slice(piece);
        }
        writer.finish(Vec::new(), false).unwrap();
        let image = Image::open(directory.path()).unwrap();
        prop_assert_eq!(image.handles.values().cloned().collect::<Vec<_>>(), handles);
        prop_assert_eq!(&image.memory_maps[&1].vmas, &vmas);
        for (n, blob) in blobs.iter().enumerate() {
            let mut back = Vec::new();
            image.blob_reader("p", &n.to_string()).unwrap().read_to_end(&mut back).unwrap();
            prop_assert_eq!(&back, blob);
        }
    }
}

#[test]
fn guard_regions_and_hugetlb_pages_are_checked() {
    let guard = |start, end| GuardRegion { start, end };
    let mut parts = Parts::new();
    parts.pages.guards = vec![guard(0x1000, 0x2000), guard(0x4000, 0x6000)];
    let directory = tempfile::tempdir().unwrap();
    parts.write(directory.path()).unwrap();
    assert_eq!(Image::open(directory.path()).unwrap().page_maps[&1].guards, parts.pages.guards);
    for guards in [
        vec![guard(0x3000, 0x5000)],
        vec![guard(0x7000, 0x8000)],
        vec![guard(0x4000, 0x5000), guard(0x1000, 0x2000)],
        vec![guard(0x1001, 0x2000)],
    ] {
        parts.pages.guards = guards;
        assert!(parts.fault().contains("guard region"), "{}", parts.fault());
    }
    let mut parts = Parts::new();
    parts.map.vmas[0].huge_shift = 21;
    assert!(parts.fault().contains("hugetlb"), "{}", parts.fault());
    parts.map.vmas[0].huge_shift = 64;
    assert!(parts.fault().contains("hugetlb"), "{}", parts.fault());
    let mut parts = Parts::new();
    parts.map.lock_future = 4;
    assert!(parts.fault().contains("locking"), "{}", parts.fault());
}
