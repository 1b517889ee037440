//! What the command and all restored tasks share: a stage that is complete when everybody has arrived, and the first
//! failure. Mapped by the first process before it forks; the pages exist once they are touched.

use super::{blob::proto::Status, news::News, sys};
use std::{
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

/// Bytes of a failure's text.
const TEXT: usize = 1 << 16;

/// The memory itself. Only atomics are read while others may write; the text is written by the one who won `failed`.
#[repr(C)]
struct Area {
    stage: AtomicU32,
    arrived: AtomicU32,
    /// 0, 1: being written, 2: complete.
    failed: AtomicU32,
    /// How many tasks have files with names for the moment, that nobody else knows: they must not be killed.
    names: AtomicU32,
    length: AtomicU32,
    text: [u8; TEXT],
    slots: [Slot; SLOTS],
    news: News,
}

/// Largest number of processes of a plan.
pub const SLOTS: usize = 1 << 16;

/// What one task tells the command.
#[repr(C, align(64))]
pub struct Slot {
    /// Where the restorer says what failed.
    pub status: Status,
    /// First address of the restorer's region.
    pub region_start: AtomicU64,
    /// First address after it; 0 as long as there is none.
    pub region_end: AtomicU64,
    /// Taken by the task that puts something into the descriptor table of this one, which it shares.
    pub table: AtomicU32,
    /// Entry, arguments and stack of the code that arms the timers; 0 if there are none.
    pub arming: [AtomicU64; 3],
}

/// The shared area; a copy refers to the same memory.
#[derive(Debug, Clone, Copy)]
pub struct Shared {
    area: NonNull<Area>,
}

// SAFETY: all access goes through atomics, the text is ordered by `failed`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// Somebody else has failed; his words are in the area.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another task failed")]
pub struct Aborted;

impl Shared {
    /// Maps a new area, which lives as long as any process that has it.
    pub fn new() -> std::io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let size = size_of::<Area>();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let area = unsafe {
            libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        match NonNull::new(area.cast::<Area>()) {
            Some(area) if area.as_ptr().cast::<libc::c_void>() != libc::MAP_FAILED => Ok(Self { area }),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    fn area(&self) -> &Area {
        // SAFETY: mapped zeroed by `new`, which is a valid `Area`, and never unmapped; `text` is only read when `failed`
        // says that nobody writes any more.
        unsafe { self.area.as_ref() }
    }

    /// Waits until all `count` processes have called this for the same stage.
    pub fn barrier(&self, count: usize) -> Result<(), Aborted> {
        let area = self.area();
        let stage = area.stage.load(Ordering::Acquire);
        if area.arrived.fetch_add(1, Ordering::AcqRel) + 1 == count as u32 {
            area.arrived.store(0, Ordering::Release);
            area.stage.store(stage + 1, Ordering::Release);
            sys::futex_wake(&area.stage);
            return self.check();
        }
        while area.stage.load(Ordering::Acquire) == stage {
            self.check()?;
            sys::futex_wait(&area.stage, stage, Duration::from_secs(1));
        }
        self.check()
    }

    /// This task must not be killed: it will take away names of files in a moment.
    pub fn hold(&self) {
        self.names().fetch_add(1, Ordering::AcqRel);
    }

    /// It may be killed again.
    pub fn let_go(&self) {
        self.names().fetch_sub(1, Ordering::AcqRel);
    }

    /// Not 0 while some task must not be killed.
    pub fn names(&self) -> &'static AtomicU32 {
        // SAFETY: as in `area`; the mapping is never unmapped, so it lives as long as the process.
        let area: &'static Area = unsafe { &*self.area.as_ptr() };
        &area.names
    }

    /// What tasks have to say.
    pub fn news(&self) -> &'static News {
        // SAFETY: as in `names`.
        let area: &'static Area = unsafe { &*self.area.as_ptr() };
        &area.news
    }

    /// What node `number` of the tree plan tells.
    pub fn slot(&self, number: usize) -> Option<&'static Slot> {
        // SAFETY: as in `names`.
        let area: &'static Area = unsafe { &*self.area.as_ptr() };
        area.slots.get(number)
    }

    /// Number of barriers passed.
    pub fn stage(&self) -> u32 {
        self.area().stage.load(Ordering::Acquire)
    }

    /// Whether somebody has failed.
    pub fn check(&self) -> Result<(), Aborted> {
        if self.area().failed.load(Ordering::Acquire) == 0 { Ok(()) } else { Err(Aborted) }
    }

    /// Records a failure, unless there is one already, and wakes everybody.
    pub fn fail(&self, text: &str) {
        let area = self.area();
        if area.failed.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return;
        }
        let length = text.len().min(TEXT);
        // SAFETY: the one who changed 0 to 1 is the only writer, and nobody reads before 2.
        unsafe {
            let to = (&raw mut (*self.area.as_ptr()).text).cast::<u8>();
            std::ptr::copy_nonoverlapping(text.as_ptr(), to, length);
        }
        area.length.store(length as u32, Ordering::Release);
        area.failed.store(2, Ordering::Release);
        sys::futex_wake(&area.stage);
    }

    /// What the first that failed said.
    pub fn failure(&self) -> Option<String> {
        let area = self.area();
        if area.failed.load(Ordering::Acquire) != 2 {
            return None;
        }
        let length = area.length.load(Ordering::Acquire) as usize;
        Some(String::from_utf8_lossy(&area.text[..length.min(TEXT)]).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_barrier_lets_all_pass_and_the_first_failure_stays() {
        let shared = Shared::new().unwrap();
        let others: Vec<_> = (0..3).map(|_| std::thread::spawn(move || shared.barrier(4))).collect();
        shared.barrier(4).unwrap();
        for other in others {
            assert_eq!(other.join().unwrap(), Ok(()));
        }
        assert_eq!(shared.stage(), 1);
        shared.fail("first");
        shared.fail("second");
        assert_eq!(shared.barrier(2), Err(Aborted));
        assert_eq!(shared.failure().as_deref(), Some("first"));
    }
}
