//! Interval timers and POSIX timers: made early, while there is the power to, and armed last, so that they lose no time.

use crate::proto::{Arguments, Interval, PosixTimer, Step};
use crate::sys::{Failure, Outcome, call, nr, step};

const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
const OFF: u64 = 0;
const ON: u64 = 1;
const TIMER_ABSTIME: u64 = 1;
const EEXIST: u32 = 17;
/// Where numbers can only be reached by counting, not further than this.
const COUNT_LIMIT: i32 = 1 << 20;
const SECOND: i64 = 1_000_000_000;

/// Makes the POSIX timers, unarmed.
pub fn create(arguments: &Arguments) -> Outcome {
    let timers = arguments.posix_timers.entries();
    if timers.is_empty() {
        return Ok(());
    }
    // SAFETY: no memory is involved. Since Linux 6.15; before, the numbers of a process count up from 0.
    let chosen = unsafe { call(nr::PRCTL, [PR_TIMER_CREATE_RESTORE_IDS, ON, 0, 0, 0]) } == 0;
    for (index, timer) in timers.iter().enumerate() {
        // A number that exists stands for the next one: with chosen numbers this happens only if the image has it twice.
        while make(index, timer)? != timer.id {
            if chosen || timer.id > COUNT_LIMIT {
                return Err(Failure { step: Step::CreateTimer, errno: EEXIST, index });
            }
        }
    }
    if chosen {
        // SAFETY: as above.
        unsafe { step(Step::CreateTimer, 0, nr::PRCTL, [PR_TIMER_CREATE_RESTORE_IDS, OFF, 0, 0, 0])? };
    }
    Ok(())
}

/// timer_create(2); gives the number, and keeps the timer only if it is the right one.
fn make(index: usize, timer: &PosixTimer) -> Result<i32, Failure> {
    let mut id = timer.id;
    let place = [timer.clock as u64, &raw const timer.event as u64, &raw mut id as u64];
    // SAFETY: the kernel reads a struct sigevent, and reads and writes a number of this stack frame.
    unsafe { step(Step::CreateTimer, index, nr::TIMER_CREATE, place)? };
    if id > timer.id {
        return Err(Failure { step: Step::CreateTimer, errno: EEXIST, index });
    }
    if id != timer.id {
        // SAFETY: takes a number.
        unsafe { step(Step::CreateTimer, index, nr::TIMER_DELETE, [id as u64])? };
    }
    Ok(id)
}

/// Arms all timers. Every signal is blocked.
pub fn arm(arguments: &Arguments) -> Outcome {
    for (which, timer) in arguments.timers.iter().enumerate() {
        if *timer != Default::default() {
            start(which, timer)?;
        }
    }
    let timers = arguments.posix_timers.entries();
    for &index in arguments.arm.entries() {
        if let Some(timer) = timers.get(index as usize) {
            set(index as usize, timer)?;
        }
    }
    Ok(())
}

/// setitimer(2). To the value of a timer of CPU time the kernel adds one tick of its clock (kernel/time/itimer.c), which is in
/// the value of the image already.
fn start(which: usize, timer: &Interval) -> Outcome {
    let set = |timer: &Interval| {
        // SAFETY: the kernel reads one struct itimerval.
        unsafe { step(Step::Timer, which, nr::SETITIMER, [which as u64, &raw const *timer as u64, 0]) }
    };
    set(timer)?;
    let mut now = Interval::default();
    // SAFETY: the kernel writes one struct itimerval.
    unsafe { step(Step::Timer, which, nr::GETITIMER, [which as u64, &raw mut now as u64])? };
    let microseconds = |timer: &Interval| timer.value_sec * 1_000_000 + timer.value_usec;
    let (wanted, surplus) = (microseconds(timer), microseconds(&now) - microseconds(timer));
    if surplus <= 0 || wanted <= surplus {
        return Ok(());
    }
    let value = wanted - surplus;
    set(&Interval { value_sec: value / 1_000_000, value_usec: value % 1_000_000, ..*timer }).map(drop)
}

fn set(index: usize, timer: &PosixTimer) -> Outcome {
    let mut when = [timer.interval[0], timer.interval[1], timer.value[0], timer.value[1]];
    let mut flags = 0;
    if timer.fire != 0 {
        // One interval before its next expiry: it fires at once, and counts overruns from now on in the old rhythm.
        let mut now = [0_i64; 2];
        // SAFETY: the kernel writes two words.
        unsafe { step(Step::ArmTimer, index, nr::CLOCK_GETTIME, [timer.clock as u64, &raw mut now as u64])? };
        let nanoseconds = |time: [i64; 2]| time[0] * SECOND + time[1];
        let past = nanoseconds(now) + nanoseconds(timer.value) - nanoseconds(timer.interval);
        let past = past.max(1);
        (when[2], when[3]) = (past / SECOND, past % SECOND);
        flags = TIMER_ABSTIME;
    }
    let place = [timer.id as u64, flags, &raw const when as u64, 0];
    // SAFETY: the kernel reads one struct itimerspec.
    unsafe { step(Step::ArmTimer, index, nr::TIMER_SETTIME, place)? };
    if timer.fire != 0 {
        // The next one in order fires after this one.
        let moment = [0_i64, 1];
        // SAFETY: the kernel reads one struct timespec.
        unsafe { call(nr::NANOSLEEP, [&raw const moment as u64, 0]) };
    }
    Ok(())
}
