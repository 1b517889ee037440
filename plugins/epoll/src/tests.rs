use crate::{Polls, dump, kernel};
use stasis_plugin_api::{Descriptor, HandleInfo, testing::Kit};
use std::{
    io::{PipeReader, PipeWriter, Write, pipe},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

const IN: u32 = libc::EPOLLIN as u32;
const OUT: u32 = libc::EPOLLOUT as u32;
const ONESHOT: u32 = libc::EPOLLONESHOT as u32;
const ET: u32 = libc::EPOLLET as u32;

/// Events of an epoll, sorted by data.
fn ready(epoll: BorrowedFd<'_>) -> Vec<(u64, u32)> {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
    // SAFETY: room for 16 events.
    let n = unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), 16, 0) };
    let mut found: Vec<_> = events[..n as usize].iter().map(|event| (event.u64, event.events)).collect();
    found.sort();
    found
}

fn entries(number: i32) -> Vec<dump::Listed> {
    let fdinfo = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
    dump::entries(&HandleInfo { fdinfo: fdinfo.into(), ..HandleInfo::default() }).unwrap()
}

struct Scene {
    kit: Kit,
    epoll: i32,
    read: i32,
    write: i32,
}

impl Scene {
    fn new() -> Self {
        let mut kit = Kit::new();
        kit.plugin(Polls);
        let epoll = kit.hold(kernel::create().unwrap(), Polls::KIND).unwrap();
        let (read, write): (PipeReader, PipeWriter) = pipe().unwrap();
        let read = kit.keep(OwnedFd::from(read)).unwrap();
        let write = kit.keep(OwnedFd::from(write)).unwrap();
        Self { kit, epoll, read, write }
    }
    fn add(&self, number: i32, events: u32, data: u64) {
        kernel::add(self.epoll, number, events, data).unwrap();
    }
    /// Dumps and restores; the entries must be the same.
    fn journey(&mut self) {
        let before = entries(self.epoll);
        self.kit.dump().unwrap();
        self.kit.restore().unwrap();
        let key = |entry: &dump::Listed| (entry.number, entry.data, entry.events, entry.ino);
        let sorted = |mut list: Vec<dump::Listed>| {
            list.sort_by_key(key);
            list.iter().map(key).collect::<Vec<_>>()
        };
        assert_eq!(sorted(entries(self.epoll)), sorted(before));
    }
    fn ready(&self) -> Vec<(u64, u32)> {
        ready(self.kit.fd(self.epoll))
    }
    fn send(&self) {
        let mut write = PipeWriter::from(self.kit.fd(self.write).try_clone_to_owned().unwrap());
        write.write_all(b"x").unwrap();
    }
}

#[test]
fn fdinfo_is_read() {
    let fdinfo = "pos:\t0\nflags:\t02\ntfd:        8 events: 40000019 data: ffffffffffffffff  pos:0 ino:13d3 sdev:f\n\
                  tfd:        8 events:       19 data:                a  pos:0 ino:1 sdev:f\n";
    let info = |text: &str| HandleInfo { fdinfo: text.into(), ..HandleInfo::default() };
    let found = dump::entries(&info(fdinfo)).unwrap();
    let first = dump::Listed { number: 8, events: 0x4000_0019, data: u64::MAX, ino: 0x13d3, nth: 0 };
    assert_eq!(found, [first, dump::Listed { events: 0x19, data: 10, ino: 1, nth: 1, ..first }]);
    assert!(dump::entries(&info("tfd: x\n")).is_err());
    assert!(dump::entries(&info("pos:\t0\n")).unwrap().is_empty());
}

#[test]
fn entries_come_back_and_ready_ones_are_reported() {
    let mut scene = Scene::new();
    scene.add(scene.read, IN, 1);
    scene.add(scene.write, OUT | ET, u64::MAX);
    scene.journey();
    assert_eq!(scene.ready(), [(u64::MAX, OUT)]);
    scene.send();
    assert_eq!(scene.ready(), [(1, IN)]);
}

#[test]
fn an_armed_oneshot_fires_once_and_a_disarmed_one_never() {
    let mut scene = Scene::new();
    scene.add(scene.write, OUT | ONESHOT, 1);
    scene.journey();
    assert_eq!((scene.ready(), scene.ready()), (vec![(1, OUT)], vec![]));
    scene.journey();
    assert!(scene.ready().is_empty());
}

#[test]
fn disarming_takes_no_event_of_another_entry() {
    let mut scene = Scene::new();
    scene.add(scene.write, OUT | ONESHOT, 1);
    scene.ready();
    scene.send();
    scene.add(scene.read, IN | ET, 2);
    scene.journey();
    assert_eq!((scene.ready(), scene.ready()), (vec![(2, IN)], vec![]));
}

#[test]
fn a_closed_number_is_used_again_for_its_entry() {
    let mut scene = Scene::new();
    let copy = scene.kit.dup(scene.read).unwrap();
    scene.add(copy, IN, 7);
    scene.kit.close(copy);
    scene.journey();
    // SAFETY: F_GETFD takes nothing.
    assert_eq!(unsafe { libc::fcntl(copy, libc::F_GETFD) }, -1, "the number is closed again");
    scene.send();
    assert_eq!(scene.ready(), [(7, IN)]);
}

#[test]
fn a_reused_number_keeps_both_meanings() {
    let mut scene = Scene::new();
    let number = scene.kit.dup(scene.read).unwrap();
    scene.add(number, IN, 1);
    scene.kit.dup2(scene.write, number).unwrap();
    scene.add(number, OUT, 2);
    scene.journey();
    assert_eq!(scene.ready(), [(2, OUT)]);
    scene.send();
    assert_eq!(scene.ready(), [(1, IN), (2, OUT)]);
    let link = |number: i32| std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap();
    assert_eq!(link(number), link(scene.write), "our table is as it was");
}

#[test]
fn duplicates_are_entries_of_their_own() {
    let mut scene = Scene::new();
    let copy = scene.kit.dup(scene.read).unwrap();
    scene.add(scene.read, IN, 1);
    scene.add(copy, IN, 2);
    scene.send();
    scene.journey();
    assert_eq!(scene.ready(), [(1, IN), (2, IN)]);
}

#[test]
fn an_epoll_watches_an_epoll() {
    let mut scene = Scene::new();
    let outer = scene.kit.hold(kernel::create().unwrap(), Polls::KIND).unwrap();
    kernel::add(outer, scene.epoll, IN, 9).unwrap();
    scene.add(scene.read, IN, 1);
    scene.journey();
    assert!(ready(scene.kit.fd(outer)).is_empty());
    scene.send();
    assert_eq!(ready(scene.kit.fd(outer)), [(9, IN)]);
    assert_eq!(entries(outer).len(), 1);
}

#[test]
fn exclusive_entries_and_no_entries() {
    let mut scene = Scene::new();
    scene.journey();
    scene.add(scene.read, IN | libc::EPOLLEXCLUSIVE as u32, 3);
    scene.journey();
    scene.send();
    assert_eq!(scene.ready(), [(3, IN)]);
}

#[test]
fn a_target_that_nobody_in_the_tree_has_is_refused() {
    let mut scene = Scene::new();
    let outside = scene.kit.fd(scene.read).try_clone_to_owned().unwrap();
    scene.add(scene.read, IN, 1);
    scene.kit.close(scene.read);
    let error = scene.kit.dump().unwrap_err().to_string();
    assert!(error.contains("no task of the tree"), "{error}");
    drop(outside);
}

#[test]
fn a_signalfd_added_from_the_scratch_table_still_wakes() {
    let mut scene = Scene::new();
    // SAFETY: sigset_t is filled by sigemptyset; the mask is this thread's alone.
    let signals = unsafe {
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut mask);
        libc::sigaddset(&raw mut mask, libc::SIGUSR2);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const mask, std::ptr::null_mut());
        <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(libc::signalfd(
            -1,
            &raw const mask,
            libc::SFD_CLOEXEC,
        ))
    };
    let number = scene.kit.keep(signals).unwrap();
    let copy = scene.kit.dup(number).unwrap();
    scene.add(copy, IN, 4);
    scene.kit.close(copy);
    scene.journey();
    assert!(scene.ready().is_empty());
    // SAFETY: a signal that this thread blocks.
    unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR2) };
    assert_eq!(scene.ready(), [(4, IN)]);
}
