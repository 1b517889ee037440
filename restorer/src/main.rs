//! The restorer: the code that a restored task runs last, when the memory of the restoring process has to go.
//!
//! It is entered in the only thread of the process, with every signal blocked, `rdi` at its [`proto::Arguments`]. It
//! moves the task's memory home, makes the threads, and each thread restores what only itself can set; then each stops at
//! a trap with `rax` = [`proto::ARRIVED`], where the tracer takes over. After the trap no code of it runs: the tracer
//! unmaps its region.
#![no_std]
#![no_main]

mod credentials;
#[path = "../../parasite/src/mem.rs"]
mod mem;
mod memory;
mod own;
mod process;
mod proto;
mod sys;
mod thread;
mod timers;

use core::sync::atomic::Ordering;
use proto::{Arguments, Status, Step};
use sys::{Failure, call, nr};

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: exit_group(2) does not return and touches no memory. A panic can't reach the status: nothing here panics
    // but a broken argument block, and then the status may be anywhere.
    unsafe { call(nr::EXIT_GROUP, [Step::Panic as u64]) };
    loop {}
}

/// Entry: `rdi` = &Arguments, `rsi` = 0, or 1 to arm the timers when all threads have arrived; `rsp` = top of a stack in the blob's
/// region.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn _start() -> ! {
    core::arch::naked_asm!("xor ebp, ebp", "and rsp, -16", "call {main}", "ud2", main = sym leader)
}

/// All that the leader does.
extern "C" fn leader(arguments: &'static Arguments, arm: u64) -> ! {
    let outcome = match arm {
        0 => memory::restore(arguments).and_then(|()| process::restore(arguments)),
        _ => timers::arm(arguments),
    };
    let tid = arguments.threads.entries().first().map_or(0, |thread| thread.tid);
    match outcome {
        // The status of a thread that called exit(2): the code, shifted.
        // SAFETY: exit(2) ends this thread and touches no memory.
        Ok(()) if arm == 0 && arguments.leader_exits != 0 => unsafe {
            call(nr::EXIT, [u64::from(arguments.leader_status >> 8)]);
            loop {
                core::hint::spin_loop();
            }
        },
        Ok(()) => arrive(),
        Err(failure) => fail(arguments, tid, &failure),
    }
}

/// Says what failed, and ends the whole process.
fn fail(arguments: &Arguments, tid: i32, failure: &Failure) -> ! {
    // SAFETY: core put a Status there, inside the blob's region; all its fields are atomic.
    let status = unsafe { &*(arguments.status as *const Status) };
    let step = failure.step as u32;
    if status.step.compare_exchange(0, step, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
        status.errno.store(failure.errno, Ordering::Relaxed);
        status.index.store(failure.index as u32, Ordering::Relaxed);
        status.tid.store(tid as u32, Ordering::Release);
    }
    // SAFETY: exit_group(2) does not return.
    unsafe { call(nr::EXIT_GROUP, [1]) };
    loop {
        core::hint::spin_loop();
    }
}

/// The trap at which the tracer takes over.
fn arrive() -> ! {
    // An int3 whose signal is blocked would make the kernel reset the action of SIGTRAP (force_sig_info_to_task in
    // kernel/signal.c), so that one signal is let through. The tracer sets the mask of the image afterwards.
    let mask: u64 = !(1 << 4);
    const SIG_SETMASK: u64 = 2;
    // SAFETY: reads 8 bytes of this stack frame.
    unsafe { call(nr::RT_SIGPROCMASK, [SIG_SETMASK, &raw const mask as u64, 0, 8]) };
    // SAFETY: the tracer never lets a thread run on from here.
    unsafe { core::arch::asm!("int3", "ud2", in("rax") proto::ARRIVED, options(noreturn)) }
}
