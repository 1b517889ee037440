use crate::{
    Pipes,
    contents::Buffer,
    kernel::{self, Ends},
    records::stasis::pipe::v1::pipe::Contents,
};
use stasis_plugin_api::{Descriptor, testing::Kit};
use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// A kit that holds both ends; their numbers.
fn kit(ends: Ends) -> (Kit, i32, i32) {
    let mut kit = Kit::new();
    kit.plugin(Pipes);
    let read = kit.hold(ends.read, Pipes::KIND).unwrap();
    let write = kit.hold(ends.write, Pipes::KIND).unwrap();
    (kit, read, write)
}

fn journey(kit: &mut Kit) {
    assert_eq!(kit.dump().unwrap(), 1);
    kit.restore().unwrap();
}

fn get(fd: BorrowedFd<'_>, n: usize) -> Result<Vec<u8>, i32> {
    let mut buffer = vec![0; n];
    let n = kernel::read(fd, &mut buffer).map_err(|error| error.raw_os_error().unwrap())?;
    buffer.truncate(n);
    Ok(buffer)
}

fn put(fd: BorrowedFd<'_>, data: &[u8]) -> io::Result<usize> {
    kernel::write(fd, data)
}

fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + i / 251) as u8).collect()
}

/// Writes pieces until the pipe takes no more; what went in.
fn stuff(fd: BorrowedFd<'_>, piece: usize) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let data = pattern(piece);
        match put(fd, &data) {
            Ok(n) => all.extend_from_slice(&data[..n]),
            Err(_) => return all,
        }
    }
}

#[test]
fn contents_survive_and_dump_consumes_nothing() {
    let (mut kit, read, write) = kit(kernel::pipe().unwrap());
    put(kit.fd(write), b"hello").unwrap();
    assert_eq!(kit.dump().unwrap(), 1);
    assert_eq!(kernel::available(kit.fd(read)).unwrap(), 5);
    put(kit.fd(write), b", again").unwrap();
    journey(&mut kit);
    assert_eq!(get(kit.fd(read), 100).unwrap(), b"hello, again");
    assert_eq!(get(kit.fd(read), 100), Err(libc::EAGAIN));
    put(kit.fd(write), b"on").unwrap();
    assert_eq!(get(kit.fd(read), 100).unwrap(), b"on");
}

#[test]
fn a_full_pipe_is_full_again_whatever_filled_it() {
    for (capacity, piece) in
        [(65536, 65536), (65536, 3000), (65536, 1), (4096, 4096), (1 << 20, 5000), (1 << 20, 4096)]
    {
        let ends = kernel::pipe_of(capacity).unwrap();
        let data = stuff(ends.write.as_fd(), piece);
        let (mut kit, read, write) = kit(ends);
        journey(&mut kit);
        assert_eq!(kernel::capacity(kit.fd(read)).unwrap(), capacity);
        assert!(put(kit.fd(write), &pattern(piece)).is_err(), "{capacity} by {piece}");
        let mut back = Vec::new();
        while let Ok(part) = get(kit.fd(read), 100_000) {
            back.extend(part);
        }
        assert!(back == data, "{capacity} by {piece}");
    }
}

#[test]
fn packets_keep_their_bounds_between_streams() {
    let ends = kernel::pipe().unwrap();
    let write = ends.write.as_fd();
    kernel::set_packets(write, true).unwrap();
    for packet in [&b"a"[..], b"bcd", &[b'x'; 4096], b"e", b"f"] {
        put(write, packet).unwrap();
    }
    kernel::set_packets(write, false).unwrap();
    put(write, b"stream ").unwrap();
    put(write, b"goes on").unwrap();
    let (mut kit, read, _) = kit(ends);
    journey(&mut kit);
    let record = kit.record::<Pipes>().unwrap();
    let last = Buffer::decode(*record.buffers.last().unwrap());
    assert_eq!(last, Buffer { length: 14, packet: false });
    assert_eq!(get(kit.fd(read), 10).unwrap(), b"a");
    assert_eq!(get(kit.fd(read), 2).unwrap(), b"bc", "the rest of a packet is dropped");
    assert_eq!(get(kit.fd(read), 9000).unwrap().len(), 4096);
    assert_eq!(get(kit.fd(read), 10).unwrap(), b"e");
    assert_eq!(get(kit.fd(read), 10).unwrap(), b"f");
    assert_eq!(get(kit.fd(read), 100).unwrap(), b"stream goes on");
}

#[test]
fn spliced_buffers_and_a_partly_read_one() {
    let ends = kernel::pipe().unwrap();
    let source = kernel::pipe().unwrap();
    for part in [b"one", b"two", b"six"] {
        put(source.write.as_fd(), part).unwrap();
        kernel::splice(source.read.as_fd(), ends.write.as_fd(), 3).unwrap();
    }
    get(ends.read.as_fd(), 1).unwrap();
    let (mut kit, read, _) = kit(ends);
    journey(&mut kit);
    let Some(Contents::Data(data)) = kit.record::<Pipes>().unwrap().contents else { panic!("not short") };
    assert_eq!((data.as_slice(), kit.record::<Pipes>().unwrap().buffers), (&b"netwosix"[..], vec![4, 6, 6]));
    assert_eq!(get(kit.fd(read), 100).unwrap(), b"netwosix");
}

#[test]
fn closed_ends_stay_closed() {
    let (mut kit, read, write) = kit(kernel::pipe().unwrap());
    put(kit.fd(write), b"rest").unwrap();
    kit.close(write);
    let rest = kit.fd(read).try_clone_to_owned().unwrap();
    drop(kit);
    let mut alone = Kit::new();
    alone.plugin(Pipes);
    let read = alone.hold(rest, Pipes::KIND).unwrap();
    journey(&mut alone);
    assert_eq!(get(alone.fd(read), 100).unwrap(), b"rest");
    assert_eq!(get(alone.fd(read), 100).unwrap(), b"", "end of file");
}

#[test]
fn data_without_a_reader_is_kept() {
    let Ends { read, write } = kernel::pipe().unwrap();
    put(write.as_fd(), b"kept").unwrap();
    drop(read);
    let mut kit = Kit::new();
    kit.plugin(Pipes);
    let write = kit.hold(write, Pipes::KIND).unwrap();
    journey(&mut kit);
    assert_ne!(kernel::poll(kit.fd(write)).unwrap() & libc::POLLERR, 0);
    let reader = kernel::reopen(kit.fd(write), libc::O_RDONLY).unwrap();
    assert_eq!(get(reader.as_fd(), 100).unwrap(), b"kept");
}

#[test]
fn an_end_outside_is_refused_unless_allowed() {
    for reading in [true, false] {
        let Ends { read, write } = kernel::pipe().unwrap();
        put(write.as_fd(), b"x").unwrap();
        let (inside, outside) = if reading { (read, write) } else { (write, read) };
        let mut kit = Kit::new();
        kit.plugin(Pipes);
        let number = kit.hold(inside, Pipes::KIND).unwrap();
        let error = kit.dump().unwrap_err().to_string();
        assert!(error.contains("outside of the tree") && error.contains("--ext-pipe"), "{error}");
        kit.host.options.insert("ext-pipe".into(), String::new());
        journey(&mut kit);
        assert_eq!(kit.host.warnings.borrow().len(), 1);
        match reading {
            true => {
                assert_eq!((get(kit.fd(number), 9), get(kit.fd(number), 9)), (Ok(b"x".into()), Ok(vec![])))
            }
            false => assert_ne!(kernel::poll(kit.fd(number)).unwrap() & libc::POLLERR, 0),
        }
        drop(outside);
    }
}

#[test]
fn ends_opened_again_stay_apart() {
    let (mut kit, read, write) = kit(kernel::pipe().unwrap());
    let both = kit.hold(kernel::reopen(kit.fd(read), libc::O_RDWR).unwrap(), Pipes::KIND).unwrap();
    let second = kit.hold(kernel::reopen(kit.fd(read), libc::O_RDONLY).unwrap(), Pipes::KIND).unwrap();
    journey(&mut kit);
    put(kit.fd(both), b"ab").unwrap();
    put(kit.fd(write), b"cd").unwrap();
    assert_eq!(get(kit.fd(second), 1).unwrap(), b"a");
    assert_eq!(get(kit.fd(both), 1).unwrap(), b"b");
    assert_eq!(get(kit.fd(read), 9).unwrap(), b"cd");
    assert!(put(kit.fd(second), b"x").is_err());
}

/// A fifo in a directory of its own, removed at the end.
struct Fifo(CString);

impl Fifo {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("stasis-pipe-{}-{name}", std::process::id()));
        let path = CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: a C string.
        assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
        Self(path)
    }
    fn open(&self, flags: i32) -> OwnedFd {
        kernel::open(&self.0, flags | libc::O_NONBLOCK).unwrap()
    }
}

impl Drop for Fifo {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.0.to_str().unwrap());
    }
}

#[test]
fn a_fifo_is_found_again_with_its_contents() {
    let fifo = Fifo::new("contents");
    let (mut kit, read, write) =
        kit(Ends { read: fifo.open(libc::O_RDONLY), write: fifo.open(libc::O_WRONLY) });
    let data = stuff(kit.fd(write), 3000);
    journey(&mut kit);
    let mut back = Vec::new();
    while let Ok(part) = get(kit.fd(read), 100_000) {
        back.extend(part);
    }
    assert!(back == data);
    kit.close(write);
    assert_eq!(get(kit.fd(read), 1), Ok(vec![]));
    assert_ne!(kernel::poll(kit.fd(read)).unwrap() & libc::POLLHUP, 0);
}

#[test]
fn a_fifo_reader_that_met_no_writer_is_not_told_of_an_end() {
    let fifo = Fifo::new("quiet");
    let mut kit = Kit::new();
    kit.plugin(Pipes);
    let read = kit.hold(fifo.open(libc::O_RDONLY), Pipes::KIND).unwrap();
    journey(&mut kit);
    assert_eq!(kernel::poll(kit.fd(read)).unwrap(), 0);
    drop(fifo.open(libc::O_WRONLY));
    journey(&mut kit);
    assert_ne!(kernel::poll(kit.fd(read)).unwrap() & libc::POLLHUP, 0);
}

#[test]
fn a_fifo_that_is_gone_is_made_again_without_its_name() {
    let fifo = Fifo::new("gone");
    let mut kit = Kit::new();
    kit.plugin(Pipes);
    let both = kit.hold(fifo.open(libc::O_RDWR), Pipes::KIND).unwrap();
    let data = stuff(kit.fd(both), 3000);
    let path = fifo.0.to_str().unwrap().to_owned();
    drop(fifo);
    // The name is a file's now, which must stay.
    std::fs::write(&path, "another").unwrap();
    journey(&mut kit);
    assert_eq!(get(kit.fd(both), 100_000).unwrap(), data);
    assert_eq!(std::fs::read(&path).unwrap(), b"another");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_fifo_in_use_by_others_is_not_filled_over() {
    let fifo = Fifo::new("others");
    let mut kit = Kit::new();
    kit.plugin(Pipes);
    let both = kit.hold(fifo.open(libc::O_RDWR), Pipes::KIND).unwrap();
    put(kit.fd(both), b"mine").unwrap();
    kit.dump().unwrap();
    let other = fifo.open(libc::O_RDWR);
    let error = kit.restore().unwrap_err().to_string();
    assert!(error.contains("another process has it open"), "{error}");
    drop(other);
}
