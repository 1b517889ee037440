//! 1,000 threads, each with a value on its stack.

use std::sync::{Arc, Barrier};

use crate::ctl::{Ctl, Outcome, changed, same};
use crate::sys::gettid;

const COUNT: usize = 1000;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let ready = Arc::new(Barrier::new(COUNT + 1));
    let done = Arc::new(Barrier::new(COUNT + 1));
    let mut threads = Vec::new();
    for n in 0..COUNT {
        let (ready, done) = (ready.clone(), done.clone());
        let builder = std::thread::Builder::new().stack_size(64 << 10).name(format!("t{n}"));
        threads.push(builder.spawn(move || {
            let before = (n, gettid());
            ready.wait();
            done.wait();
            std::hint::black_box(before) == (n, gettid())
        })?);
    }
    ready.wait();

    let sabotage = ctl.wait()?;

    done.wait();
    let mut good = 0;
    for thread in threads {
        good += usize::from(thread.join().map_err(|_| changed("a thread panicked".into()))?);
    }
    same("threads that found all as it was", good, COUNT + usize::from(sabotage))
}
