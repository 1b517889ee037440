//! System calls, as numbers and registers: there is no libc here.
use core::arch::asm;

pub const CLOSE: u64 = 3;
pub const MMAP: u64 = 9;
pub const MUNMAP: u64 = 11;
pub const BRK: u64 = 12;
pub const RT_SIGACTION: u64 = 13;
pub const MINCORE: u64 = 27;
pub const MADVISE: u64 = 28;
pub const GETITIMER: u64 = 36;
pub const RECVMSG: u64 = 47;
pub const SOCKETPAIR: u64 = 53;
pub const CLONE: u64 = 56;
pub const GETRLIMIT: u64 = 97;
pub const SIGALTSTACK: u64 = 131;
pub const PRCTL: u64 = 157;
pub const ARCH_PRCTL: u64 = 158;
pub const TIMER_GETTIME: u64 = 224;
pub const TIMER_GETOVERRUN: u64 = 225;
pub const GET_MEMPOLICY: u64 = 239;
pub const KEYCTL: u64 = 250;
pub const PWRITEV: u64 = 296;
pub const MEMBARRIER: u64 = 324;
pub const CLOSE_RANGE: u64 = 436;

/// Makes a system call; the result is what the kernel leaves in rax.
///
/// # Safety
/// The arguments must be valid for that call, as its manual page says.
pub unsafe fn syscall(number: u64, a: [u64; 6]) -> i64 {
    let result: i64;
    // SAFETY: the caller vouches for the arguments; rcx and r11 are the only registers the instruction destroys.
    unsafe {
        asm!("syscall", inlateout("rax") number as i64 => result, in("rdi") a[0], in("rsi") a[1], in("rdx") a[2],
            in("r10") a[3], in("r8") a[4], in("r9") a[5], lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// prctl(2) with a plain result.
pub fn prctl(option: u64, second: u64) -> i64 {
    // SAFETY: the options this program uses with a number write nothing.
    unsafe { syscall(PRCTL, [option, second, 0, 0, 0, 0]) }
}

/// prctl(2) with an int result behind a pointer.
pub fn prctl_int(option: u64) -> i64 {
    let mut value = 0i32;
    // SAFETY: the kernel writes one int to `value`.
    match unsafe { syscall(PRCTL, [option, &raw mut value as u64, 0, 0, 0, 0]) } {
        0 => i64::from(value),
        error => error,
    }
}
