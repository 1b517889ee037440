//! Threads with credentials of their own, which only raw system calls give them.

use std::sync::mpsc;

use crate::ctl::{Ctl, Outcome, changed, ensure, same};
use crate::sys::{cvt_long, gettid};

/// Credential lines of the calling thread.
fn credentials() -> Outcome<String> {
    let status = std::fs::read_to_string(format!("/proc/self/task/{}/status", gettid()))?;
    let wanted = ["Uid:", "Gid:", "Groups:", "Cap", "NoNewPrivs:"];
    let lines = status.lines().filter(|line| wanted.iter().any(|start| line.starts_with(start)));
    // SAFETY: prctl takes numbers.
    let bits = unsafe { [libc::prctl(libc::PR_GET_SECUREBITS), libc::prctl(libc::PR_GET_KEEPCAPS)] };
    Ok(format!("{}\n{bits:?}", lines.collect::<Vec<_>>().join("\n")))
}

/// A raw call, which changes the calling thread alone.
fn raw(number: i64, arguments: [u64; 5]) -> std::io::Result<i64> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: numbers, or addresses of values that live through the call.
    cvt_long(unsafe { libc::syscall(number, a, b, c, d, e) })
}

fn prctl(option: i32, value: u64) -> std::io::Result<i64> {
    raw(libc::SYS_prctl, [option as u64, value, 0, 0, 0])
}

/// One thread's change of itself.
type Change = fn() -> std::io::Result<i64>;

const CHANGES: [(&str, Change); 7] = [
    ("nothing", || Ok(0)),
    ("users", || raw(libc::SYS_setresuid, [11, 12, 13, 0, 0])),
    ("groups", || {
        let groups = [21u32, 22];
        raw(libc::SYS_setgroups, [2, &raw const groups as u64, 0, 0, 0])
    }),
    ("group ids", || raw(libc::SYS_setresgid, [31, 32, 33, 0, 0])),
    ("capabilities", || {
        let header = [0x2008_0522u32, 0];
        let data = [1u32, 3, 1, 0, 0, 0];
        raw(libc::SYS_capset, [&raw const header as u64, &raw const data as u64, 0, 0, 0])
    }),
    ("securebits", || {
        prctl(libc::PR_SET_SECUREBITS, 4)?;
        prctl(libc::PR_SET_NO_NEW_PRIVS, 1)
    }),
    ("bounding set", || {
        prctl(libc::PR_SET_KEEPCAPS, 1)?;
        prctl(libc::PR_CAPBSET_DROP, 5)
    }),
];

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut threads = Vec::new();
    for (name, change) in CHANGES {
        let (ready, is_ready) = mpsc::channel();
        let (check, asked) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || -> Outcome<String> {
            change()?;
            let before = credentials()?;
            let _ = ready.send(before.clone());
            let _ = asked.recv();
            same(name, credentials()?, before.clone())?;
            Ok(before)
        });
        let before = is_ready.recv().map_err(|_| changed(format!("cannot change {name}")));
        threads.push((thread, check, before?));
    }
    let mut different: Vec<&String> = threads.iter().map(|(.., before)| before).collect();
    different.sort();
    different.dedup();
    ensure(different.len() == CHANGES.len(), "two threads have the same credentials")?;

    let sabotage = ctl.wait()?;

    for (thread, check, _) in threads {
        drop(check);
        thread.join().map_err(|_| changed("a thread panicked".into()))??;
    }
    ensure(!sabotage, "spoilt")
}
