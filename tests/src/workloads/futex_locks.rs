//! Locks with priority inheritance (FUTEX_LOCK_PI, FUTEX_WAIT_REQUEUE_PI): an owner among the threads, waiters behind it, one of them
//! in another process.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::ctl::{Ctl, Outcome, changed, ensure, pause, poll_until, same};
use crate::sys::{Map, PAGE, cvt_long, gettid};

/// A lock with priority inheritance in shared memory, by the protocol of futex(2).
#[derive(Clone, Copy)]
struct Lock(&'static AtomicU32);

impl Lock {
    fn op(self, op: i32) -> std::io::Result<i64> {
        // SAFETY: the word lives as long as the process; no timeout.
        cvt_long(unsafe { libc::syscall(libc::SYS_futex, self.0.as_ptr(), op, 0, 0, 0, 0) })
    }

    fn lock(self) -> std::io::Result<()> {
        match self.0.compare_exchange(0, gettid() as u32, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => Ok(()),
            Err(_) => self.op(libc::FUTEX_LOCK_PI).map(drop),
        }
    }

    fn unlock(self) -> std::io::Result<()> {
        match self.0.compare_exchange(gettid() as u32, 0, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => Ok(()),
            Err(_) => self.op(libc::FUTEX_UNLOCK_PI).map(drop),
        }
    }

    fn owner(self) -> u32 {
        self.0.load(Ordering::SeqCst) & libc::FUTEX_TID_MASK
    }

    fn has_waiters(self) -> bool {
        self.0.load(Ordering::SeqCst) & libc::FUTEX_WAITERS != 0
    }
}

/// Words in shared memory.
struct Words(Map);

impl Words {
    fn word(&self, n: usize) -> &'static AtomicU32 {
        // SAFETY: the mapping stays until the process ends, and is used as atomic words alone.
        unsafe { AtomicU32::from_ptr((self.0.addr + n * 64) as *mut u32) }
    }
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let words = Words(Map::shared(PAGE)?);
    let (lock, second) = (Lock(words.word(0)), Lock(words.word(1)));
    let (condition, counter, go) = (words.word(2), words.word(3), words.word(4));
    // Held by this process, waited for in a child.
    second.lock()?;
    let child = ctl.child("child", move |ctl| {
        ctl.announce("ready.child", b"")?;
        second.lock()?;
        counter.fetch_add(100, Ordering::SeqCst);
        Ok(second.unlock()?)
    })?;
    ctl.await_ready("child")?;
    poll_until("the child waits", || second.has_waiters())?;
    // Held by a thread that is not the first one.
    let owner = std::thread::spawn(move || -> Outcome {
        lock.lock()?;
        let mine = gettid() as u32;
        while go.load(Ordering::SeqCst) == 0 {
            pause(Duration::from_millis(10));
        }
        same("owner of the lock", lock.owner(), mine)?;
        Ok(lock.unlock()?)
    });
    poll_until("the lock is held", || lock.owner() != 0)?;
    let waiters: Vec<_> = (0..3)
        .map(|_| {
            std::thread::spawn(move || -> Outcome {
                lock.lock()?;
                same("owner of the lock", lock.owner(), gettid() as u32)?;
                counter.fetch_add(1, Ordering::SeqCst);
                Ok(lock.unlock()?)
            })
        })
        .collect();
    // Waits on the condition, and is to be moved over to the lock when it is signalled.
    let requeued = std::thread::spawn(move || -> std::io::Result<i64> {
        let op = libc::FUTEX_WAIT_REQUEUE_PI;
        // SAFETY: both words live as long as the process; no timeout.
        let result = cvt_long(unsafe {
            libc::syscall(libc::SYS_futex, condition.as_ptr(), op, 0, 0, lock.0.as_ptr(), 0)
        });
        if result.is_ok() {
            counter.fetch_add(10, Ordering::SeqCst);
            lock.unlock()?;
        }
        result
    });
    poll_until("all wait", || lock.has_waiters())?;
    pause(Duration::from_millis(30));
    let state = (lock.0.load(Ordering::SeqCst), second.0.load(Ordering::SeqCst));

    if ctl.wait()? {
        counter.store(5, Ordering::SeqCst);
    }

    same("lock words", (lock.0.load(Ordering::SeqCst), second.0.load(Ordering::SeqCst)), state)?;
    ensure(counter.load(Ordering::SeqCst) == 0, "a waiter has gone on")?;
    ensure(!requeued.is_finished(), "the wait for the condition has ended")?;
    // A wait that a stop has interrupted may just be on its way back into the kernel.
    let requeue = || {
        let (op, all) = (libc::FUTEX_CMP_REQUEUE_PI, i32::MAX);
        // SAFETY: as above; wakes one, moves all others.
        cvt_long(unsafe {
            libc::syscall(libc::SYS_futex, condition.as_ptr(), op, 1, all, lock.0.as_ptr(), 0)
        })
    };
    let mut moved = 0;
    poll_until("somebody is moved to the lock", || {
        moved = requeue().unwrap_or(-1);
        moved != 0
    })?;
    same("moved to the lock", moved, 1)?;
    go.store(1, Ordering::SeqCst);
    let panicked = |_| changed("a thread panicked".into());
    owner.join().map_err(panicked)??;
    for waiter in waiters {
        waiter.join().map_err(panicked)??;
    }
    requeued.join().map_err(panicked)??;
    second.unlock()?;
    child.join()?;
    same("counted under the locks", counter.load(Ordering::SeqCst), 113)?;
    same("the locks are free", (lock.owner(), second.owner()), (0, 0))
}
