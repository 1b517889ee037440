use super::*;
use stasis_plugin_api::testing::Kit;
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt, PermissionsExt},
    },
};

fn kit() -> Kit {
    let mut kit = Kit::new();
    kit.plugin(MemoryFiles);
    kit
}

fn file(name: &std::ffi::CStr) -> File {
    File::from(kernel::create(name, 0).unwrap())
}

fn of(kit: &Kit, number: i32) -> File {
    File::from(kit.fd(number).try_clone_to_owned().unwrap())
}

#[test]
fn contents_holes_and_handles_come_back() {
    let mut file = file(c"a name");
    file.set_len(64 << 20).unwrap();
    file.write_all_at(b"near", 5).unwrap();
    file.write_all_at(&[7; 3 << 20], 32 << 20).unwrap();
    file.seek(SeekFrom::Start(5)).unwrap();
    let reader = kernel::reopen(file.as_fd(), libc::O_RDONLY).unwrap();
    let blocks = file.metadata().unwrap().blocks();
    let mut kit = kit();
    let writer = kit.hold(file, MemoryFiles::KIND).unwrap();
    let reader = kit.hold(reader, MemoryFiles::KIND).unwrap();
    assert_eq!(kit.dump().unwrap(), 1, "one file is one object");
    let record = kit.record::<MemoryFiles>().unwrap();
    assert_eq!((record.name.as_slice(), record.extents.len()), (&b"a name"[..], 2));
    kit.restore().unwrap();
    let (file, mut again) = (of(&kit, writer), of(&kit, reader));
    let meta = file.metadata().unwrap();
    assert_eq!((meta.size(), meta.blocks(), meta.ino()), (64 << 20, blocks, again.metadata().unwrap().ino()));
    file.write_all_at(b"NEAR", 5).unwrap();
    let mut text = [0; 10];
    again.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"\0\0\0\0\0NEAR\0");
    assert!(again.write(b"x").is_err(), "opened for reading only");
    file.read_exact_at(&mut text, (35 << 20) - 10).unwrap();
    assert_eq!(text, [7; 10]);
    let link = std::fs::read_link(kernel::magic_link(file.as_fd())).unwrap();
    assert_eq!(link.to_str(), Some("/memfd:a name (deleted)"));
}

#[test]
fn seals_and_mode_come_back() {
    let seals = [
        (libc::F_SEAL_SEAL | libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW).cast_unsigned(),
        libc::F_SEAL_FUTURE_WRITE.cast_unsigned(),
        0,
    ];
    for seals in seals {
        let file = file(c"sealed");
        file.write_all_at(b"text", 0).unwrap();
        file.set_permissions(std::fs::Permissions::from_mode(0o640)).unwrap();
        let times = std::fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
        file.set_times(times).unwrap();
        kernel::add_seals(file.as_fd(), seals).unwrap();
        let mut kit = kit();
        let number = kit.hold(file, MemoryFiles::KIND).unwrap();
        kit.dump().unwrap();
        kit.restore().unwrap();
        let file = of(&kit, number);
        assert_eq!(kernel::seals(file.as_fd()).unwrap(), seals);
        let meta = file.metadata().unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.size(), meta.mtime()), (0o640, 4, 0));
        assert_eq!(file.write_all_at(b"x", 0).is_ok(), seals == 0);
    }
}

#[test]
fn only_memory_files_are_claimed() {
    let kit = kit();
    let claims = |link: &str, dev| {
        let handle = HandleInfo { link: link.into(), dev, ..HandleInfo::default() };
        kit.claims(MemoryFiles::KIND, &handle).unwrap()
    };
    let dev = kernel::devices()[0];
    assert!(claims("/memfd:x (deleted)", dev));
    assert!(!claims("/memfd:x (deleted)", dev + 1));
    assert!(!claims("/SYSV00000000 (deleted)", dev));
}

#[test]
fn damaged_records_are_refused() {
    let mut kit = kit();
    let host = &mut kit.host;
    let extents = vec![records::stasis::memfd::v1::Extent { offset: 1 << 63, length: 1 << 63 }];
    let record = MemoryFile { size: 10, extents, ..MemoryFile::default() };
    let hook = stasis_plugin_api::register::descriptor(MemoryFiles);
    let bytes = prost::Message::encode_to_vec(&record);
    let error =
        host.call(|host| hook.create(host, &ObjectInfo::default(), bytes.as_slice().into()).into_result());
    assert!(error.unwrap_err().to_string().contains("beyond the end"));
}
