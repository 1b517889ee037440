//! The hook status page: which hooks run right now, in whichever process, for the supervisor.
//!
//! It is shared memory made before anything is forked, so it can be read after a process that ran a hook has crashed.
//! All of it is atomics; a slot is written by the thread that claimed it and read under a sequence number.

use nix::{
    sys::mman::{MapFlags, ProtFlags, mmap_anonymous},
    time::{ClockId, clock_gettime},
};
use std::{
    num::NonZeroUsize,
    sync::atomic::{
        AtomicI32, AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
    time::Duration,
};

/// Hooks that can run at the same time; more wait for a slot.
const SLOTS: usize = 1024;
/// Longest text of a slot, in words of eight bytes.
const WORDS: usize = 24;

#[repr(C)]
struct Slot {
    /// Thread that has the slot, as it sees itself; 0: free.
    owner: AtomicI32,
    /// Odd while the contents are valid.
    sequence: AtomicU32,
    /// CLOCK_MONOTONIC, in ns.
    since: AtomicU64,
    /// Task that the hook works for.
    task: AtomicI32,
    /// Lengths of plugin, hook and object within the text, one byte each.
    lengths: AtomicU32,
    text: [AtomicU64; WORDS],
}

/// The page.
#[repr(C)]
pub struct HookWatch {
    slots: [Slot; SLOTS],
}

/// A hook that runs, or ran when its process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningHook {
    /// The plugin.
    pub plugin: String,
    /// The hook, e.g. "dump".
    pub hook: String,
    /// The object, e.g. `pipe:[4711]`.
    pub object: String,
    /// The task that the hook works for; 0 if for none.
    pub task: i32,
    /// The thread that runs it, in its own pid namespace.
    pub thread: i32,
    /// For how long.
    pub elapsed: Duration,
}

impl HookWatch {
    /// Makes the page, shared with all processes forked from now on. It lives as long as they do.
    pub fn new() -> std::io::Result<&'static Self> {
        let size = NonZeroUsize::new(size_of::<Self>()).unwrap_or(NonZeroUsize::MIN);
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let page =
            unsafe { mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) }?;
        // SAFETY: the mapping has the right size, is page-aligned, never unmapped by us, and zeroed, which is valid for
        // atomic integers. All access is through these atomics.
        Ok(unsafe { page.cast::<Self>().as_ref() })
    }

    /// Notes that the calling thread runs a hook, until the guard is dropped.
    pub fn enter(&self, plugin: &str, hook: &str, task: i32, object: &str) -> Running<'_> {
        let thread = nix::unistd::gettid().as_raw();
        let slot = self.claim(thread);
        let texts = [cut(plugin, 48), cut(hook, 24), cut(object, WORDS * 8 - 72)];
        let mut bytes = [0; WORDS * 8];
        let mut lengths = 0;
        let mut end = 0;
        for (i, text) in texts.iter().enumerate() {
            bytes[end..end + text.len()].copy_from_slice(text.as_bytes());
            end += text.len();
            lengths |= (text.len() as u32) << (8 * i);
        }
        for (word, bytes) in slot.text.iter().zip(bytes.chunks_exact(8)).take(end.div_ceil(8)) {
            word.store(bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)), Relaxed);
        }
        slot.lengths.store(lengths, Relaxed);
        slot.task.store(task, Relaxed);
        slot.since.store(monotonic(), Relaxed);
        slot.sequence.fetch_add(1, Release);
        Running { slot }
    }

    fn claim(&self, thread: i32) -> &Slot {
        // Threads start at different places, so that they rarely meet.
        let start = thread.unsigned_abs() as usize;
        loop {
            for i in 0..SLOTS {
                let slot = &self.slots[(start + i) % SLOTS];
                if slot.owner.compare_exchange(0, thread, Acquire, Relaxed).is_ok() {
                    return slot;
                }
            }
            std::thread::yield_now();
        }
    }

    /// All hooks that run now, the longest first.
    pub fn read(&self) -> Vec<RunningHook> {
        let now = monotonic();
        let mut hooks: Vec<_> = self.slots.iter().filter_map(|slot| slot.read(now)).collect();
        hooks.sort_by_key(|hook| std::cmp::Reverse(hook.elapsed));
        hooks
    }
}

impl Slot {
    fn read(&self, now: u64) -> Option<RunningHook> {
        let before = self.sequence.load(Acquire);
        if before.is_multiple_of(2) {
            return None;
        }
        let bytes: Vec<u8> = self.text.iter().flat_map(|word| word.load(Relaxed).to_le_bytes()).collect();
        let lengths = self.lengths.load(Relaxed);
        let task = self.task.load(Relaxed);
        let since = self.since.load(Relaxed);
        let thread = self.owner.load(Relaxed);
        std::sync::atomic::fence(Acquire);
        if self.sequence.load(Relaxed) != before {
            // It ended just now.
            return None;
        }
        let mut rest = &bytes[..];
        let mut texts = (0..3).map(|i| {
            let (text, later) =
                rest.split_at_checked((lengths >> (8 * i) & 0xff) as usize).unwrap_or_default();
            rest = later;
            String::from_utf8_lossy(text).into_owned()
        });
        let (plugin, hook, object) = (texts.next()?, texts.next()?, texts.next()?);
        let elapsed = Duration::from_nanos(now.saturating_sub(since));
        Some(RunningHook { plugin, hook, object, task, thread, elapsed })
    }
}

/// While this lives, a hook runs.
pub struct Running<'a> {
    slot: &'a Slot,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.slot.sequence.fetch_add(1, Release);
        self.slot.owner.store(0, Release);
    }
}

/// As much of `text` as fits.
fn cut(text: &str, limit: usize) -> &str {
    &text[..text.floor_char_boundary(limit.min(255))]
}

fn monotonic() -> u64 {
    // The clock exists on every kernel.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| Duration::from(time).as_nanos() as u64)
}

/// For the supervisor.
impl crate::front::Watch for HookWatch {
    fn running(&self) -> Vec<crate::front::RunningHook> {
        self.read().into_iter().map(Into::into).collect()
    }
}

impl From<RunningHook> for crate::front::RunningHook {
    fn from(hook: RunningHook) -> Self {
        let RunningHook { plugin, hook, task, thread, elapsed, .. } = hook;
        Self { plugin, hook, task, thread, elapsed }
    }
}
