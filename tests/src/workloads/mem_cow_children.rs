//! Memory that parent and children share copy-on-write is still the same pages, but for those that were written.

use std::fs;

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys::{Map, PAGE};

const PAGES: usize = 64;
const CHILDREN: usize = 3;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let map = Map::anon(PAGES * PAGE)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    map.fill(41);
    let mut children = Vec::new();
    for n in 0..CHILDREN {
        let name = format!("child{n}");
        let shown = ctl.work(&format!(".frames{n}"));
        children.push(ctl.child(&name, |ctl| {
            map.page(n).fill(50 + n as u64);
            if ctl.wait_as(&name)? {
                map.page(PAGES - 1).put(0, 1);
            }
            let frames: Vec<String> = map.frames()?.iter().map(u64::to_string).collect();
            fs::write(&shown, frames.join(" "))?;
            ctl.announce(&format!("shown{n}"), b"")?;
            crate::ctl::poll_until("the parent has compared", || ctl.dir().join("compared").exists())?;
            map.page(n).check("own page of the child", 50 + n as u64)?;
            same("shared page in the child", map.page(PAGES - 2).get(0), crate::sys::word(41, (PAGES - 2) * 512))
        })?);
        ctl.await_ready(&format!("child{n}"))?;
    }

    ctl.wait()?;

    let own = map.frames()?;
    let mut verdict = Ok(());
    for n in 0..CHILDREN {
        let file = ctl.dir().join(format!("shown{n}"));
        crate::ctl::poll_until("a child shows its frames", || file.exists())?;
        let text = fs::read_to_string(ctl.work(&format!(".frames{n}")))?;
        let theirs: Vec<u64> = text.split(' ').filter_map(|frame| frame.parse().ok()).collect();
        // 0 for all: without CAP_SYS_ADMIN in the first user namespace nobody sees frame numbers.
        let wrong = |&page: &usize| {
            let hidden = own[page] == 0 && theirs[page] == 0;
            !hidden && (own[page] == theirs[page]) != (page != n)
        };
        let wrong: Vec<usize> = (0..PAGES).filter(wrong).collect();
        if !wrong.is_empty() && verdict.is_ok() {
            verdict = ensure(false, &format!("child {n}: sharing has changed for the pages {wrong:?}"));
        }
    }
    let _ = fs::remove_file(ctl.dir().join("compared"));
    ctl.announce("compared", b"")?;
    for child in children {
        child.join()?;
    }
    for n in 0..CHILDREN {
        let _ = fs::remove_file(ctl.dir().join(format!("shown{n}")));
    }
    fs::remove_file(ctl.dir().join("compared"))?;
    map.check("parent's memory", 41)?;
    verdict
}
