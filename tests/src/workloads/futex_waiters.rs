//! Threads that wait on futexes in every way that is not a lock: plain, of a bitset, of several words at once (futex_waitv), and a
//! child that waits on shared memory. Each must be woken, and only by what it waits for.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::ctl::{Ctl, Fail, Outcome, changed, ensure, pause, same};
use crate::sys::{Map, PAGE, cvt_long};

/// futex(2) without a timeout.
fn futex(word: &AtomicU32, op: i32, value: u32, bits: u32) -> std::io::Result<i64> {
    // SAFETY: the word lives through the call, and neither a timeout nor a second word is given.
    cvt_long(unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, value, 0, 0, bits) })
}

/// struct futex_waitv (linux/futex.h).
#[repr(C)]
struct Waitv {
    value: u64,
    address: u64,
    flags: u32,
    reserved: u32,
}

const FUTEX2_SIZE_U32: u32 = 2;
const FUTEX2_PRIVATE: u32 = 128;
const SYS_FUTEX_WAITV: i64 = 449;

/// futex_waitv(2): waits on all of them, and tells which one woke it.
fn wait_any(words: &[AtomicU32]) -> std::io::Result<i64> {
    let list: Vec<Waitv> = words
        .iter()
        .map(|word| Waitv { value: 0, address: word.as_ptr() as u64, flags: FUTEX2_SIZE_U32 | FUTEX2_PRIVATE, reserved: 0 })
        .collect();
    // SAFETY: the list and its words live through the call.
    cvt_long(unsafe { libc::syscall(SYS_FUTEX_WAITV, list.as_ptr(), list.len(), 0, 0, libc::CLOCK_MONOTONIC) })
}

static PLAIN: AtomicU32 = AtomicU32::new(0);
static BITS: AtomicU32 = AtomicU32::new(0);
static ANY: [AtomicU32; 3] = [const { AtomicU32::new(0) }; 3];
/// Threads that have been woken, a bit each.
static WOKEN: AtomicU32 = AtomicU32::new(0);

const WAIT: i32 = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
const WAKE: i32 = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
const WAIT_BITSET: i32 = libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG;
const WAKE_BITSET: i32 = libc::FUTEX_WAKE_BITSET | libc::FUTEX_PRIVATE_FLAG;

fn woken(expected: u32) -> Outcome {
    pause(Duration::from_millis(20));
    same("threads that have been woken", WOKEN.load(Ordering::SeqCst), expected)
}

/// Wakes one, which must have been waiting.
fn wake(what: &str, woke: std::io::Result<i64>, sum: u32) -> Outcome {
    same(what, woke?, 1)?;
    crate::ctl::poll_until(what, || WOKEN.load(Ordering::SeqCst) == sum)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let shared = Map::shared(PAGE)?;
    // SAFETY: the mapping stays until the process ends, and is used as atomic words alone.
    let between = unsafe { AtomicU32::from_ptr(shared.addr as *mut u32) };
    let child = ctl.child("child", move |ctl| {
        ctl.announce("ready.child", b"")?;
        // An early return without a wake would be a changed value or EINTR: both end this with an error.
        same("a wait in shared memory", futex(between, libc::FUTEX_WAIT, 0, 0)?, 0)
    })?;
    ctl.await_ready("child")?;
    type Wait = fn() -> std::io::Result<i64>;
    let waits: [Wait; 4] = [
        || futex(&PLAIN, WAIT, 0, 0),
        || futex(&BITS, WAIT_BITSET, 0, 0b0001),
        || futex(&BITS, WAIT_BITSET, 0, 0b0100),
        || wait_any(&ANY),
    ];
    let threads: Vec<_> = (0..)
        .zip(waits)
        .map(|(number, wait)| {
            std::thread::spawn(move || {
                let result = wait();
                WOKEN.fetch_or(1 << number, Ordering::SeqCst);
                result
            })
        })
        .collect();
    pause(Duration::from_millis(30));
    if threads[3].is_finished() {
        return Err(Fail::Absent("the kernel has no futex_waitv".into()));
    }

    let sabotage = ctl.wait()?;

    woken(0)?;
    if sabotage {
        futex(&PLAIN, WAKE, 1, 0)?;
    }
    same("a wake for other bits", futex(&BITS, WAKE_BITSET, 9, 0b1010)?, 0)?;
    woken(0)?;
    wake("the wake of one bit", futex(&BITS, WAKE_BITSET, 9, 0b0100), 0b0100)?;
    wake("the wake of one of several words", futex(&ANY[1], WAKE, 1, 0), 0b1100)?;
    wake("the plain wake", futex(&PLAIN, WAKE, 1, 0), 0b1101)?;
    wake("the wake of the other bit", futex(&BITS, WAKE_BITSET, 9, 0b0001), 0b1111)?;
    let mut results = Vec::new();
    for thread in threads {
        results.push(thread.join().map_err(|_| changed("a thread panicked".into()))??);
    }
    same("results of the waits", results, vec![0, 0, 0, 1])?;
    ensure(futex(between, libc::FUTEX_WAKE, 1, 0)? == 1, "the child does not wait")?;
    child.join()
}
