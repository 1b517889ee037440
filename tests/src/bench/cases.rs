//! The workloads of the benchmark: they hold something, beat, and answer questions about the longest gap.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::ctl::{Ctl, Outcome, pause, same};
use crate::sys::{self, Map, PAGE};

/// One case.
#[derive(Debug)]
pub struct Case {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it holds.
    pub about: &'static str,
    hold: fn(&Ctl) -> Outcome<Held>,
}

/// What the setup leaves for the check after a restore.
#[derive(Debug, Default)]
struct Held {
    memory: Option<Map>,
    descriptors: Vec<OwnedFd>,
}

/// The cases of the project's speed table, in its order.
pub const CASES: [Case; 10] = [
    Case { name: "small", about: "8 MiB process", hold: |_| memory(8 << 20, libc::MADV_NOHUGEPAGE) },
    Case { name: "4k", about: "2 GiB in 4K pages", hold: |_| memory(2 << 30, libc::MADV_NOHUGEPAGE) },
    Case { name: "thp", about: "2 GiB in THP", hold: |_| memory(2 << 30, libc::MADV_HUGEPAGE) },
    Case {
        name: "procs",
        about: "300 processes of 1 MiB",
        hold: |ctl| processes(ctl, 300, |_, n| own_memory(n)),
    },
    Case { name: "threads", about: "1,000 threads", hold: |_| threads(1000) },
    Case { name: "maps", about: "20,000 mappings", hold: |_| mappings(20_000) },
    Case { name: "fds", about: "5,000 descriptors", hold: |ctl| descriptors(ctl, 2_500, 2_500, 0) },
    Case {
        name: "pipes",
        about: "15,000 descriptors, 2,500 pipes",
        hold: |ctl| descriptors(ctl, 5_000, 5_000, 2_500),
    },
    Case {
        name: "procfds",
        about: "300 processes with 50 descriptors each",
        hold: |ctl| processes(ctl, 300, |ctl, _| descriptors(ctl, 20, 20, 5)),
    },
    Case { name: "cow", about: "256 MiB copy-on-write, 20 children", hold: shared_by_children },
];

/// Sets a case up, says so, and beats until killed.
pub fn play(name: &str, dir: &Path) -> Outcome {
    let ctl = Ctl::new(dir);
    let Some(case) = CASES.iter().find(|case| case.name == name) else {
        return Err(crate::ctl::changed(format!("no case is called {name}")));
    };
    let held = (case.hold)(&ctl)?;
    ctl.announce("ready", b"")?;
    let request = dir.join("check-request");
    let (mut last, mut longest, mut beats) = (Instant::now(), Duration::ZERO, 0u32);
    loop {
        pause(Duration::from_micros(200));
        let now = Instant::now();
        longest = longest.max(now - last);
        last = now;
        beats += 1;
        if beats.is_multiple_of(16) && request.exists() {
            let answer = match check(&held) {
                Ok(()) => longest.as_secs_f64().to_string(),
                Err(fail) => format!("FAIL: {fail}"),
            };
            ctl.announce("result", answer.as_bytes())?;
            while request.exists() {
                pause(Duration::from_millis(1));
            }
            (last, longest) = (Instant::now(), Duration::ZERO);
        }
    }
}

/// Looks at a sample of what is held, quickly.
fn check(held: &Held) -> Outcome {
    if let Some(map) = held.memory {
        let step = (map.pages() / 1000).max(1);
        for n in (0..map.pages()).step_by(step) {
            same("a page", map.page(n).get(8), sys::word(1, n))?;
        }
    }
    for fd in &held.descriptors {
        sys::fcntl(fd, libc::F_GETFD, 0)?;
    }
    Ok(())
}

/// Memory whose pages all differ.
fn memory(size: usize, advice: i32) -> Outcome<Held> {
    let map = aligned(size)?;
    map.advise(advice)?;
    for n in 0..map.pages() {
        map.page(n).put(8, sys::word(1, n));
        map.page(n).put(2000, n as u64);
    }
    Ok(Held { memory: Some(map), ..Held::default() })
}

/// A mapping that starts at a huge page.
fn aligned(size: usize) -> Outcome<Map> {
    let room = Map::anon(size + (2 << 20))?;
    let start = room.addr.next_multiple_of(2 << 20) - room.addr;
    Ok(room.part(start, size))
}

fn own_memory(n: usize) -> Outcome<Held> {
    let map = Map::anon(1 << 20)?;
    map.fill(n as u64);
    Ok(Held { memory: Some(map), ..Held::default() })
}

/// Children that sleep, with something of their own.
fn processes(ctl: &Ctl, count: usize, own: fn(&Ctl, usize) -> Outcome<Held>) -> Outcome<Held> {
    let ready = Map::shared(PAGE * 2)?;
    for n in 0..count {
        ctl.child(&format!("c{n}"), |ctl| {
            let _held = own(ctl, n)?;
            ready.put(8 * n, 1);
            loop {
                pause(Duration::from_secs(1000));
            }
        })?;
    }
    crate::ctl::poll_until("all children run", || (0..count).all(|n| ready.get(8 * n) == 1))?;
    Ok(Held::default())
}

/// Threads that wait for each other for ever.
fn threads(count: usize) -> Outcome<Held> {
    let (ready, never) = (Arc::new(Barrier::new(count + 1)), Arc::new(Barrier::new(count + 1)));
    for _ in 0..count {
        let (ready, never) = (ready.clone(), never.clone());
        std::thread::Builder::new().stack_size(64 << 10).spawn(move || {
            ready.wait();
            never.wait();
        })?;
    }
    ready.wait();
    Ok(Held::default())
}

/// Mappings of a page, none of which merges with its neighbour.
fn mappings(count: usize) -> Outcome<Held> {
    let map = Map::anon(count * PAGE)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    for n in 0..count {
        map.page(n).put(8, sys::word(1, n));
        if n % 2 == 0 {
            map.page(n).protect(libc::PROT_READ)?;
        }
    }
    Ok(Held { memory: Some(map), ..Held::default() })
}

/// Regular files, eventfds and pipes (two descriptors each).
fn descriptors(ctl: &Ctl, files: usize, events: usize, pipes: usize) -> Outcome<Held> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    fs::write(ctl.work("data"), "0123456789")?;
    let mut held = Held::default();
    for _ in 0..files {
        held.descriptors.push(fs::File::open(ctl.work("data"))?.into());
    }
    for n in 0..events {
        let event = EventFd::from_value_and_flags(n as u32, EfdFlags::empty())?;
        held.descriptors.push(event.into());
    }
    for _ in 0..pipes {
        let (reader, writer) = sys::pipe(0)?;
        sys::write(&writer, b"some data")?;
        held.descriptors.extend([reader, writer]);
    }
    Ok(held)
}

/// One block of memory that twenty children share with their parent by fork.
fn shared_by_children(ctl: &Ctl) -> Outcome<Held> {
    let held = memory(256 << 20, libc::MADV_NOHUGEPAGE)?;
    processes(ctl, 20, |_, _| Ok(Held::default()))?;
    Ok(held)
}
