//! Registers, instructions and system call numbers of x86_64.

use serde::{Deserialize, Serialize};

/// struct user_regs_struct (sys/user.h), as PTRACE_GETREGS gives it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

/// Bytes of [`Registers`].
pub const REGISTERS_LEN: usize = size_of::<Registers>();

/// The instruction that makes a system call.
pub const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];

/// orig_rax of a thread that is not in a system call.
pub const NO_SYSCALL: u64 = u64::MAX;

/// A system call was interrupted and goes on by restart_syscall(2) (include/linux/errno.h).
pub const ERESTART_RESTARTBLOCK: i64 = -516;

/// Direction and trap flag of eflags.
const DIRECTION_AND_TRAP: u64 = 0x500;

/// Selector of 64-bit user code (arch/x86/include/asm/segment.h).
const USER_CODE_64: u64 = 0x33;

impl Registers {
    /// As bytes, in the kernel's layout.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words().iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// From the kernel's layout; `None` if the length is wrong.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let words: &[u8; REGISTERS_LEN] = bytes.try_into().ok()?;
        // SAFETY: 27 words in any bit pattern are a valid `Registers`; the read is unaligned.
        Some(unsafe { words.as_ptr().cast::<Self>().read_unaligned() })
    }

    fn words(&self) -> [u64; REGISTERS_LEN / 8] {
        // SAFETY: repr(C), nothing but u64: same size, same layout.
        unsafe { std::mem::transmute(*self) }
    }

    /// False for a task in 32-bit mode.
    pub fn is_64_bit(&self) -> bool {
        self.cs == USER_CODE_64
    }

    /// The system call the thread is in.
    pub fn syscall(&self) -> Option<u64> {
        (self.orig_rax as i64 >= 0).then_some(self.orig_rax)
    }

    /// What the system call returns: a value or a negative errno.
    pub fn result(&self) -> i64 {
        self.rax as i64
    }

    /// Goes back to before the system call instruction, so that the call is made once more.
    pub fn rewind(&mut self) {
        self.rax = self.orig_rax;
        self.rip = self.rip.wrapping_sub(SYSCALL_INSTRUCTION.len() as u64);
        self.orig_rax = NO_SYSCALL;
    }

    /// As they are in a system call that was made with these arguments; all else is 0.
    pub fn in_syscall(number: u64, arguments: [u64; 6]) -> Self {
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        Self { orig_rax: number, rdi, rsi, rdx, r10, r8, r9, ..Self::default() }
    }

    /// Another number of milliseconds for a wait of which [`timeout_of_uninterruptible_wait`] says that it has one.
    pub fn set_milliseconds(&mut self, milliseconds: i32) {
        self.r10 = milliseconds as u64;
    }

    /// These registers, changed to make a system call by the instruction at `at`.
    pub fn for_syscall(&self, at: u64, number: u64, arguments: [u64; 6]) -> Self {
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let eflags = self.eflags & !DIRECTION_AND_TRAP;
        // orig_rax: no restart of an interrupted call on the way out.
        Self { rax: number, rdi, rsi, rdx, r10, r8, r9, rip: at, orig_rax: NO_SYSCALL, eflags, ..*self }
    }

    /// These registers, changed to run a blob's entry with one argument.
    pub fn for_call(&self, entry: u64, argument: u64, stack_top: u64) -> Self {
        let eflags = self.eflags & !DIRECTION_AND_TRAP;
        Self { rip: entry, rdi: argument, rsp: stack_top & !15, orig_rax: NO_SYSCALL, eflags, ..*self }
    }
}

/// Waits that return EINTR after a stop by ptrace though no handler ran, where other calls are restarted by the kernel
/// (signal(7), "Interruption of system calls"), with where their timeout is.
pub fn timeout_of_uninterruptible_wait(registers: &Registers) -> Option<Timeout> {
    use Timeout::{Infinite, Milliseconds, Timespec};
    let pointer = |address: u64| if address == 0 { Infinite } else { Timespec(address) };
    let argument = registers;
    Some(match registers.syscall()? {
        // waits for ready descriptors: fs/eventpoll.c
        232 | 281 => match argument.r10 as i32 {
            negative if negative < 0 => Infinite,
            milliseconds => Milliseconds(milliseconds),
        },
        441 => pointer(argument.r10),
        65 => Infinite,               // semop
        220 => pointer(argument.r10), // semtimedop
        128 => pointer(argument.rdx), // rt_sigtimedwait
        208 => pointer(argument.r8),  // io_getevents
        333 => pointer(argument.r8),  // io_pgetevents
        _ => return None,
    })
}

/// Whether the timer of such a wait has a slack that is a part of its limit, rather than that of its thread (fs/eventpoll.c).
pub fn slack_is_part_of_limit(call: u64) -> bool {
    [232, 281, 441].contains(&call)
}

/// A call that may wait on a socket, and so return EINTR after a stop if the socket has a timeout (socket(7), SO_RCVTIMEO and SO_SNDTIMEO).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketWait {
    /// Its descriptor.
    pub fd: u32,
    /// By which of the two timeouts it waits: SO_SNDTIMEO, else SO_RCVTIMEO.
    pub sends: bool,
    /// Other kinds of files have this call, too.
    pub of_any_file: bool,
}

/// Number, whether it sends, whether other kinds of files have it too.
const SOCKET_WAITS: [(u64, bool, bool); 13] = [
    (43, false, false),  // accept
    (288, false, false), // accept4
    (45, false, false),  // recvfrom
    (47, false, false),  // recvmsg
    (299, false, false), // recvmmsg
    (42, true, false),   // connect
    (44, true, false),   // sendto
    (46, true, false),   // sendmsg
    (307, true, false),  // sendmmsg
    (0, false, true),    // read
    (19, false, true),   // readv
    (1, true, true),     // write
    (20, true, true),    // writev
];

/// Whether the thread is in such a call.
pub fn socket_wait(registers: &Registers) -> Option<SocketWait> {
    let call = registers.syscall()?;
    let &(_, sends, of_any_file) = SOCKET_WAITS.iter().find(|wait| wait.0 == call)?;
    Some(SocketWait { fd: registers.rdi as u32, sends, of_any_file })
}

/// How long a call would wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timeout {
    /// For ever.
    Infinite,
    /// So many milliseconds.
    Milliseconds(i32),
    /// As the struct timespec at this address says.
    Timespec(u64),
}

/// System calls that go on by restart_syscall(2), with the argument that holds the relative timeout.
pub mod restartable {
    /// poll(2): milliseconds in the third argument.
    pub const POLL: u64 = 7;
    /// nanosleep(2): struct timespec at the first argument.
    pub const NANOSLEEP: u64 = 35;
    /// futex(2): struct timespec at the fourth argument.
    pub const FUTEX: u64 = 202;
    /// restart_syscall(2) itself: the thread was interrupted before.
    pub const RESTART_SYSCALL: u64 = 219;
    /// clock_nanosleep(2): clock in the first, struct timespec at the third argument.
    pub const CLOCK_NANOSLEEP: u64 = 230;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_back() {
        let registers = Registers { r15: 1, rip: 0x1234, gs: 7, ..Registers::default() };
        let bytes = registers.to_bytes();
        assert_eq!(bytes.len(), 27 * 8);
        assert_eq!(Registers::from_bytes(&bytes), Some(registers));
        assert_eq!(Registers::from_bytes(&bytes[1..]), None);
    }

    #[test]
    fn rewinding_makes_the_call_again() {
        let mut registers =
            Registers { rax: -4i64 as u64, orig_rax: 232, rip: 0x1002, ..Registers::default() };
        registers.rewind();
        assert_eq!((registers.rax, registers.rip, registers.syscall()), (232, 0x1000, None));
    }
}
