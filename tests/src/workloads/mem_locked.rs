//! mlock, mlock2(MLOCK_ONFAULT) and mlockall(MCL_FUTURE), the last one with and without MCL_ONFAULT.

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys::{ANON, Map, PAGE, RW, cvt};

/// mlock2(2).
fn lock(map: &Map, flags: u32) -> std::io::Result<()> {
    // SAFETY: no Rust object lives in a `Map`.
    cvt(unsafe { libc::mlock2(map.addr as *const _, map.len, flags) }).map(drop)
}

fn flags(map: &Map) -> Outcome<Vec<String>> {
    let flags = map.smaps("VmFlags:")?.unwrap_or_default();
    Ok(flags.split(' ').filter(|flag| ["lo", "lf"].contains(flag)).map(str::to_owned).collect())
}

/// What a new mapping is; its neighbours must not swallow it, hence its access.
fn of_new() -> Outcome<Vec<String>> {
    let map = Map::new(4 * PAGE, RW | libc::PROT_EXEC, ANON, -1, 0)?;
    let found = flags(&map)?;
    map.unmap()?;
    Ok(found)
}

fn own(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let child = |name: &'static str, how: i32, expected: &'static [&'static str]| {
        ctl.child(name, move |ctl| {
            // SAFETY: takes flags.
            cvt(unsafe { libc::mlockall(how) })?;
            same("new mappings before", of_new()?, own(expected))?;
            ctl.wait_as(name)?;
            same(name, of_new()?, own(expected))
        })
    };
    let children = [
        child("future", libc::MCL_FUTURE, &["lo"])?,
        child("current and future", libc::MCL_FUTURE | libc::MCL_CURRENT, &["lo"])?,
        child("future on fault", libc::MCL_FUTURE | libc::MCL_ONFAULT, &["lo", "lf"])?,
        child("current", libc::MCL_CURRENT, &[])?,
    ];
    for name in ["future", "current and future", "future on fault", "current"] {
        ctl.await_ready(name)?;
    }
    let [locked, on_fault, hidden] = [Map::anon(16 * PAGE)?, Map::anon(17 * PAGE)?, Map::anon(18 * PAGE)?];
    locked.part(4 * PAGE, 8 * PAGE).fill(1);
    on_fault.part(0, PAGE).fill(2);
    hidden.fill(3);
    lock(&locked, 0)?;
    lock(&on_fault, libc::MLOCK_ONFAULT)?;
    lock(&hidden, 0)?;
    hidden.protect(libc::PROT_NONE)?;
    let resident = (locked.resident()?, on_fault.resident()?);

    if ctl.wait()? {
        on_fault.part(PAGE, PAGE).fill(9);
    }

    same("resident pages", (locked.resident()?, on_fault.resident()?), resident)?;
    same("locked", (flags(&locked)?, flags(&on_fault)?), (own(&["lo"]), own(&["lo", "lf"])))?;
    same("locked without access", flags(&hidden)?, own(&["lo"]))?;
    same("new mappings", of_new()?, own(&[]))?;
    locked.part(4 * PAGE, 8 * PAGE).check("locked memory", 1)?;
    hidden.protect(RW)?;
    hidden.check("locked memory without access", 3)?;
    ensure(on_fault.get(8) != 0, "memory locked on fault is gone")?;
    children.into_iter().try_for_each(|child| child.join())
}
