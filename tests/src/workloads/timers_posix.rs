//! POSIX timers: numbers with gaps, every way to notify, clocks, what remains, and signals that are pending.

use std::time::{Duration, Instant};

use crate::ctl::{Ctl, Outcome, changed, ensure, pause, same};
use crate::sys::{cvt_long, gettid};

/// struct itimerspec: interval, value; nanoseconds.
type Times = (i64, i64);

const SECOND: i64 = 1_000_000_000;
/// Far away.
const LONG: i64 = 1000 * SECOND;

/// timer_create(2), without the C library, which has numbers of its own.
fn create(clock: i32, notify: i32, signal: i32, value: usize, tid: i32) -> Outcome<i32> {
    // SAFETY: zeroes are a valid sigevent; the kernel writes one int.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = notify;
        event.sigev_signo = signal;
        event.sigev_value = libc::sigval { sival_ptr: value as *mut _ };
        event.sigev_notify_thread_id = tid;
        let mut id = -1i32;
        cvt_long(libc::syscall(libc::SYS_timer_create, clock, &event, &mut id))?;
        Ok(id)
    }
}

fn arm(id: i32, (interval, value): Times) -> Outcome {
    let words = [interval / SECOND, interval % SECOND, value / SECOND, value % SECOND];
    // SAFETY: struct itimerspec is four words.
    cvt_long(unsafe { libc::syscall(libc::SYS_timer_settime, id, 0, &words, 0usize) })?;
    Ok(())
}

fn times(id: i32) -> Outcome<Times> {
    let mut words = [0i64; 4];
    // SAFETY: as above.
    cvt_long(unsafe { libc::syscall(libc::SYS_timer_gettime, id, &mut words) })?;
    Ok((words[0] * SECOND + words[1], words[2] * SECOND + words[3]))
}

fn delete(id: i32) -> Outcome {
    // SAFETY: takes a number.
    cvt_long(unsafe { libc::syscall(libc::SYS_timer_delete, id) })?;
    Ok(())
}

/// Waits for one signal of a number: (code, timer, value, overruns).
fn take(signal: i32, wait: Duration) -> Option<(i32, i32, usize, i32)> {
    // SAFETY: all places live through the call.
    unsafe {
        let (mut set, mut info): (libc::sigset_t, libc::siginfo_t) = std::mem::zeroed();
        libc::sigaddset(&mut set, signal);
        let wait = libc::timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        let got = libc::syscall(libc::SYS_rt_sigtimedwait, &set, &mut info, &wait, 8usize) as i32;
        // siginfo_t of a timer: number, overrun, value from byte 16 on.
        let words = (&raw const info).cast::<i32>();
        (got == signal).then(|| {
            (info.si_code, words.add(4).read(), info.si_value().sival_ptr as usize, words.add(5).read())
        })
    }
}

fn block(signals: &[i32]) {
    // SAFETY: a set of this frame.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        signals.iter().for_each(|&signal| {
            libc::sigaddset(&mut set, signal);
        });
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
}

/// What /proc says of the timers of this process but for the numbers of threads in outer namespaces.
fn listed() -> Outcome<Vec<String>> {
    let text = std::fs::read_to_string("/proc/self/timers")?;
    let kept = |line: &&str| !line.starts_with("ClockID: -");
    Ok(text.lines().filter(kept).map(str::to_owned).collect())
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (pending, once, soon, other) =
        (libc::SIGRTMIN() + 2, libc::SIGRTMIN() + 3, libc::SIGRTMIN() + 4, libc::SIGRTMIN() + 5);
    block(&[pending, once, soon, other, libc::SIGUSR1]);
    let (send, receive) = std::sync::mpsc::channel();
    let theirs = ctl.clone();
    let thread = std::thread::spawn(move || -> Outcome {
        // Measures this thread's time, and tells this thread.
        let own = create(libc::CLOCK_THREAD_CPUTIME_ID, libc::SIGEV_THREAD_ID, libc::SIGUSR1, 3, gettid())?;
        arm(own, (0, LONG))?;
        let _ = send.send((gettid(), own));
        theirs.wait_for_request()?;
        let before = times(own)?.1;
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(30) {}
        ensure(times(own)?.1 < before, "the time of this thread does not count")
    });
    let (tid, own) = receive.recv().map_err(|_| changed("the thread has ended".into()))?;
    let unused: Vec<i32> = (0..5).map(|_| create(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0)).collect::<Outcome<_>>()?;
    let kinds = [
        (libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, libc::SIGUSR1, usize::MAX, 0),
        (libc::CLOCK_REALTIME, libc::SIGEV_NONE, 0, 0, 0),
        (libc::CLOCK_BOOTTIME, libc::SIGEV_THREAD_ID, libc::SIGUSR2, 7, tid),
        (libc::CLOCK_PROCESS_CPUTIME_ID, libc::SIGEV_SIGNAL, libc::SIGPROF, 8, 0),
    ];
    let began = Instant::now();
    let mut armed = Vec::new();
    for (n, (clock, notify, signal, value, tid)) in kinds.into_iter().enumerate() {
        let id = create(clock, notify, signal, value, tid)?;
        let set = (if n % 2 == 0 { 0 } else { 7 * SECOND }, LONG);
        arm(id, set)?;
        armed.push((id, set));
    }
    // Overruns are counted while its signal is pending, and it goes on when that is taken.
    let periodic = create(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, pending, 77, 0)?;
    arm(periodic, (20_000_000, 1_000_000))?;
    let fired = create(libc::CLOCK_REALTIME, libc::SIGEV_SIGNAL, once, 78, 0)?;
    arm(fired, (0, 1_000_000))?;
    let to_other = create(libc::CLOCK_MONOTONIC, libc::SIGEV_THREAD_ID, other, 79, gettid())?;
    arm(to_other, (0, 1_000_000))?;
    let idle = create(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, soon, 80, 0)?;
    unused.into_iter().try_for_each(delete)?;
    pause(Duration::from_millis(30));
    let before = listed()?;

    if ctl.wait()? {
        delete(armed[1].0)?;
    }

    same("timers in /proc", listed()?, before)?;
    for (id, (interval, value)) in &armed {
        let now = times(*id)?;
        same("an interval", now.0, *interval)?;
        let least = value - began.elapsed().as_nanos() as i64 - SECOND;
        ensure(now.1 <= *value && now.1 >= least, &format!("of timer {id} remain {now:?}, at least {least}"))?;
    }
    same("an unarmed timer", times(idle)?, (0, 0))?;
    let first = take(pending, Duration::ZERO).ok_or_else(|| changed("no signal is pending".into()))?;
    same("the pending signal", (first.0, first.1, first.2), (libc::SI_TIMER, periodic, 77))?;
    for _ in 0..2 {
        let next = take(pending, Duration::from_secs(10)).ok_or_else(|| changed("the timer has stopped".into()))?;
        same("the next signal", (next.0, next.1, next.2), (libc::SI_TIMER, periodic, 77))?;
    }
    for (signal, id, value) in [(once, fired, 78), (other, to_other, 79)] {
        let got = take(signal, Duration::ZERO).ok_or_else(|| changed("no signal is pending".into()))?;
        same("a signal", (got.0, got.1, got.2), (libc::SI_TIMER, id, value))?;
        ensure(take(signal, Duration::ZERO).is_none(), "a timer fired twice")?;
        same("a timer that has fired", times(id)?, (0, 0))?;
    }
    arm(idle, (0, 1_000_000))?;
    ensure(take(soon, Duration::from_secs(10)).is_some_and(|got| got.1 == idle), "a timer does not fire")?;
    thread.join().map_err(|_| changed("a thread panicked".into()))??;
    let last = create(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0)?;
    ensure(last > idle && last != own, "a number is given anew")
}
