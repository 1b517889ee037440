//! `/proc/PID/fd` and `/proc/PID/fdinfo` (proc_pid_fdinfo(5)).

use super::{ProcDir, ProcError};
use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::OFlag,
    sys::stat::{FileStat, Mode},
};

/// What /proc tells about one descriptor.
#[derive(Debug, Clone)]
pub struct DescriptorFacts {
    /// Descriptor number.
    pub number: i32,
    /// `/proc/PID/fd/N` as a link.
    pub link: Vec<u8>,
    /// stat(2) of the open file.
    pub stat: FileStat,
    /// fdinfo without the `flags:` line (whose close-on-exec bit belongs to the descriptor, not to the description).
    pub info: String,
    /// Status flags and access mode, without `O_CLOEXEC`.
    pub status_flags: u32,
    /// Close-on-exec.
    pub cloexec: bool,
    /// File position.
    pub position: u64,
}

/// Descriptor numbers of a process, ascending.
pub fn numbers(proc: &ProcDir) -> Result<Vec<i32>, ProcError> {
    let failed = |errno: Errno| ProcError::Read { pid: proc.pid(), file: "fd".into(), errno };
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut dir = Dir::openat(proc.as_dir(), "fd", flags, Mode::empty()).map_err(failed)?;
    let mut numbers = Vec::new();
    for entry in dir.iter() {
        let entry = entry.map_err(failed)?;
        numbers.extend(entry.file_name().to_str().ok().and_then(|name| name.parse::<i32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Everything /proc tells about descriptor `number`.
pub fn facts(proc: &ProcDir, number: i32) -> Result<DescriptorFacts, ProcError> {
    let link = proc.link(&format!("fd/{number}"))?;
    let stat = proc.stat(&format!("fd/{number}"))?;
    let text = proc.read_text(&format!("fdinfo/{number}"))?;
    let format =
        |what: &str| ProcError::Format { pid: proc.pid(), file: "fdinfo", what: format!("{number}: {what}") };
    let (mut flags, mut position) = (None, 0);
    let mut info = String::with_capacity(text.len());
    for line in text.lines() {
        match line.split_once(':') {
            Some(("flags", value)) => flags = u32::from_str_radix(value.trim(), 8).ok(),
            // Printed as signed (fs/proc/fd.c); a position past 2^63 would be negative.
            Some(("pos", value)) => position = value.trim().parse::<i64>().map_err(|_| format("pos"))? as u64,
            _ => {
                info.push_str(line);
                info.push('\n');
            }
        }
    }
    let flags = flags.ok_or_else(|| format("no flags"))?;
    let cloexec = flags & libc::O_CLOEXEC as u32 != 0;
    Ok(DescriptorFacts {
        number,
        link,
        stat,
        info,
        status_flags: flags & !(libc::O_CLOEXEC as u32),
        cloexec,
        position,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Seek, SeekFrom},
        os::fd::AsRawFd,
    };

    #[test]
    fn tells_flags_and_position_of_our_own_file() {
        let mut file = std::fs::File::open("/proc/self/exe").unwrap();
        file.seek(SeekFrom::Start(77)).unwrap();
        let proc = ProcDir::open(std::process::id() as i32).unwrap();
        assert!(numbers(&proc).unwrap().contains(&file.as_raw_fd()));
        let facts = facts(&proc, file.as_raw_fd()).unwrap();
        assert_eq!((facts.position, facts.cloexec), (77, true));
        assert_eq!(facts.status_flags & libc::O_ACCMODE as u32, libc::O_RDONLY as u32);
        assert!(facts.info.contains("mnt_id:") && !facts.info.contains("flags:"));
    }
}
