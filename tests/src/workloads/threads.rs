//! Threads with names, signal masks and thread-local values; ids, joins and locks work afterwards.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier, Mutex};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};

use crate::ctl::{Ctl, Outcome, changed, same};
use crate::sys::gettid;

const THREADS: usize = 8;

thread_local!(static VALUE: Cell<u64> = const { Cell::new(0) });

/// The mask of thread `n`.
fn mask(n: usize) -> SigSet {
    let mut set = SigSet::empty();
    set.add([Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGWINCH][n % 3]);
    set
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let ready = Arc::new(Barrier::new(THREADS + 1));
    let sum = Arc::new(Mutex::new(0));
    let spins = Arc::new(AtomicU32::new(0));
    let mut threads = Vec::new();
    for n in 0..THREADS {
        let (ready, sum, spins, ctl) = (ready.clone(), sum.clone(), spins.clone(), ctl.clone());
        let thread = std::thread::Builder::new().name(format!("worker-{n}")).spawn(move || -> Outcome {
            VALUE.set(n as u64 + 1000);
            let tid = gettid();
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask(n)), None)?;
            ready.wait();
            if ctl.wait_for_request()? && n == 3 {
                VALUE.set(0);
            }
            same("thread-local value", VALUE.get(), n as u64 + 1000)?;
            same("tid", gettid(), tid)?;
            same("mask", SigSet::thread_get_mask()?, mask(n))?;
            let name = std::fs::read_to_string(format!("/proc/self/task/{tid}/comm"))?;
            same("name", name.trim(), &format!("worker-{n}"))?;
            *sum.lock().map_err(|_| changed("the lock is poisoned".into()))? += n;
            spins.fetch_add(1, Ordering::SeqCst);
            Ok(())
        })?;
        threads.push(thread);
    }
    ready.wait();

    ctl.wait()?;

    for thread in threads {
        thread.join().map_err(|_| changed("a thread panicked".into()))??;
    }
    same("threads that passed", spins.load(Ordering::SeqCst) as usize, THREADS)?;
    same("sum under the lock", *sum.lock().map_err(|_| changed("the lock is poisoned".into()))?, 28)
}
