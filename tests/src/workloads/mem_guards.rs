//! Guard regions (MADV_GUARD_INSTALL) in mappings of every kind, some with contents around them, and in a child.

use std::fs::{self, File};
use std::os::fd::AsRawFd;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::getpid;

use crate::ctl::{Ctl, Fail, Outcome, ensure, same};
use crate::sys::{ANON, Map, PAGE, RW};

/// Since Linux 6.13 (include/uapi/asm-generic/mman-common.h).
const INSTALL: i32 = 102;
const REMOVE: i32 = 103;
const PAGES: usize = 40;

/// Which pages of a mapping are guarded: one alone, several, the last.
fn is_guarded(page: usize) -> bool {
    page == 3 || (10..20).contains(&page) || page == PAGES - 1
}

fn install(map: &Map) -> Outcome {
    for part in [map.page(3), map.part(10 * PAGE, 10 * PAGE), map.page(PAGES - 1)] {
        part.advise(INSTALL)?;
    }
    Ok(())
}

/// Whether anybody can read a page.
fn readable(page: &Map) -> bool {
    let mut byte = [0];
    let remote = [RemoteIoVec { base: page.addr, len: 1 }];
    process_vm_readv(getpid(), &mut [std::io::IoSliceMut::new(&mut byte)], &remote).is_ok()
}

/// Each page is guarded or has its contents.
fn check(what: &str, map: &Map, filled: bool) -> Outcome {
    for page in 0..PAGES {
        let (here, what) = (map.page(page), format!("{what}, page {page}"));
        match (is_guarded(page), filled) {
            (true, _) => ensure(!readable(&here), &format!("{what}: the guard is gone"))?,
            (false, true) => here.check(&what, page as u64)?,
            (false, false) => here.check_zero(&what)?,
        }
    }
    Ok(())
}

fn fill(map: &Map) {
    (0..PAGES).filter(|&page| !is_guarded(page)).for_each(|page| map.page(page).fill(page as u64));
}

fn check_all(maps: &[(&str, Map, bool)]) -> Outcome {
    maps.iter().try_for_each(|(what, map, filled)| check(what, map, *filled))
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let len = PAGES * PAGE;
    let plain = Map::anon(len)?;
    if plain.page(3).advise(INSTALL).is_err() {
        return Err(Fail::Absent("the kernel has no guard regions".into()));
    }
    fs::write(ctl.work("file"), vec![0; len])?;
    let file = File::options().read(true).write(true).open(ctl.work("file"))?;
    let mut maps = vec![
        ("private", plain, true),
        ("untouched", Map::anon(len)?, false),
        ("shared", Map::shared(len)?, true),
        ("not forked", Map::anon(len)?, true),
        ("locked", Map::anon(len)?, true),
        ("grows down", Map::new(len, RW, ANON | libc::MAP_GROWSDOWN, -1, 0)?, true),
    ];
    // Guard regions of files came with Linux 6.15.
    for (what, flags) in [("private file", libc::MAP_PRIVATE), ("shared file", libc::MAP_SHARED)] {
        let map = Map::new(len, RW, flags, file.as_raw_fd(), 0)?;
        if map.page(3).advise(INSTALL).is_ok() {
            maps.push((what, map, true));
        }
    }
    for (_, map, filled) in &maps {
        install(map)?;
        if *filled {
            fill(map);
        }
    }
    maps[3].1.advise(libc::MADV_DONTFORK)?;
    // Fails at the first guard, but locks.
    // SAFETY: no Rust object lives in a `Map`.
    unsafe { libc::mlock2(maps[4].1.addr as *mut _, maps[4].1.len, libc::MLOCK_ONFAULT) };
    // More than is copied without a snapshot, so that the guards are looked for there.
    let large = Map::anon(3000 * PAGE)?;
    large.fill(9);
    let inherited: Vec<_> = maps.iter().filter(|(what, ..)| *what != "not forked").copied().collect();
    let child = ctl.child("child", move |ctl| {
        ctl.wait_as("child")?;
        check_all(&inherited)
    })?;
    ctl.await_ready("child")?;

    if ctl.wait()? {
        plain.page(12).advise(REMOVE)?;
    }

    check_all(&maps)?;
    large.check("large", 9)?;
    child.join()?;
    // A region that is no guard any more is empty.
    plain.page(12).advise(REMOVE)?;
    plain.page(12).check_zero("removed guard")?;
    same("a neighbour", readable(&plain.page(13)), false)
}
