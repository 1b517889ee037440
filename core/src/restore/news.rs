//! What tasks that are being restored have to say before they are done: they have no log (their descriptors are the
//! image's), so their messages wait in shared memory until the first process puts them into the log.

use crate::plugins::log_sink;
use stasis_plugin_api::{
    abi_stable::std_types::RStr,
    forward_log::{Forward, LogSink},
};
use std::{
    cell::UnsafeCell,
    sync::{
        OnceLock,
        atomic::{
            AtomicI32, AtomicU32,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

/// Messages that are kept; of more, the number.
const SLOTS: usize = 2048;
/// Bytes of a message and its target.
const TEXT: usize = 496;

/// States of a slot: 0 is free.
const COMPLETE: u32 = 1;

#[repr(C)]
struct Message {
    state: AtomicU32,
    task: AtomicI32,
    level: AtomicU32,
    /// Length of the target, and in the upper half that of the message behind it.
    lengths: AtomicU32,
    text: UnsafeCell<[u8; TEXT]>,
}

/// The messages of all tasks of one restore. Zeroed memory is a valid value.
#[repr(C)]
pub struct News {
    /// Slots given away, and messages for which there was none.
    taken: AtomicU32,
    slots: [Message; SLOTS],
}

// SAFETY: a text is written only by the one whose `fetch_add` gave it that slot, and read only when `state` says that
// the writer is done.
unsafe impl Sync for News {}

impl News {
    /// Keeps a message; what does not fit into a slot is cut off.
    pub fn tell(&self, task: i32, level: u8, target: &str, message: &str) {
        let Some(slot) = self.slots.get(self.taken.fetch_add(1, Relaxed) as usize) else { return };
        let target = &target[..target.floor_char_boundary(TEXT / 4)];
        let message = &message[..message.floor_char_boundary(TEXT - target.len())];
        // SAFETY: the number of this slot was given to nobody else, and nobody reads it before it is complete.
        let text = unsafe { &mut *slot.text.get() };
        text[..target.len()].copy_from_slice(target.as_bytes());
        text[target.len()..][..message.len()].copy_from_slice(message.as_bytes());
        slot.task.store(task, Relaxed);
        slot.level.store(level.into(), Relaxed);
        slot.lengths.store(target.len() as u32 | (message.len() as u32) << 16, Relaxed);
        slot.state.store(COMPLETE, Release);
    }

    /// Puts all messages into the log of this process.
    pub fn log(&self) {
        let taken = self.taken.load(Relaxed) as usize;
        for slot in self.slots.iter().take(taken).filter(|slot| slot.state.load(Acquire) == COMPLETE) {
            let lengths = slot.lengths.load(Relaxed);
            // SAFETY: complete, so nobody writes it any more.
            let text = unsafe { &*slot.text.get() };
            let (target, rest) = text.split_at((lengths as usize & 0xffff).min(TEXT));
            let message = String::from_utf8_lossy(&rest[..(lengths as usize >> 16).min(rest.len())]);
            let target = String::from_utf8_lossy(target);
            let level = slot.level.load(Relaxed) as u8;
            let task = slot.task.load(Relaxed);
            log_sink::emit(level, (&*target).into(), (&*format!("in task {task}: {message}")).into());
        }
        if taken > SLOTS {
            tracing::warn!(
                "{} messages of tasks that were being restored were too many to be kept",
                taken - SLOTS
            );
        }
    }
}

static NEWS: OnceLock<&'static News> = OnceLock::new();

extern "C" fn wanted(_: u8, _: RStr<'_>) -> bool {
    true
}

extern "C" fn keep(level: u8, target: RStr<'_>, message: RStr<'_>) {
    if let Some(news) = NEWS.get() {
        news.tell(nix::unistd::getpid().as_raw(), level, target.as_str(), message.as_str());
    }
}

/// From now on this thread, and what it forks, keeps its messages for the first process.
pub fn divert(news: &'static News) {
    let sink = LogSink { max_level: log_sink::max_level(), enabled: wanted, emit: keep };
    let _ = NEWS.set(news);
    std::mem::forget(tracing::subscriber::set_default(Forward::new(sink)));
}

#[cfg(test)]
mod tests {
    use super::super::shared::Shared;

    #[test]
    fn messages_are_kept_cut_and_counted() {
        let news = Shared::new().unwrap().news();
        let long = "ä".repeat(super::TEXT);
        for _ in 0..super::SLOTS + 3 {
            news.tell(7, 2, "plugin", &long);
        }
        let _own = tracing::subscriber::set_default(tracing::subscriber::NoSubscriber::default());
        news.log();
        assert_eq!(news.taken.load(super::Relaxed) as usize, super::SLOTS + 3);
        let lengths = news.slots[0].lengths.load(super::Relaxed);
        assert_eq!(lengths & 0xffff, 6);
        assert!((lengths >> 16) as usize <= super::TEXT - 6);
    }
}
