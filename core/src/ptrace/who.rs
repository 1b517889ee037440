//! The little that has to be known of a task from /proc, without allocation of whole tables.

use std::{
    fs::{self, File},
    io::{self, Read},
};

/// A whole file of /proc, in as few reads as it takes: the kernel makes the text anew for each, and there is no size to ask for.
pub fn read(path: &str) -> io::Result<Vec<u8>> {
    let (mut file, mut text, mut used) = (File::open(path)?, vec![0u8; 8192], 0);
    loop {
        match file.read(&mut text[used..])? {
            0 => break,
            count => used += count,
        }
        if text.len() - used < 4096 {
            text.resize(text.len() * 2, 0);
        }
    }
    text.truncate(used);
    Ok(text)
}

/// The same as text; empty if it cannot be read.
pub fn read_text(path: &str) -> String {
    String::from_utf8_lossy(&read(path).unwrap_or_default()).into_owned()
}

/// PF_KTHREAD (include/linux/sched.h).
const KERNEL_THREAD: u64 = 0x0020_0000;

/// The task's name; empty if it is gone.
pub fn name(tid: i32) -> String {
    read_text(&format!("/proc/{tid}/comm")).trim_end().to_string()
}

/// State letter, flags and parent of a thread (proc_pid_stat(5)); `None` if it is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// R, S, D, T, t, Z, ...
    pub state: u8,
    /// Parent.
    pub parent: i32,
    /// PF_*.
    pub flags: u64,
    /// Signals 1 to 31 that the process ignores; bit 0 is signal 1.
    pub ignored: u64,
    /// The processor on which it last ran.
    pub processor: usize,
}

impl Stat {
    /// Reads it.
    pub fn read(tid: i32) -> Option<Self> {
        let text = read(&format!("/proc/{tid}/stat")).ok()?;
        // The name may hold anything but ends at the last parenthesis.
        let end = text.iter().rposition(|&byte| byte == b')')?;
        let rest = std::str::from_utf8(text.get(end + 2..)?).ok()?;
        let mut fields = rest.split(' ');
        let state = *fields.next()?.as_bytes().first()?;
        let parent = fields.next()?.parse().ok()?;
        let flags = fields.nth(4)?.parse().ok()?;
        let ignored = fields.nth(23)?.parse().ok()?;
        let processor = fields.nth(5)?.parse().ok()?;
        Some(Self { state, parent, flags, ignored, processor })
    }

    /// Dead, not reaped.
    pub fn is_zombie(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }

    /// Made by the kernel for itself.
    pub fn is_kernel_thread(&self) -> bool {
        self.flags & KERNEL_THREAD != 0
    }
}

/// A field of /proc/TID/status.
pub fn status_field(tid: i32, field: &str) -> Option<String> {
    let text = read_text(&format!("/proc/{tid}/status"));
    let value =
        |line: &str| line.strip_prefix(field)?.strip_prefix(':').map(|value| value.trim().to_string());
    text.lines().find_map(value)
}

/// Who traces the thread; 0 if nobody.
pub fn tracer(tid: i32) -> i32 {
    status_field(tid, "TracerPid").and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// The thread's id in every pid namespace from ours inwards; empty if it is gone.
pub fn namespace_ids(tid: i32) -> Vec<i32> {
    let text = status_field(tid, "NSpid").unwrap_or_default();
    text.split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect()
}

/// The process that a thread belongs to.
pub fn process_of(tid: i32) -> Option<i32> {
    status_field(tid, "Tgid")?.parse().ok()
}

/// A signal mask of /proc/TID/status (`SigIgn`, `SigCgt`, ...); bit 0 is signal 1.
pub fn signal_set(tid: i32, field: &str) -> u64 {
    status_field(tid, field).and_then(|text| u64::from_str_radix(&text, 16).ok()).unwrap_or(0)
}

/// The threads of a process; empty if it is gone.
pub fn threads(pid: i32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// The children that a thread has forked (CONFIG_PROC_CHILDREN). Complete if all are stopped.
pub fn children(pid: i32, tid: i32) -> Vec<i32> {
    let text = read_text(&format!("/proc/{pid}/task/{tid}/children"));
    text.split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect()
}

/// The system call a thread is in (/proc/TID/syscall).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Syscall {
    /// Number.
    pub number: u64,
    /// Arguments.
    pub arguments: [u64; 6],
    /// Stack pointer and instruction pointer of the caller.
    pub at: [u64; 2],
}

/// What system call a thread sleeps in; `None` if it does not, or may not be looked at.
pub fn syscall(tid: i32) -> Option<Syscall> {
    let text = read_text(&format!("/proc/{tid}/syscall"));
    let mut fields = text.split_ascii_whitespace();
    let number = fields.next()?.parse().ok()?;
    let mut hex = || u64::from_str_radix(fields.next()?.trim_start_matches("0x"), 16).ok();
    let mut arguments = [0; 6];
    for argument in &mut arguments {
        *argument = hex()?;
    }
    Some(Syscall { number, arguments, at: [hex()?, hex()?] })
}

/// What the scheduler knows of a thread (/proc/TID/sched, where the kernel has CONFIG_SCHED_DEBUG).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scheduled {
    /// When it last ran, in nanoseconds of the clock of its processor.
    pub last_ran_ns: i64,
    /// How often it has gone to sleep or stopped.
    pub switches: u64,
}

impl Scheduled {
    /// Reads it; `None` if there is no such file.
    pub fn read(tid: i32) -> Option<Self> {
        Self::parse(&read_text(&format!("/proc/{tid}/sched")))
    }

    fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'))
                .map(str::trim)
        };
        let (milliseconds, rest) = value("se.exec_start")?.split_once('.')?;
        let nanoseconds: i64 = rest.parse().ok()?;
        let last_ran_ns = milliseconds.parse::<i64>().ok()?.checked_mul(1_000_000)? + nanoseconds;
        Some(Self { last_ran_ns, switches: value("nr_voluntary_switches")?.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_a_thread_last_ran() {
        let text = "cat (8015, #threads: 1)\n-----\nse.exec_start      :   23293849.358455\nnr_voluntary_switches   :   12\n";
        let expected = Scheduled { last_ran_ns: 23_293_849_358_455, switches: 12 };
        assert_eq!(Scheduled::parse(text), Some(expected));
        assert_eq!(Scheduled::parse("nr_voluntary_switches : 12"), None);
    }

    #[test]
    fn our_own_thread() {
        let pid = std::process::id() as i32;
        let stat = Stat::read(pid).unwrap();
        assert_eq!(stat.parent, std::os::unix::process::parent_id() as i32);
        assert!(!stat.is_kernel_thread() && !stat.is_zombie());
        assert!(threads(pid).contains(&pid));
        assert_eq!(process_of(pid), Some(pid));
        assert_eq!(namespace_ids(pid).first(), Some(&pid));
        assert_eq!(Stat::read(-1), None);
    }
}
