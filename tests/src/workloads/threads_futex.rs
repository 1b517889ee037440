//! Threads that wait on a lock, a condition and a channel without end, and go on when woken.

use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::Duration;

use crate::ctl::{Ctl, Outcome, changed, ensure, pause, same};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let broken = || changed("a lock is poisoned or a channel closed".into());
    let lock = Arc::new(Mutex::new(0));
    let pair = Arc::new((Mutex::new(false), Condvar::new()));
    let (sender, receiver) = mpsc::channel();
    let held = lock.lock().map_err(|_| broken())?;
    let (lock2, pair2) = (lock.clone(), pair.clone());
    let on_lock = std::thread::spawn(move || lock2.lock().map(|mut n| *n += 1).is_ok());
    let on_condition = std::thread::spawn(move || {
        let Ok(mut go) = pair2.0.lock() else { return false };
        while !*go {
            let Ok(next) = pair2.1.wait(go) else { return false };
            go = next;
        }
        true
    });
    let on_channel = std::thread::spawn(move || receiver.recv().ok() == Some(17));
    pause(Duration::from_millis(30));

    let sabotage = ctl.wait()?;

    ensure(!on_lock.is_finished() && !on_condition.is_finished() && !on_channel.is_finished(), "a thread woke up early")?;
    drop(held);
    *pair.0.lock().map_err(|_| broken())? = true;
    pair.1.notify_all();
    sender.send(if sabotage { 18 } else { 17 }).map_err(|_| broken())?;
    for thread in [on_lock, on_condition, on_channel] {
        ensure(thread.join().map_err(|_| broken())?, "a woken thread found something else")?;
    }
    same("value under the lock", *lock.lock().map_err(|_| broken())?, 1)
}
