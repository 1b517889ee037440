//! Robust locks whose owners end after the restore, a thread and a process: the next one is told (FUTEX_OWNER_DIED). And the word
//! that the kernel clears when a thread has ended (CLONE_CHILD_CLEARTID), with a waiter on it.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use crate::ctl::{Ctl, Outcome, changed, ensure, pause, poll_until, same};
use crate::sys::{Map, PAGE};

/// A pthread mutex that is robust and shared between processes; in shared memory.
#[derive(Clone, Copy)]
struct Robust(usize);

impl Robust {
    fn new(address: usize) -> Outcome<Self> {
        let mutex = Self(address);
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: attributes are made before they are used, and the mutex lies in memory that stays.
        let result = unsafe {
            libc::pthread_mutexattr_init(attributes.as_mut_ptr());
            libc::pthread_mutexattr_setpshared(attributes.as_mut_ptr(), libc::PTHREAD_PROCESS_SHARED);
            libc::pthread_mutexattr_setrobust(attributes.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST);
            libc::pthread_mutex_init(mutex.get(), attributes.as_ptr())
        };
        same("pthread_mutex_init", result, 0)?;
        Ok(mutex)
    }

    fn get(self) -> *mut libc::pthread_mutex_t {
        self.0 as *mut _
    }

    /// pthread_mutex_lock(3); EOWNERDEAD if its owner has died.
    fn lock(self) -> i32 {
        // SAFETY: an initialised mutex.
        unsafe { libc::pthread_mutex_lock(self.get()) }
    }

    fn try_lock(self) -> i32 {
        // SAFETY: as above.
        unsafe { libc::pthread_mutex_trylock(self.get()) }
    }
}

static END: AtomicU32 = AtomicU32::new(0);
static HELD: AtomicU32 = AtomicU32::new(0);

/// Waits in the kernel until the thread has ended, as pthread_join(3) does: by the word that is cleared.
fn join(thread: std::thread::JoinHandle<()>) -> Outcome {
    thread.join().map_err(|_| changed("a thread panicked".into()))
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let map = Map::shared(PAGE)?;
    let [of_thread, of_process, waited] =
        [Robust::new(map.addr)?, Robust::new(map.addr + 64)?, Robust::new(map.addr + 128)?];
    let holder = std::thread::spawn(move || {
        of_thread.lock();
        waited.lock();
        HELD.store(1, Ordering::SeqCst);
        while END.load(Ordering::SeqCst) == 0 {
            pause(Duration::from_millis(5));
        }
        // Ends without unlocking.
    });
    let child = ctl.child("holder", move |ctl| {
        same("the child's lock", of_process.lock(), 0)?;
        ctl.wait_as("holder")?;
        loop {
            pause(Duration::from_secs(1));
        }
    })?;
    ctl.await_ready("holder")?;
    poll_until("the thread holds its locks", || HELD.load(Ordering::SeqCst) == 1)?;
    // One that waits in the kernel when the owner dies.
    let waiter = std::thread::spawn(move || waited.lock());
    let joiner = std::thread::spawn(move || join(holder));
    pause(Duration::from_millis(30));

    let sabotage = ctl.wait()?;

    same("locks before", (of_thread.try_lock(), of_process.try_lock()), (libc::EBUSY, libc::EBUSY))?;
    ensure(!waiter.is_finished() && !joiner.is_finished(), "a wait has ended early")?;
    if !sabotage {
        kill(child.pid, Signal::SIGKILL)?;
    }
    END.store(1, Ordering::SeqCst);
    joiner.join().map_err(|_| changed("a thread panicked".into()))??;
    same("the lock of the thread", of_thread.lock(), libc::EOWNERDEAD)?;
    same("the lock that was waited for", waiter.join().ok(), Some(libc::EOWNERDEAD))?;
    if sabotage {
        return Err(changed("the child was not ended".into()));
    }
    same("the child", child.join().is_err(), true)?;
    same("the lock of the process", of_process.lock(), libc::EOWNERDEAD)
}
