//! The parasite: code that runs inside a task while it is dumped.
//!
//! It is a library, not a server: the guardian sets a stopped thread's registers to `_start` with an argument block in
//! rdi, lets it run, and it ends at an `int3`. It keeps nothing between calls and has no writable data.
#![no_std]
#![no_main]

mod mem;
mod pages;
pub mod protocol;
mod query;
mod sys;

use protocol::{Simple, command};

/// core refers to it although nothing here unwinds.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// See `rust_eh_personality`.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    loop {
        core::hint::spin_loop();
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: stops at int3, where the guardian sees the mark in rax and never continues from here.
    unsafe {
        core::arch::asm!("mov rax, {p}", "int3", "2: jmp 2b", p = const protocol::PANICKED, options(noreturn))
    }
}

/// rdi: the argument block; rsp: the top of a stack of its own; rsi: how to end.
///
/// `int3` makes the kernel force a SIGTRAP, which resets the signal's disposition if the process ignores it. For such a
/// process (rsi not 0) the guardian watches the system calls instead, and one that does not exist is the end.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn _start() -> ! {
    core::arch::naked_asm!(
        "xor ebp, ebp",
        "and rsp, -16",
        "mov rbx, rsi",
        "call {main}",
        "test rbx, rbx",
        "jz 2f",
        "mov eax, {done}",
        "syscall",
        "2:",
        "int3",
        "ud2",
        main = sym call,
        done = const protocol::DONE,
    )
}

const ENOSYS: i64 = -38;
const CLONE_FILES: u64 = 0x400;
const CLOSE_RANGE_UNSHARE: u64 = 2;

/// Forks with exit signal 0 (no SIGCHLD) and a shared descriptor table, which the child then replaces by an empty one,
/// so that no pipe end or lock is held or dropped by it. Returns in both; the child reports 0.
fn snapshot() -> i64 {
    // SAFETY: without CLONE_VM the child has its own copy of this stack.
    let child = unsafe { sys::syscall(sys::CLONE, [CLONE_FILES, 0, 0, 0, 0, 0]) };
    if child == 0 {
        // SAFETY: the table is unshared first; nothing of the parent is closed.
        let closed =
            unsafe { sys::syscall(sys::CLOSE_RANGE, [0, u32::MAX as u64, CLOSE_RANGE_UNSHARE, 0, 0, 0]) };
        return if closed < 0 { closed } else { 0 };
    }
    child
}

/// socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC).
fn channel(call: &mut Simple) -> i64 {
    let mut ends = [-1i32; 2];
    // SAFETY: the kernel writes two ints.
    let result = unsafe { sys::syscall(sys::SOCKETPAIR, [1, 2 | 0o2000000, 0, &raw mut ends as u64, 0, 0]) };
    call.values[0] = i64::from(ends[0]);
    call.values[1] = i64::from(ends[1]);
    result
}

/// struct msghdr (recvmsg(2)).
#[repr(C)]
struct Message {
    name: u64,
    name_len: u64,
    vectors: u64,
    vector_count: u64,
    control: u64,
    control_len: u64,
    flags: u64,
}

/// Takes one descriptor (values[1] is the receiving end), and closes both ends whatever comes.
fn receive(call: &mut Simple) -> i64 {
    let mut byte = 0u8;
    let mut control = [0u64; 4];
    let vector = [&raw mut byte as u64, 1u64];
    let mut message = Message {
        name: 0,
        name_len: 0,
        vectors: &raw const vector as u64,
        vector_count: 1,
        control: &raw mut control as u64,
        control_len: 24,
        flags: 0,
    };
    const MSG_DONTWAIT_CLOEXEC: u64 = 0x40 | 0x4000_0000;
    // SAFETY: every pointer in `message` is to a local that outlives the call.
    let got = unsafe {
        sys::syscall(
            sys::RECVMSG,
            [call.values[1] as u64, &raw mut message as u64, MSG_DONTWAIT_CLOEXEC, 0, 0, 0],
        )
    };
    for end in [call.values[0], call.values[1]] {
        // SAFETY: the descriptors that `channel` made.
        unsafe { sys::syscall(sys::CLOSE, [end as u64, 0, 0, 0, 0, 0]) };
    }
    if got < 0 {
        return got;
    }
    const EMFILE: i64 = -24;
    // struct cmsghdr: length (16 + 4), level SOL_SOCKET, type SCM_RIGHTS; then the number. MSG_CTRUNC: no room in the table.
    if message.control_len < 20 || control[0] != 20 { EMFILE } else { (control[2] as u32) as i64 }
}

/// Dispatches on the command word.
unsafe extern "C" fn call(block: *mut u64) {
    // SAFETY: the guardian has written a block of the type that the command word says, and nobody else uses it.
    unsafe {
        let result = match *block {
            command::PROCESS => query::process(&mut *block.cast()),
            command::THREAD => query::thread(&mut *block.cast()),
            command::SNAPSHOT => snapshot(),
            command::CHANNEL => channel(&mut *block.cast()),
            command::RECEIVE => receive(&mut *block.cast()),
            command::WRITE_PAGES => pages::write(&mut *block.cast()),
            command::TIMERS => query::timers(&mut *block.cast()),
            _ => ENOSYS,
        };
        block.add(1).cast::<i64>().write(result);
    }
}
