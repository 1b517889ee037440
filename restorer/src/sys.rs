//! System calls, and what their results mean.

use crate::proto::{Step, Table};
use core::arch::asm;

/// A failed step.
pub struct Failure {
    /// What was being done.
    pub step: Step,
    /// Errno of the call.
    pub errno: u32,
    /// Which entry.
    pub index: usize,
}

/// Result of a step.
pub type Outcome = Result<(), Failure>;

/// Numbers of asm/unistd_64.h.
#[allow(missing_docs)]
pub mod nr {
    pub const CLOSE: u64 = 3;
    pub const MMAP: u64 = 9;
    pub const MPROTECT: u64 = 10;
    pub const MUNMAP: u64 = 11;
    pub const RT_SIGACTION: u64 = 13;
    pub const RT_SIGPROCMASK: u64 = 14;
    pub const MREMAP: u64 = 25;
    pub const MINCORE: u64 = 27;
    pub const MADVISE: u64 = 28;
    pub const NANOSLEEP: u64 = 35;
    pub const GETITIMER: u64 = 36;
    pub const SETITIMER: u64 = 38;
    pub const EXIT: u64 = 60;
    pub const UMASK: u64 = 95;
    pub const GETGROUPS: u64 = 115;
    pub const SETGROUPS: u64 = 116;
    pub const SETRESUID: u64 = 117;
    pub const SETRESGID: u64 = 119;
    pub const SETFSUID: u64 = 122;
    pub const SETFSGID: u64 = 123;
    pub const CAPGET: u64 = 125;
    pub const CAPSET: u64 = 126;
    pub const RT_SIGQUEUEINFO: u64 = 129;
    pub const SIGALTSTACK: u64 = 131;
    pub const PERSONALITY: u64 = 135;
    pub const MLOCKALL: u64 = 151;
    pub const PRCTL: u64 = 157;
    pub const ARCH_PRCTL: u64 = 158;
    pub const FUTEX: u64 = 202;
    pub const SCHED_SETAFFINITY: u64 = 203;
    pub const SCHED_GETAFFINITY: u64 = 204;
    pub const SET_TID_ADDRESS: u64 = 218;
    pub const TIMER_CREATE: u64 = 222;
    pub const TIMER_SETTIME: u64 = 223;
    pub const TIMER_DELETE: u64 = 226;
    pub const CLOCK_GETTIME: u64 = 228;
    pub const EXIT_GROUP: u64 = 231;
    pub const SET_MEMPOLICY: u64 = 238;
    pub const IOPRIO_SET: u64 = 251;
    pub const SET_ROBUST_LIST: u64 = 273;
    pub const RT_TGSIGQUEUEINFO: u64 = 297;
    pub const PRLIMIT64: u64 = 302;
    pub const SCHED_SETATTR: u64 = 314;
    pub const SCHED_GETATTR: u64 = 315;
    pub const SECCOMP: u64 = 317;
    pub const MEMBARRIER: u64 = 324;
    pub const MLOCK2: u64 = 325;
    pub const RSEQ: u64 = 334;
    pub const MSEAL: u64 = 462;
}

/// A system call with up to six arguments; the result as the kernel gives it.
///
/// # Safety
/// That of the call: the restorer calls it on memory that its argument block names.
pub unsafe fn call<const N: usize>(number: u64, arguments: [u64; N]) -> i64 {
    let argument = |at: usize| arguments.get(at).copied().unwrap_or(0);
    let result: i64;
    // SAFETY: the syscall instruction clobbers rcx and r11 alone; what the call does to memory is the caller's claim.
    unsafe {
        asm!("syscall", inlateout("rax") number as i64 => result,
            in("rdi") argument(0), in("rsi") argument(1), in("rdx") argument(2),
            in("r10") argument(3), in("r8") argument(4), in("r9") argument(5),
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// [`call`] as a step.
///
/// # Safety
/// That of [`call`].
pub unsafe fn step<const N: usize>(
    step: Step,
    index: usize,
    number: u64,
    arguments: [u64; N],
) -> Result<u64, Failure> {
    // SAFETY: the caller's claim.
    let result = unsafe { call(number, arguments) };
    match u64::try_from(result) {
        Ok(value) => Ok(value),
        Err(_) => Err(Failure { step, errno: result.unsigned_abs() as u32, index }),
    }
}

impl<T> Table<T> {
    /// The entries.
    pub fn entries(&self) -> &'static [T] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: core wrote the table into the blob's memory, which stays mapped while the blob runs, and nobody writes
        // to it afterwards.
        unsafe { core::slice::from_raw_parts(self.address as *const T, self.len as usize) }
    }
}
