//! What the kernel knows of a thread by address: its robust list, its rseq area, the word it clears at the end.

use std::sync::{Arc, Barrier};

use crate::ctl::{Ctl, Outcome, changed, ensure, same};

/// get_robust_list(2) of the calling thread.
fn robust_list() -> (usize, usize) {
    let (mut head, mut len) = (0usize, 0usize);
    // SAFETY: both places live through the call.
    unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut len) };
    (head, len)
}

/// The address of glibc's rseq area, from `__rseq_offset` (rseq(2)); None if the C library registered none.
fn rseq_cpu() -> Option<u32> {
    // SAFETY: looks up two variables that glibc 2.35 and later export, and reads the registered area of this thread.
    unsafe {
        let size = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()) as *const u32;
        let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) as *const isize;
        if size.is_null() || offset.is_null() || *size == 0 {
            return None;
        }
        let thread_pointer: usize;
        std::arch::asm!("mov {}, fs:0", out(reg) thread_pointer);
        let area = thread_pointer.wrapping_add_signed(*offset) as *const u32;
        Some(area.add(1).read_volatile())
    }
}

/// What must hold in one thread.
fn check_here(list: (usize, usize), with_rseq: bool) -> Outcome {
    same("robust list", robust_list(), list)?;
    let Some(_) = rseq_cpu() else { return ensure(!with_rseq, "the rseq area is gone") };
    // The kernel fills in the number at each return from a preemption: moved to another processor, it must follow.
    for cpu in [0usize, 1, 0] {
        let mut set = nix::sched::CpuSet::new();
        set.set(cpu)?;
        if nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).is_ok() {
            same("processor in the rseq area", rseq_cpu(), Some(cpu as u32))?;
        }
    }
    Ok(())
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let barrier = Arc::new(Barrier::new(2));
    let (other, theirs) = (barrier.clone(), ctl.clone());
    let thread = std::thread::spawn(move || -> Outcome {
        let (list, with_rseq) = (robust_list(), rseq_cpu().is_some());
        other.wait();
        theirs.wait_for_request()?;
        check_here(list, with_rseq)
    });
    barrier.wait();
    let (list, with_rseq) = (robust_list(), rseq_cpu().is_some());

    if ctl.wait()? {
        // SAFETY: a list head that nobody walks before the process ends.
        unsafe { libc::syscall(libc::SYS_set_robust_list, 0x1000usize, 24usize) };
    }

    // The join waits for the kernel to clear the thread's word (set_tid_address(2)).
    thread.join().map_err(|_| changed("a thread panicked".into()))??;
    check_here(list, with_rseq)
}
