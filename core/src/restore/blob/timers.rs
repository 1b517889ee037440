//! Which timers the restorer makes and arms, and which pending signals it leaves to them.

use super::proto::{PosixTimer, SignalEvent};
use crate::{
    clocks,
    image::records::{self, Task},
};

/// Pending signals that are to be queued before the timers are armed, of the process and of each thread.
#[derive(Debug, Default)]
pub struct Pending {
    process: Vec<Vec<u8>>,
    threads: Vec<Vec<Vec<u8>>>,
}

impl Pending {
    /// Of the process.
    pub fn of_process(&self) -> &[Vec<u8>] {
        &self.process
    }

    /// Of a thread, by its place in the record.
    pub fn of_thread(&self, index: usize) -> &[Vec<u8>] {
        self.threads.get(index).map_or(&[], Vec::as_slice)
    }
}

/// The timers ascending by number, the order in which to arm them, and the signals that remain.
///
/// A periodic timer whose signal is pending counts overruns until it is delivered, and goes on then. Only the kernel can queue a
/// signal that does this; so the timer fires once more, and the signal of the image is left out. A signal of a number lower than
/// SIGRTMIN, or of a thread's CPU time, which begins anew, stays as it is.
pub fn plan(task: &Task) -> (Vec<PosixTimer>, Vec<u64>, Pending) {
    let mut records: Vec<&records::PosixTimer> = task.posix_timers.iter().collect();
    records.sort_by_key(|timer| timer.id);
    let mut timers: Vec<PosixTimer> = records.iter().map(|record| timer(record)).collect();
    let mut arm = Vec::new();
    let mut remaining = |signals: &[Vec<u8>]| -> Vec<Vec<u8>> {
        let mut kept = Vec::with_capacity(signals.len());
        for info in signals {
            let index = timer_of(info).and_then(|id| timers.iter().position(|timer| timer.id == id));
            match index.map(|index| (index, &mut timers[index])) {
                Some((index, timer)) if repeats(timer) && timer.fire == 0 => {
                    timer.fire = 1;
                    arm.push(index as u64);
                }
                _ => kept.push(without_kernel_words(info)),
            }
        }
        kept
    };
    let pending = Pending {
        process: remaining(&task.pending),
        threads: task.threads.iter().map(|thread| remaining(&thread.pending)).collect(),
    };
    let armed = |timer: &PosixTimer| timer.fire == 0 && timer.value != [0; 2];
    let others = timers.iter().enumerate().filter(|(_, timer)| armed(timer)).map(|(index, _)| index as u64);
    arm.extend(others);
    (timers, arm, pending)
}

fn repeats(timer: &PosixTimer) -> bool {
    timer.interval != [0; 2] && timer.value != [0; 2] && !clocks::is_cpu_time(timer.clock)
}

fn timer(record: &records::PosixTimer) -> PosixTimer {
    const SECOND: u64 = 1_000_000_000;
    let split = |time: u64| [(time / SECOND) as i64, (time % SECOND) as i64];
    PosixTimer {
        id: record.id,
        clock: record.clock,
        event: SignalEvent {
            value: record.value,
            signal: record.signal,
            notify: record.notify,
            tid: record.tid,
            ..SignalEvent::default()
        },
        interval: split(record.interval_ns),
        value: split(record.value_ns),
        fire: 0,
    }
}

/// Fields of `siginfo_t` (include/uapi/asm-generic/siginfo.h).
const CODE: usize = 8;
const TIMER: usize = 16;
const PRIVATE: std::ops::Range<usize> = 32..36;
const SI_TIMER: i32 = -2;

fn word(info: &[u8], at: usize) -> i32 {
    info.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes)
}

/// The timer that sent a signal.
fn timer_of(info: &[u8]) -> Option<i32> {
    (word(info, CODE) == SI_TIMER).then(|| word(info, TIMER))
}

/// A timer's signal carries a word of the kernel's own, which means nothing in a new one.
fn without_kernel_words(info: &[u8]) -> Vec<u8> {
    let mut info = info.to_vec();
    if timer_of(&info).is_some()
        && let Some(private) = info.get_mut(PRIVATE)
    {
        private.fill(0);
    }
    info
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signal(code: i32, timer: i32) -> Vec<u8> {
        let mut info = vec![0; 128];
        info[0] = 34;
        info[CODE..CODE + 4].copy_from_slice(&code.to_ne_bytes());
        info[TIMER..TIMER + 4].copy_from_slice(&timer.to_ne_bytes());
        info[PRIVATE].fill(9);
        info
    }

    #[test]
    fn a_periodic_timer_sends_its_pending_signal_itself() {
        let timer = |id, interval_ns, value_ns| records::PosixTimer {
            id,
            clock: 1,
            interval_ns,
            value_ns,
            ..records::PosixTimer::default()
        };
        let task = Task {
            posix_timers: vec![timer(9, 50, 20), timer(3, 0, 0), timer(4, 0, 7)],
            pending: vec![signal(-1, 9), signal(SI_TIMER, 3), signal(SI_TIMER, 9)],
            ..Task::default()
        };
        let (timers, arm, pending) = plan(&task);
        let fire: Vec<_> = timers.iter().map(|timer| (timer.id, timer.fire)).collect();
        assert_eq!(fire, [(3, 0), (4, 0), (9, 1)]);
        assert_eq!(arm, [2, 1]);
        assert_eq!(pending.of_process().len(), 2);
        assert_eq!(pending.of_process()[0], signal(-1, 9));
        assert_eq!(pending.of_process()[1][PRIVATE], [0; 4]);
    }
}
