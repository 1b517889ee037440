//! A random mixture: a tree of about fifty tasks, in which every task has states of its own and other workloads hang as
//! branches. The number in `DIR/seed` decides everything, so that a tree can be made again.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, SigSet, Signal, raise, signal};
use nix::unistd::{Pid, getpgrp, getpid, getsid, setpgid, setsid};

use crate::ctl::{Child, Ctl, Outcome, changed, ensure, poll_until, same};

/// How many tasks the tree has, about: the branches have more than one each.
const TASKS: u32 = 50;
/// What a branch counts for.
const BRANCH: u32 = 3;

/// Workloads that go on through any number of dumps, and in any place of a tree.
pub const BRANCHES: &[&str] = &[
    "devices",
    "epoll_basic",
    "epoll_dup",
    "epoll_nested",
    "eventfd",
    "fifo_named",
    "fifo_unlinked",
    "files_dirs",
    "files_flags",
    "files_named",
    "files_numbers",
    "files_offsets",
    "ghost_dirs",
    "ghost_exe",
    "ghost_files",
    "ghost_linked",
    "ghost_mapped",
    "ghost_nameless",
    "ghost_replaced",
    "inotify",
    "locks_all",
    "mem_cow_children",
    "mem_file_private",
    "mem_file_shared",
    "mem_growsdown",
    "mem_heap",
    "mem_madvise",
    "mem_private",
    "mem_shared",
    "mem_sparse",
    "mem_stack",
    "mem_vdso",
    "mem_zero",
    "memfd",
    "memfd_mapped",
    "pidfd",
    "pipe_data",
    "pipe_ends",
    "pipe_flags",
    "pipe_full",
    "pipe_packets",
    "poll_blocked",
    "prctl_state",
    "pty_data",
    "pty_sessions",
    "seccomp_strict",
    "seccomp_threads",
    "sig_altstack",
    "sig_handlers",
    "sig_pending",
    "sig_traps",
    "signalfd",
    "tcp_listen",
    "threads",
    "threads_credentials",
    "threads_dead_leader",
    "threads_futex",
    "threads_registers",
    "threads_rseq_robust",
    "timers_interval",
    "timers_posix",
    "tree_blocked",
    "tree_dead_leaders",
    "tree_groups",
    "tree_orphans",
    "tree_shared_files",
    "tree_shared_fs",
    "tree_zombies",
    "unix_datagrams",
    "unix_flight",
    "unix_names",
    "unix_pair",
    "unix_server",
    "unix_states",
];

/// SplitMix64: the same numbers from the same seed, everywhere.
#[derive(Debug, Clone)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % below.max(1)
    }
}

/// What a task keeps alive until it has been checked.
type Held = Vec<OwnedFd>;
/// Says whether a state is still as it was.
type Verify = Box<dyn FnOnce(&Held) -> Outcome>;

/// Takes on a state, with a number to vary it.
type Trait = fn(&Ctl, u64, &mut Held) -> Outcome<Verify>;

/// States that a task can take on by itself, each by its name in failures.
const TRAITS: &[(&str, Trait)] = &[
    ("group", |_, _, _| {
        // Fails in a session leader, which has a group of its own anyway.
        let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
        Ok(Box::new(|_| Ok(())))
    }),
    ("session", |_, _, _| {
        let _ = setsid();
        Ok(Box::new(|_| Ok(())))
    }),
    ("umask", |_, n, _| {
        let mask = (n % 0o100) as libc::mode_t;
        // SAFETY: cannot fail.
        unsafe { libc::umask(mask) };
        Ok(Box::new(move |_| {
            // SAFETY: cannot fail.
            same("umask", unsafe { libc::umask(0) }, mask)
        }))
    }),
    ("nice", |_, n, _| {
        // SAFETY: integer arguments. Less than the parent's may not be allowed, which changes nothing.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, (n % 10) as i32 + 5) };
        // SAFETY: as above.
        let nice = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let before = nice();
        Ok(Box::new(move |_| same("nice", nice(), before)))
    }),
    ("limit", |_, n, _| {
        let limit = 600 + n % 100;
        // As above, of the hard limit of the parent.
        let _ = setrlimit(Resource::RLIMIT_CORE, limit, limit);
        let before = getrlimit(Resource::RLIMIT_CORE)?;
        Ok(Box::new(move |_| same("RLIMIT_CORE", getrlimit(Resource::RLIMIT_CORE)?, before)))
    }),
    ("directory", |ctl, n, _| {
        let directory = ctl.work(&format!("directory.{}.{n}", getpid()));
        fs::create_dir_all(&directory)?;
        std::env::set_current_dir(&directory)?;
        Ok(Box::new(move |_| same("working directory", std::env::current_dir()?, directory)))
    }),
    ("pending", |_, _, _| {
        let set: SigSet = [Signal::SIGUSR1].into_iter().collect();
        set.thread_block()?;
        raise(Signal::SIGUSR1)?;
        Ok(Box::new(move |_| same("pending signal", set.wait()?, Signal::SIGUSR1)))
    }),
    ("ignored", |_, _, _| {
        // SAFETY: no handler function.
        unsafe { signal(Signal::SIGUSR2, SigHandler::SigIgn) }?;
        Ok(Box::new(|_| {
            raise(Signal::SIGUSR2)?;
            Ok(())
        }))
    }),
    ("pipe", |_, n, held| {
        let (reader, writer) = nix::unistd::pipe()?;
        nix::unistd::write(&writer, &n.to_ne_bytes())?;
        let number = reader.as_raw_fd();
        held.extend([reader, writer]);
        Ok(Box::new(move |held| {
            let mut bytes = [0; 8];
            let reader = held.iter().find(|fd| fd.as_raw_fd() == number);
            nix::unistd::read(reader.ok_or_else(|| changed("no reader".into()))?, &mut bytes)?;
            same("data in a pipe", u64::from_ne_bytes(bytes), n)
        }))
    }),
    ("memory", |_, n, _| {
        let words: Vec<u64> = (0..20_000 + n % 5_000).map(|i| i.wrapping_mul(n)).collect();
        Ok(Box::new(move |_| {
            ensure((0..).zip(&words).all(|(i, &word)| word == u64::wrapping_mul(i, n)), "memory has changed")
        }))
    }),
    ("reaper", |_, _, _| {
        nix::sys::prctl::set_child_subreaper(true)?;
        Ok(Box::new(|_| ensure(nix::sys::prctl::get_child_subreaper()?, "no subreaper any more")))
    }),
    ("slack", |_, n, _| {
        nix::sys::prctl::set_timerslack(60_000 + n)?;
        Ok(Box::new(move |_| same("timer slack", nix::sys::prctl::get_timerslack()? as u64, 60_000 + n)))
    }),
    ("name", |_, n, _| {
        let name = std::ffi::CString::new(format!("stress {}", n % 1000)).unwrap_or_default();
        nix::sys::prctl::set_name(&name)?;
        Ok(Box::new(move |_| same("name", nix::sys::prctl::get_name()?, name)))
    }),
];

/// A workload in a child.
fn branch(ctl: &Ctl, name: &'static str) -> Outcome<(Ctl, Child)> {
    let dir = ctl.dir().join(format!("part.{name}"));
    fs::create_dir_all(dir.join("work"))?;
    let part = super::find(name).ok_or_else(|| changed(format!("no workload is called {name}")))?;
    let own = ctl.moved(&dir);
    let child = ctl.child(name, |_| {
        // As it would find it in a process of its own.
        SigSet::empty().thread_set_mask()?;
        // SAFETY: no handler function.
        unsafe { signal(Signal::SIGUSR2, SigHandler::SigDfl) }?;
        // SAFETY: cannot fail.
        unsafe { libc::umask(0o022) };
        std::env::set_current_dir("/")?;
        (part.run)(&ctl.moved(&dir))
    })?;
    let failure = ctl.dir().join(format!("failure.{name}"));
    poll_until(&format!("{name} gets ready"), || dir.join("ready").exists() || failure.exists())?;
    Ok((own, child))
}

/// One task and everything below it. `number` is the first of its numbers: no other task has one of the `tasks` that follow.
fn member(ctl: &Ctl, dice: &mut Dice, branches: &[&'static str], number: u32, tasks: u32, root: bool) -> Outcome {
    let mut held = Held::new();
    let mut verify: Vec<(&str, Verify)> = Vec::new();
    for &(name, take_on) in TRAITS {
        let n = dice.roll(1 << 20);
        if dice.roll(3) == 0 && !(root && name == "session") {
            verify.push((name, take_on(ctl, n, &mut held)?));
        }
    }
    let place = (getpid(), getpgrp(), getsid(None)?);

    let mut children: Vec<Child> = Vec::new();
    let mut parts: Vec<(Ctl, Child)> = Vec::new();
    let (mut branches, mut next, mut left) = (branches, number + 1, tasks - 1);
    while left > 0 {
        if let (Some((&name, rest)), true) = (branches.split_first(), dice.roll(3) == 0 && left >= BRANCH) {
            parts.push(branch(ctl, name)?);
            (branches, next, left) = (rest, next + BRANCH, left - BRANCH);
            continue;
        }
        // A share of the branches for a share of the tasks.
        let share = if left > 4 { 1 + dice.roll(u64::from(left)) as u32 } else { 1 };
        let (theirs, rest) = branches.split_at(branches.len() * share as usize / (left as usize + 1));
        let mut own = Dice(dice.roll(u64::MAX));
        let name = format!("member.{next}");
        children.push(ctl.child(&name, |ctl| member(ctl, &mut own, theirs, next, share, false))?);
        let came = ["ready", "failure"].map(|what| ctl.dir().join(format!("{what}.{name}")));
        poll_until(&format!("{name} gets ready"), || came.iter().any(|file| file.exists()))?;
        (branches, next, left) = (rest, next + share, left - share);
    }

    let request = if root { ctl.wait()? } else { ctl.wait_as(&format!("member.{number}"))? };
    for (own, _) in &parts {
        own.announce("check-request", if request { b"sabotage" } else { b"check" })?;
    }
    let mut verdicts: Vec<Outcome> = vec![
        same("pid", getpid(), place.0),
        same("process group", getpgrp(), place.1),
        same("session", getsid(None)?, place.2),
    ];
    for (name, verify) in verify {
        verdicts.push(verify(&held).map_err(|fail| changed(format!("{name} of member {number}: {fail}"))));
    }
    verdicts.extend(children.into_iter().map(Child::join));
    for (own, child) in parts {
        verdicts.push(child.join());
        let _ = fs::remove_file(own.dir().join("check-request"));
    }
    verdicts.into_iter().collect()
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let seed = fs::read_to_string(ctl.dir().join("seed")).unwrap_or_default();
    let mut dice = Dice(seed.trim().parse().unwrap_or(1));
    let mut branches = BRANCHES.to_vec();
    for i in (1..branches.len()).rev() {
        branches.swap(i, dice.roll(i as u64 + 1) as usize);
    }
    member(ctl, &mut dice, &branches, 0, TASKS, true)
}
