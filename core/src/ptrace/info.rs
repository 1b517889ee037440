//! Reading and writing the state of a stopped task.

use super::{Error, Stopped, raw, who};
use crate::arch::{REGISTERS_LEN, Registers};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

/// NT_X86_XSTATE (include/uapi/linux/elf.h).
const XSTATE: usize = 0x202;
/// siginfo_t.
const SIGINFO_LEN: usize = 128;
/// How many pending signals one call reads.
const SIGINFOS_AT_ONCE: usize = 32;

/// A registered restartable sequence area (rseq(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rseq {
    /// Address of struct rseq.
    pub address: u64,
    /// Its size.
    pub size: u32,
    /// What precedes abort handlers.
    pub signature: u32,
}

/// A seccomp filter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompFilter {
    /// struct sock_filter, 8 bytes each.
    pub instructions: Vec<u8>,
    /// SECCOMP_FILTER_FLAG_*.
    pub flags: u64,
}

impl Stopped {
    /// # Safety
    /// As [`raw::ptrace`].
    unsafe fn request(&self, what: &'static str, request: u32, a: usize, d: usize) -> Result<i64, Error> {
        // SAFETY: the caller vouches for the pointers.
        unsafe { raw::ptrace(request, self.id.tid, a, d) }.map_err(|errno| self.id.error(what, errno))
    }

    /// PTRACE_GETREGS.
    pub fn registers(&self) -> Result<Registers, Error> {
        let mut registers = Registers::default();
        let data = &raw mut registers as usize;
        // SAFETY: the kernel writes one struct user_regs_struct, which `Registers` is.
        unsafe { self.request("read registers of", libc::PTRACE_GETREGS, 0, data) }?;
        Ok(registers)
    }

    /// PTRACE_SETREGS.
    pub fn set_registers(&self, registers: &Registers) -> Result<(), Error> {
        const { assert!(REGISTERS_LEN == size_of::<libc::user_regs_struct>()) };
        let data = registers as *const Registers as usize;
        // SAFETY: the kernel reads one struct user_regs_struct.
        unsafe { self.request("set registers of", libc::PTRACE_SETREGS, 0, data) }.map(drop)
    }

    /// The whole NT_X86_XSTATE area; `buffer` is scratch that grows to the size of this processor's area.
    pub fn xstate(&self, buffer: &mut Vec<u8>) -> Result<Vec<u8>, Error> {
        if buffer.is_empty() {
            buffer.resize(16 << 10, 0);
        }
        loop {
            let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            let data = &raw mut vector as usize;
            // SAFETY: the vector describes `buffer`.
            unsafe { self.request("read extended registers of", libc::PTRACE_GETREGSET, XSTATE, data) }?;
            if vector.iov_len < buffer.len() {
                return Ok(buffer[..vector.iov_len].to_vec());
            }
            buffer.resize(buffer.len() * 2, 0);
        }
    }

    /// Writes the NT_X86_XSTATE area.
    pub fn set_xstate(&self, xstate: &[u8]) -> Result<(), Error> {
        let vector = libc::iovec { iov_base: xstate.as_ptr().cast_mut().cast(), iov_len: xstate.len() };
        let data = &raw const vector as usize;
        // SAFETY: the kernel reads what the vector describes.
        unsafe { self.request("set extended registers of", libc::PTRACE_SETREGSET, XSTATE, data) }.map(drop)
    }

    /// PTRACE_GETSIGMASK: the mask as it will be when an interrupted ppoll(2) and the like has returned.
    pub fn signal_mask(&self) -> Result<u64, Error> {
        let mut mask = 0u64;
        let data = &raw mut mask as usize;
        // SAFETY: the kernel writes 8 bytes.
        unsafe { self.request("read the signal mask of", libc::PTRACE_GETSIGMASK, 8, data) }?;
        Ok(mask)
    }

    /// PTRACE_SETSIGMASK.
    pub fn set_signal_mask(&self, mask: u64) -> Result<(), Error> {
        let data = &raw const mask as usize;
        // SAFETY: the kernel reads 8 bytes.
        unsafe { self.request("set the signal mask of", libc::PTRACE_SETSIGMASK, 8, data) }.map(drop)
    }

    /// The message of an event stop: the new task's id.
    pub fn event_message(&self) -> Result<u64, Error> {
        let mut message = 0u64;
        let data = &raw mut message as usize;
        // SAFETY: the kernel writes one unsigned long.
        unsafe { self.request("read the event of", libc::PTRACE_GETEVENTMSG, 0, data) }?;
        Ok(message)
    }

    /// PTRACE_GETSIGINFO in a signal stop.
    pub fn signal_info(&self) -> Result<Vec<u8>, Error> {
        let mut info = vec![0u8; SIGINFO_LEN];
        let data = info.as_mut_ptr() as usize;
        // SAFETY: the kernel writes one siginfo_t.
        unsafe { self.request("read the signal of", libc::PTRACE_GETSIGINFO, 0, data) }?;
        Ok(info)
    }

    /// PTRACE_SETOPTIONS: it dies with its tracer.
    pub fn set_exit_kill(&self) -> Result<(), Error> {
        self.set_options(libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD)
    }

    /// PTRACE_SETOPTIONS: the end of its tracer lets it go on undisturbed, also out of a system call.
    pub fn set_free_with_tracer(&self) -> Result<(), Error> {
        self.set_options(libc::PTRACE_O_TRACESYSGOOD)
    }

    fn set_options(&self, options: i32) -> Result<(), Error> {
        // SAFETY: takes numbers only.
        unsafe { self.request("set options of", libc::PTRACE_SETOPTIONS, 0, options as usize) }.map(drop)
    }

    /// Pending signals as siginfo_t, those of the thread or those of the process.
    pub fn pending(&self, shared: bool) -> Result<Vec<Vec<u8>>, Error> {
        #[repr(C)]
        struct Arguments {
            offset: u64,
            flags: u32,
            count: i32,
        }
        let mut found = Vec::new();
        loop {
            let mut buffer = [[0u8; SIGINFO_LEN]; SIGINFOS_AT_ONCE];
            let flags = if shared { libc::PTRACE_PEEKSIGINFO_SHARED } else { 0 };
            let arguments = Arguments { offset: found.len() as u64, flags, count: SIGINFOS_AT_ONCE as i32 };
            let (address, data) = (&raw const arguments as usize, buffer.as_mut_ptr() as usize);
            // SAFETY: the kernel reads the arguments and writes at most `count` siginfo_t.
            let count =
                unsafe { self.request("read pending signals of", libc::PTRACE_PEEKSIGINFO, address, data) }?;
            found.extend(buffer.iter().take(count as usize).map(|info| info.to_vec()));
            if (count as usize) < SIGINFOS_AT_ONCE {
                return Ok(found);
            }
        }
    }

    /// PTRACE_GET_RSEQ_CONFIGURATION.
    pub fn rseq(&self) -> Result<Option<Rseq>, Error> {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut found: libc::ptrace_rseq_configuration = unsafe { std::mem::zeroed() };
        let (size, data) = (size_of_val(&found), &raw mut found as usize);
        // SAFETY: the kernel writes at most `size` bytes.
        match unsafe { raw::ptrace(libc::PTRACE_GET_RSEQ_CONFIGURATION, self.id.tid, size, data) } {
            Ok(_) if found.rseq_abi_pointer == 0 => Ok(None),
            Ok(_) => Ok(Some(Rseq {
                address: found.rseq_abi_pointer,
                size: found.rseq_abi_size,
                signature: found.signature,
            })),
            // Not built into this kernel: nothing can be registered.
            Err(Errno::EIO | Errno::EINVAL) => Ok(None),
            Err(errno) => Err(self.id.error("read the rseq registration of", errno)),
        }
    }

    /// Whether prctl(PR_SET_SYSCALL_USER_DISPATCH) is on: the thread gets SIGSYS for system calls, those of injected code too.
    pub fn has_user_dispatch(&self) -> bool {
        const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
        // struct ptrace_sud_config: mode, selector, offset, length.
        let mut config = [0u64; 4];
        let (size, data) = (size_of_val(&config), config.as_mut_ptr() as usize);
        // SAFETY: the kernel writes at most `size` bytes. One that does not know the request has no such thing either.
        let result = unsafe { raw::ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, self.id.tid, size, data) };
        result.is_ok() && config[0] != 0
    }

    /// Address and length of the robust futex list head (get_robust_list(2)).
    pub fn robust_list(&self) -> Result<(u64, u64), Error> {
        let (mut head, mut len) = (0u64, 0u64);
        // SAFETY: the kernel writes a pointer and a size.
        let result =
            unsafe { libc::syscall(libc::SYS_get_robust_list, self.id.tid, &raw mut head, &raw mut len) };
        match Errno::result(result) {
            Ok(_) => Ok((head, len)),
            Err(Errno::ENOSYS) => Ok((0, 0)),
            Err(errno) => Err(self.id.error("read the robust futex list of", errno)),
        }
    }

    /// The thread's seccomp filters, the one installed last first.
    pub fn seccomp_filters(&self) -> Result<Vec<SeccompFilter>, Error> {
        let mut filters = self.seccomp_filters_from_first()?;
        filters.reverse();
        Ok(filters)
    }

    /// In the order of ptrace: number 0 is the oldest (get_nth_filter, kernel/seccomp.c).
    fn seccomp_filters_from_first(&self) -> Result<Vec<SeccompFilter>, Error> {
        let mut filters = Vec::new();
        loop {
            let index = filters.len();
            // SAFETY: with a null buffer the kernel only counts the instructions.
            let count = match unsafe { raw::ptrace(raw::SECCOMP_GET_FILTER, self.id.tid, index, 0) } {
                Ok(count) => count as usize,
                // No filter mode; no such filter.
                Err(Errno::EINVAL | Errno::ENOENT) => return Ok(filters),
                // Only CAP_SYS_ADMIN may look; the status file tells everybody whether there is one.
                Err(Errno::EACCES) if who::status_field(self.id.tid, "Seccomp").as_deref() != Some("2") => {
                    return Ok(filters);
                }
                Err(errno) => return Err(self.id.error("read the seccomp filters of", errno)),
            };
            let mut instructions = vec![0u8; count * 8];
            let data = instructions.as_mut_ptr() as usize;
            // SAFETY: `count` instructions of 8 bytes each fit.
            unsafe { self.request("read the seccomp filters of", raw::SECCOMP_GET_FILTER, index, data) }?;
            let mut metadata = [index as u64, 0];
            let data = metadata.as_mut_ptr() as usize;
            // SAFETY: struct seccomp_metadata is two words: filter number in, flags out.
            unsafe { self.request("read the seccomp filters of", raw::SECCOMP_GET_METADATA, 16, data) }?;
            filters.push(SeccompFilter { instructions, flags: metadata[1] });
        }
    }
}
