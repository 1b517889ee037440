//! Numbers of CPU time clocks (include/linux/posix-timers_types.h): three bits say what is measured, those above, inverted, whose
//! time it is; 0 stands for the caller.

/// Set if the time of one thread is measured, not that of a process.
const PER_THREAD: i32 = 4;
/// Scheduled time of one thread.
const THREAD_SCHED: i32 = PER_THREAD | 2;

/// Whether a clock is the CPU time of whichever thread names it.
pub fn is_own_thread(clock: i32) -> bool {
    clock == libc::CLOCK_THREAD_CPUTIME_ID || (clock < 0 && clock & PER_THREAD != 0 && !(clock >> 3) == 0)
}

/// The same clock, of thread `tid`, as any thread of its process may name it.
pub fn of_thread(tid: i32, clock: i32) -> i32 {
    let which = if clock < 0 { clock & 7 } else { THREAD_SCHED };
    (!tid << 3) | which
}

/// Whether a clock is CPU time, which begins anew with the process.
pub fn is_cpu_time(clock: i32) -> bool {
    clock < 0 || [libc::CLOCK_PROCESS_CPUTIME_ID, libc::CLOCK_THREAD_CPUTIME_ID].contains(&clock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_of_the_caller_and_of_others() {
        // MAKE_THREAD_CPUCLOCK(0, CPUCLOCK_SCHED), MAKE_PROCESS_CPUCLOCK(0, CPUCLOCK_SCHED).
        assert!(is_own_thread(-2) && is_own_thread(3));
        assert!(!is_own_thread(-6) && !is_own_thread(2) && !is_own_thread(1));
        assert_eq!(of_thread(0, -2), -2);
        assert_eq!(of_thread(1000, libc::CLOCK_THREAD_CPUTIME_ID), (!1000 << 3) | 6);
        assert!(!is_own_thread(of_thread(1000, -2)));
        assert!(is_cpu_time(-6) && is_cpu_time(2) && !is_cpu_time(1));
    }
}
