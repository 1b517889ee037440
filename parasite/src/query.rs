//! What only a process or a thread itself can be asked.
use crate::protocol::{ProcessQuery, ThreadQuery, Timers};
use crate::sys::{self, prctl, prctl_int, syscall};

/// Fills the answer for the process.
pub fn process(query: &mut ProcessQuery) -> i64 {
    let mut signal = 1;
    while signal <= 64 {
        let action = &raw mut query.actions[signal - 1] as u64;
        // SAFETY: a null new action reads the old one, 32 bytes, into the answer.
        let result = unsafe { syscall(sys::RT_SIGACTION, [signal as u64, 0, action, 8, 0, 0]) };
        if result < 0 {
            return result;
        }
        signal += 1;
    }
    let mut which = 0;
    while which < 3 {
        let timer = &raw mut query.timers[which] as u64;
        // SAFETY: the kernel writes one struct itimerval.
        let result = unsafe { syscall(sys::GETITIMER, [which as u64, timer, 0, 0, 0, 0]) };
        if result < 0 {
            return result;
        }
        which += 1;
    }
    // SAFETY: brk(0) changes nothing.
    query.brk = unsafe { syscall(sys::BRK, [0; 6]) } as u64;
    query.dumpable = prctl(3, 0);
    query.child_subreaper = prctl_int(37);
    query.thp_disable = prctl(42, 0);
    query.mdwe = prctl(66, 0);
    query.memory_merge = prctl(68, 0);
    const MEMBARRIER_CMD_GET_REGISTRATIONS: u64 = 1 << 9;
    // SAFETY: takes numbers only.
    query.membarrier = unsafe { syscall(sys::MEMBARRIER, [MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0, 0, 0, 0]) };
    query.lock_future = lock_future();
    if query.lock_future < 0 { query.lock_future } else { 0 }
}

/// What mlockall(2) has set for mappings to come (MCL_FUTURE, MCL_ONFAULT). No file shows it, so a page is mapped to see: the kernel
/// drops no page that is locked (madvise(2), MADV_DONTNEED), and populates it at once unless it waits for a fault.
fn lock_future() -> i64 {
    const PAGE: u64 = 4096;
    const READ_WRITE: u64 = 3;
    const PRIVATE_ANONYMOUS: u64 = 0x22;
    const MADV_DONTNEED: u64 = 4;
    const EINVAL: i64 = -22;
    const MCL_FUTURE: i64 = 2;
    const MCL_ONFAULT: i64 = 4;
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let page = unsafe { syscall(sys::MMAP, [0, PAGE, READ_WRITE, PRIVATE_ANONYMOUS, u64::MAX, 0]) };
    if (-4095..0).contains(&page) {
        return page;
    }
    let mut resident = 0u8;
    // SAFETY: one page, one byte.
    unsafe { syscall(sys::MINCORE, [page as u64, PAGE, &raw mut resident as u64, 0, 0, 0]) };
    // SAFETY: the page holds nothing.
    let dropped = unsafe { syscall(sys::MADVISE, [page as u64, PAGE, MADV_DONTNEED, 0, 0, 0]) };
    // SAFETY: the mapping from above.
    unsafe { syscall(sys::MUNMAP, [page as u64, PAGE, 0, 0, 0, 0]) };
    match (dropped, resident & 1) {
        (EINVAL, 1) => MCL_FUTURE,
        (EINVAL, _) => MCL_FUTURE | MCL_ONFAULT,
        _ => 0,
    }
}

/// struct stack_t (sigaltstack(2)).
#[repr(C)]
struct AlternateStack {
    pointer: u64,
    flags: i32,
    size: u64,
}

/// Fills the answer for the calling thread.
pub fn thread(query: &mut ThreadQuery) -> i64 {
    let mut stack = AlternateStack { pointer: 0, flags: 0, size: 0 };
    // SAFETY: a null new stack reads the old one.
    let result = unsafe { syscall(sys::SIGALTSTACK, [0, &raw mut stack as u64, 0, 0, 0, 0]) };
    query.stack_pointer = stack.pointer;
    query.stack_flags = i64::from(stack.flags);
    query.stack_size = stack.size;
    let mut address = 0u64;
    // SAFETY: PR_GET_TID_ADDRESS writes one pointer.
    if unsafe { syscall(sys::PRCTL, [40, &raw mut address as u64, 0, 0, 0, 0]) } == 0 {
        query.clear_child_tid = address;
    }
    query.parent_death_signal = prctl_int(2);
    query.timer_slack = prctl(30, 0);
    query.securebits = prctl(27, 0);
    query.keep_capabilities = prctl(7, 0);
    query.no_new_privileges = prctl(39, 0);
    query.tsc = prctl_int(25);
    // SAFETY: ARCH_GET_CPUID takes no argument.
    query.cpuid = unsafe { syscall(sys::ARCH_PRCTL, [0x1011, 0, 0, 0, 0, 0]) };
    query.machine_check_policy = prctl(34, 0);
    query.io_flusher = prctl(58, 0);
    let mut which = 0;
    while which < 3 {
        query.speculation[which] = prctl(52, which as u64);
        which += 1;
    }
    let mut mode = 0i32;
    let nodes = &raw mut query.memory_nodes as u64;
    // SAFETY: the kernel writes one int and at most 1024 bits.
    let policy = unsafe { syscall(sys::GET_MEMPOLICY, [&raw mut mode as u64, nodes, 1024, 0, 0, 0]) };
    const KEYCTL_GET_KEYRING_ID: u64 = 0;
    // KEY_SPEC_THREAD_KEYRING and KEY_SPEC_PROCESS_KEYRING. Not that of the session: asking for it makes one.
    let mut ring = 0;
    while ring < 2 {
        let special = -1 - ring as i64;
        // SAFETY: takes numbers only, and makes no keyring.
        query.keyrings[ring] =
            unsafe { syscall(sys::KEYCTL, [KEYCTL_GET_KEYRING_ID, special as u64, 0, 0, 0, 0]) };
        ring += 1;
    }
    query.memory_policy = if policy == 0 { i64::from(mode) } else { policy };
    result
}

/// Fills in the POSIX timers asked for.
pub fn timers(query: &mut Timers) -> i64 {
    let mut i = 0;
    while i < query.count as usize && i < query.timers.len() {
        let timer = &mut query.timers[i];
        let mut value = [0i64; 4];
        // SAFETY: struct itimerspec is four words: interval, then value.
        timer.result =
            unsafe { syscall(sys::TIMER_GETTIME, [timer.id as u64, &raw mut value as u64, 0, 0, 0, 0]) };
        timer.interval = [value[0], value[1]];
        timer.value = [value[2], value[3]];
        // SAFETY: takes a number only.
        timer.overrun = unsafe { syscall(sys::TIMER_GETOVERRUN, [timer.id as u64, 0, 0, 0, 0, 0]) };
        i += 1;
    }
    0
}
