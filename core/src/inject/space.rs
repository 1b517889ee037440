//! A task's memory, as the injected code needs it: where a system call instruction is, and what was mapped.

use super::{InjectError, blob::PARASITE, parasite};
use crate::{arch::SYSCALL_INSTRUCTION, ptrace::who};
use nix::errno::Errno;
use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicU64, Ordering},
};

/// Bytes of the largest argument block, in whole pages.
const MAIN_BLOCK: u64 = (size_of::<parasite::WritePages>() as u64).next_multiple_of(4096);
/// How many threads of one process can run injected code at the same time.
pub const THREAD_SLOTS: usize = 32;
/// Length of the writable area.
pub const AREA_LEN: u64 = MAIN_BLOCK + parasite::STACK + THREAD_SLOTS as u64 * parasite::THREAD_SLOT;

/// Offset of a system call instruction in the vdso that was looked at last; nearly always that of the next one too.
static LAST_OFFSET: AtomicU64 = AtomicU64::new(0);

/// The memory of a process.
#[derive(Debug)]
pub struct Space {
    pid: i32,
    memory: File,
    /// Address of a system call instruction.
    pub syscall_at: u64,
    /// Where the parasite's code is mapped.
    pub code: Option<u64>,
    /// Where its writable area is mapped.
    pub area: Option<u64>,
    /// The process ignores SIGTRAP, or one is pending (see the parasite's `_start`).
    pub ignores_trap: bool,
}

impl Space {
    /// Opens the memory of process `pid` by its live thread `tid`.
    pub fn open(pid: i32, tid: i32) -> Result<Self, InjectError> {
        let file = File::options().read(true).write(true).open(format!("/proc/{tid}/mem"));
        let memory = file.map_err(|error| memory_error(pid, 0, &error))?;
        let ignored = who::Stat::read(tid).map_or(0, |stat| stat.ignored);
        let ignores_trap = ignored >> (libc::SIGTRAP - 1) & 1 == 1;
        let mut space = Self { pid, memory, syscall_at: 0, code: None, area: None, ignores_trap };
        space.syscall_at = space.find_syscall(tid)?;
        Ok(space)
    }

    /// The same mappings in a copy of this process.
    pub fn of_copy(&self, pid: i32) -> Result<Self, InjectError> {
        let file = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"));
        let memory = file.map_err(|error| memory_error(pid, 0, &error))?;
        Ok(Self { pid, memory, ..*self })
    }

    /// An existing instruction, so that no text of the task is changed: in the vdso, else in any executable mapping.
    fn find_syscall(&self, tid: i32) -> Result<u64, InjectError> {
        // Nearly always it is where the auxiliary vector says, at the same offset as in the task before.
        if let Some(vdso) = vdso_of(tid) {
            let known = vdso + LAST_OFFSET.load(Ordering::Relaxed);
            let mut two = [0u8; 2];
            if self.memory.read_exact_at(&mut two, known).is_ok()
                && two == SYSCALL_INSTRUCTION
                && known != vdso
            {
                return Ok(known);
            }
        }
        let maps =
            who::read(&format!("/proc/{tid}/maps")).map_err(|error| memory_error(self.pid, 0, &error))?;
        let maps = String::from_utf8_lossy(&maps);
        let mappings: Vec<(u64, u64, &str)> = maps.lines().filter_map(executable).collect();
        let vdso = mappings.iter().filter(|mapping| mapping.2 == "[vdso]");
        // vsyscall is no ordinary memory: the kernel emulates jumps to it.
        let others =
            mappings.iter().filter(|mapping| !mapping.2.starts_with("[vsyscall") && mapping.2 != "[vdso]");
        for &(start, end, _) in vdso.chain(others) {
            let known = start + LAST_OFFSET.load(Ordering::Relaxed);
            let mut two = [0u8; 2];
            if known < end && self.memory.read_exact_at(&mut two, known).is_ok() && two == SYSCALL_INSTRUCTION
            {
                return Ok(known);
            }
            if let Some(found) = self.search(start, end) {
                LAST_OFFSET.store(found - start, Ordering::Relaxed);
                return Ok(found);
            }
        }
        Err(InjectError::NoSyscallInstruction { pid: self.pid, name: who::name(tid) })
    }

    fn search(&self, start: u64, end: u64) -> Option<u64> {
        const STEP: u64 = 1 << 20;
        let mut at = start;
        while at < end {
            // One byte more than the step: an instruction may lie across.
            let mut bytes = vec![0u8; (STEP + 1).min(end - at) as usize];
            let read = self.memory.read_at(&mut bytes, at).unwrap_or(0);
            if let Some(offset) = bytes[..read].windows(2).position(|two| two == SYSCALL_INSTRUCTION) {
                return Some(at + offset as u64);
            }
            at += STEP;
        }
        None
    }

    /// The process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Reads the task's memory, protected or not.
    pub fn read(&self, buffer: &mut [u8], address: u64) -> Result<(), InjectError> {
        self.memory.read_exact_at(buffer, address).map_err(|error| memory_error(self.pid, address, &error))
    }

    /// Writes the task's memory, protected or not.
    pub fn write(&self, bytes: &[u8], address: u64) -> Result<(), InjectError> {
        self.memory.write_all_at(bytes, address).map_err(|error| memory_error(self.pid, address, &error))
    }

    /// Writes the parasite to its mapping.
    pub fn write_code(&self) -> Result<(), InjectError> {
        let Some(code) = self.code else { return Ok(()) };
        self.write(&PARASITE.at(code), code)
    }

    /// The parasite's first instruction.
    pub fn entry(&self) -> u64 {
        self.code.unwrap_or(0) + PARASITE.entry as u64
    }

    /// Argument block and top of the stack for calls by one thread.
    pub fn main_slot(&self) -> (u64, u64) {
        let area = self.area.unwrap_or(0);
        (area, area + MAIN_BLOCK + parasite::STACK)
    }

    /// Argument block and top of the stack for calls by several threads.
    pub fn thread_slot(&self, index: usize) -> (u64, u64) {
        let block = self.main_slot().1 + (index % THREAD_SLOTS) as u64 * parasite::THREAD_SLOT;
        (block, block + parasite::THREAD_SLOT)
    }
}

/// Where the task's auxiliary vector has the vdso (AT_SYSINFO_EHDR, getauxval(3)).
fn vdso_of(tid: i32) -> Option<u64> {
    const VDSO: u64 = 33;
    let vector = who::read(&format!("/proc/{tid}/auxv")).ok()?;
    let entries = vector.as_chunks::<16>().0.iter();
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |n, &byte| n << 8 | u64::from(byte));
    entries
        .map(|entry| (word(&entry[..8]), word(&entry[8..])))
        .find(|entry| entry.0 == VDSO)
        .map(|entry| entry.1)
}

/// Start, end and name of an executable mapping (a line of /proc/PID/maps).
fn executable(line: &str) -> Option<(u64, u64, &str)> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let is_executable = fields.next()?.as_bytes().get(2) == Some(&b'x');
    let name = fields.nth(3).unwrap_or("").trim();
    let number = |text| u64::from_str_radix(text, 16).ok();
    if is_executable { Some((number(start)?, number(end)?, name)) } else { None }
}

fn memory_error(pid: i32, address: u64, error: &io::Error) -> InjectError {
    let errno = error.raw_os_error().unwrap_or(Errno::EFAULT as i32);
    InjectError::Memory { pid, name: who::name(pid), address, errno }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let vdso = "7ffc1000-7ffc3000 r-xp 00000000 00:00 0                          [vdso]";
        assert_eq!(executable(vdso), Some((0x7ffc1000, 0x7ffc3000, "[vdso]")));
        assert_eq!(executable("7ffc1000-7ffc3000 r--p 00000000 00:00 0 "), None);
        assert_eq!(executable("1000-3000 r-xp 00000000 00:00 0 "), Some((0x1000, 0x3000, "")));
    }

    #[test]
    fn an_instruction_is_found_in_our_own_vdso() {
        let pid = std::process::id() as i32;
        let space = Space::open(pid, pid).unwrap();
        let mut two = [0u8; 2];
        space.read(&mut two, space.syscall_at).unwrap();
        assert_eq!(two, SYSCALL_INSTRUCTION);
    }

    #[test]
    fn slots_do_not_overlap() {
        let pid = std::process::id() as i32;
        let mut space = Space::open(pid, pid).unwrap();
        space.area = Some(0x10000);
        assert_eq!(space.thread_slot(0).0, space.main_slot().1);
        assert_eq!(space.thread_slot(1).0, space.thread_slot(0).1);
        assert_eq!(space.thread_slot(THREAD_SLOTS - 1).1, 0x10000 + AREA_LEN);
    }
}
