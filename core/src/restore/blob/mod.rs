//! Placing the restorer blob in a task and entering it.
//!
//! The region, from low to high: the blob's image, argument block and tables, stacks of the threads, stack of the
//! leader, and once more the page of shared memory with the task's [`proto::Status`]. It is one range, which the tracer
//! unmaps when all threads have arrived at their traps.

pub mod tables;
pub mod timers;

/// The blob, built and flattened by build.rs.
static RESTORER: Blob = include!(concat!(env!("OUT_DIR"), "/restorer.rs"));

/// What core and the blob both know.
#[path = "../../../../restorer/src/proto.rs"]
pub mod proto;

use super::memory::arena::{join, subtract};
use super::memory::plan::BLOB_ROOM;
use super::memory::{PAGE, RestorerMoves};
use crate::image::records::Task;
use crate::inject::blob::{Blob, Segment};
use proto::{Arguments, Status, Step};
use std::arch::asm;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;
use std::{fmt, io, ptr};
use tables::Tables;
use thiserror::Error;

/// End of user addresses with four-level page tables (TASK_SIZE_MAX in arch/x86/include/asm/page_64_types.h).
const ADDRESSES: Range<u64> = 0..0x7fff_ffff_f000;
const LEADER_STACK: u64 = 32 << 10;
const THREAD_STACK: u64 = 8 << 10;

/// Why a task cannot enter the restorer.
#[derive(Debug, Error)]
pub enum BlobError {
    /// The record lacks something.
    #[error("the image's record of task {pid} has no {what}")]
    Incomplete {
        /// The task.
        pid: i32,
        /// What it lacks.
        what: &'static str,
    },
    /// Too many threads or tables.
    #[error("task {pid} needs {size:#x} bytes for the restorer, more than there is room for")]
    TooLarge {
        /// The task.
        pid: i32,
        /// How much.
        size: u64,
    },
    /// A system call fails.
    #[error("{operation} for task {pid}: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// The task.
        pid: i32,
        /// Why.
        source: io::Error,
    },
}

/// What the record of a task does not say.
#[derive(Debug, Clone)]
pub struct RestorerOptions {
    /// The executable, open; also one of `close` as a rule.
    pub exe: RawFd,
    /// Service descriptors that the restorer closes.
    pub close: Vec<RawFd>,
    /// Where failures are told: in memory that is mapped shared.
    pub status: *const Status,
    /// Parent death signals are set later: the parent's first thread is about to exit, which would send them.
    pub late_death_signals: bool,
}

/// A restorer that is ready to be entered.
#[derive(Debug)]
pub struct RestorerCall {
    region: Range<u64>,
    entry: u64,
    arguments: u64,
    stack: u64,
}

impl RestorerCall {
    /// Places the blob and all that it is told. Memory that is mapped later than this is lost when it is entered.
    pub fn new(moves: &RestorerMoves, task: &Task, options: &RestorerOptions) -> Result<Self, BlobError> {
        let pid = task.pid;
        let base = moves.blob;
        let code = (RESTORER.image.len() as u64).next_multiple_of(PAGE);
        let mut tables = Tables::new(base + code);
        let mut arguments = tables.task(moves, task, options)?;

        // Everything has its size now but the list of gaps, which needs the size of the region.
        let gaps = moves.keep.len() as u64 + 2;
        let more = gaps * size_of::<proto::Span>() as u64 + size_of::<Arguments>() as u64 + 64;
        let stacks = (tables.end() + more).next_multiple_of(PAGE);
        let threads = (task.threads.len() as u64).saturating_sub(1);
        let stack = stacks + threads * THREAD_STACK + LEADER_STACK;
        let page_of_status = options.status as u64 & !(PAGE - 1);
        let region = base..stack + PAGE;
        if region.end - region.start > BLOB_ROOM {
            return Err(BlobError::TooLarge { pid, size: region.end - region.start });
        }
        let mut keep = moves.keep.clone();
        keep.push(region.clone());
        let unmap: Vec<_> = subtract(&ADDRESSES, &join(keep))
            .into_iter()
            .map(|gap| proto::Span { start: gap.start, len: gap.end - gap.start })
            .collect();
        arguments.unmap = tables.put(&unmap);
        arguments.stacks = stacks;
        arguments.stack_size = THREAD_STACK;
        arguments.status = stack + (options.status as u64 - page_of_status);
        let (tables, arguments) = tables.finish(arguments);

        place(&region, pid)?;
        let image = RESTORER.at(base);
        // SAFETY: `place` has just mapped the region, and both pieces lie in it (`stacks` is beyond them).
        unsafe {
            ptr::copy_nonoverlapping(image.as_ptr(), base as *mut u8, image.len());
            ptr::copy_nonoverlapping(tables.as_ptr(), (base + code) as *mut u8, tables.len());
        }
        for segment in RESTORER.segments {
            let address = (base + segment.offset as u64) as *mut libc::c_void;
            // SAFETY: a part of the region that holds the image.
            let result = unsafe { libc::mprotect(address, segment.len, segment.protection) };
            check(result == 0, "protecting the restorer", pid)?;
        }
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: maps the shared page once more (old size 0) over the last page of the region.
        let got = unsafe {
            libc::mremap(page_of_status as *mut _, 0, PAGE as usize, flags, stack as *mut libc::c_void)
        };
        check(got as u64 == stack, "sharing the restorer's status", pid)?;
        Ok(Self { region, entry: base + RESTORER.entry as u64, arguments, stack })
    }

    /// The range that the tracer unmaps when all threads have arrived.
    pub fn region(&self) -> Range<u64> {
        self.region.clone()
    }

    /// The code that arms the timers: its entry, its arguments, the top of its stack.
    pub fn arming(&self) -> [u64; 3] {
        [self.entry, self.arguments, self.stack]
    }

    /// Leaves this program for good. The caller is the only thread, and nothing that it owns is dropped.
    pub fn enter(self) -> ! {
        let all = u64::MAX;
        // SAFETY: raw, since the C library keeps two signals for itself; reads 8 bytes.
        unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, 0, 8) };
        unregister_rseq();
        // SAFETY: the entry point takes its argument in rdi and a stack of its own; it unmaps this program.
        unsafe {
            asm!("mov rsp, {stack}", "xor ebp, ebp", "jmp {entry}", stack = in(reg) self.stack,
                entry = in(reg) self.entry, in("rdi") self.arguments, in("rsi") 0, options(noreturn))
        }
    }
}

fn check(good: bool, operation: &'static str, pid: i32) -> Result<(), BlobError> {
    if good { Ok(()) } else { Err(BlobError::System { operation, pid, source: io::Error::last_os_error() }) }
}

fn place(region: &Range<u64>, pid: i32) -> Result<(), BlobError> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let size = (region.end - region.start) as usize;
    // SAFETY: MAP_FIXED_NOREPLACE replaces nothing.
    let got = unsafe { libc::mmap(region.start as *mut _, size, prot, flags, -1, 0) };
    check(got as u64 == region.start, "mapping the restorer", pid)
}

/// Takes back the registration that the C library made: the kernel would write to memory that is gone.
fn unregister_rseq() {
    const RSEQ_FLAG_UNREGISTER: i32 = 1;
    const RSEQ_SIG: u32 = 0x5305_3053;
    unsafe extern "C" {
        static __rseq_offset: isize;
        static __rseq_size: u32;
    }
    // SAFETY: constants of the C library (2.35 and later), which links us.
    let (offset, size) = unsafe { (__rseq_offset, __rseq_size) };
    let thread: isize;
    // SAFETY: the thread control block begins with its own address (ABI of x86_64).
    unsafe { asm!("mov {}, fs:0", out(reg) thread, options(nostack, readonly)) };
    // The size that was registered is not told: 32 at first, later what the kernel's features need.
    for size in [32, size, size.next_multiple_of(32), 64] {
        // SAFETY: only takes a registration back.
        let result =
            unsafe { libc::syscall(libc::SYS_rseq, thread + offset, size, RSEQ_FLAG_UNREGISTER, RSEQ_SIG) };
        if result == 0 {
            return;
        }
    }
}

/// What a restorer said before it ended its task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestorerFailure {
    /// What it was doing, as in [`Step`].
    pub step: u32,
    /// Errno of the call.
    pub errno: i32,
    /// Which entry, signal or value.
    pub index: u32,
    /// The thread.
    pub tid: i32,
}

impl RestorerFailure {
    /// What a status says; nothing when all is well.
    pub fn of(status: &Status) -> Option<Self> {
        let step = status.step.load(Ordering::Acquire);
        (step != 0).then(|| Self {
            step,
            errno: status.errno.load(Ordering::Acquire) as i32,
            index: status.index.load(Ordering::Acquire),
            tid: status.tid.load(Ordering::Acquire) as i32,
        })
    }
}

impl fmt::Display for RestorerFailure {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = Step::from_number(self.step).map_or("an unknown step", Step::text);
        let error = io::Error::from_raw_os_error(self.errno);
        write!(to, "{what} (number {}) in thread {}: {error}", self.index, self.tid)
    }
}

impl std::error::Error for RestorerFailure {}
