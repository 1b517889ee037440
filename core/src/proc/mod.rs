//! Reading /proc: what the `procfs` crate lacks or does too slowly for trees with thousands of mappings and descriptors.

pub mod descriptor;
pub mod kcmp;
pub mod mappings;
pub mod status;

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat, readlinkat},
    sys::stat::{FileStat, Mode, fstatat},
};
use std::{
    fs::File,
    io::Read,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
};

/// A /proc file of a task could not be read or understood.
#[derive(Debug, thiserror::Error)]
pub enum ProcError {
    /// The kernel refused.
    #[error("cannot read /proc/{pid}/{file}: {errno}")]
    Read {
        /// The task.
        pid: i32,
        /// File below /proc/PID.
        file: String,
        /// Why.
        errno: Errno,
    },
    /// The contents are not what proc(5) says.
    #[error("/proc/{pid}/{file} is not as expected: {what}")]
    Format {
        /// The task.
        pid: i32,
        /// File below /proc/PID.
        file: &'static str,
        /// What is missing or odd.
        what: String,
    },
    /// kcmp(2) failed.
    #[error("cannot compare tasks {first} and {second} by kcmp: {errno}")]
    Compare {
        /// First task.
        first: i32,
        /// Second task.
        second: i32,
        /// Why.
        errno: Errno,
    },
}

impl ProcError {
    /// Whether the task does not exist any more.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Read { errno: Errno::ENOENT | Errno::ESRCH, .. })
    }
}

/// An open `/proc/PID`: stays with this very task, even if the pid is reused.
#[derive(Debug)]
pub struct ProcDir {
    pid: i32,
    dir: OwnedFd,
}

impl ProcDir {
    /// Opens `/proc/PID`.
    pub fn open(pid: i32) -> Result<Self, ProcError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = nix::fcntl::open(format!("/proc/{pid}").as_str(), flags, Mode::empty())
            .map_err(|errno| ProcError::Read { pid, file: String::new(), errno })?;
        Ok(Self { pid, dir })
    }

    /// Opens `/proc/self`.
    pub fn open_self() -> Result<Self, ProcError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = nix::fcntl::open("/proc/self", flags, Mode::empty()).map_err(|errno| ProcError::Read {
            pid: 0,
            file: "self".into(),
            errno,
        })?;
        Ok(Self { pid: std::process::id() as i32, dir })
    }

    /// The task.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The directory itself.
    pub fn as_dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    fn failed(&self, file: &str, errno: Errno) -> ProcError {
        ProcError::Read { pid: self.pid, file: file.into(), errno }
    }

    /// Opens a file below.
    pub fn open_file(&self, file: &str, flags: OFlag) -> Result<File, ProcError> {
        openat(&self.dir, file, flags | OFlag::O_CLOEXEC, Mode::empty())
            .map(File::from)
            .map_err(|errno| self.failed(file, errno))
    }

    /// Reads a whole file below.
    pub fn read(&self, file: &str) -> Result<Vec<u8>, ProcError> {
        let mut contents = Vec::with_capacity(4096);
        self.open_file(file, OFlag::O_RDONLY)?
            .read_to_end(&mut contents)
            .map_err(|error| self.failed(file, Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))))?;
        Ok(contents)
    }

    /// Reads a whole text file below; bytes that are not UTF-8 (names of tasks) are replaced.
    pub fn read_text(&self, file: &str) -> Result<String, ProcError> {
        let contents = self.read(file)?;
        Ok(String::from_utf8(contents)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    /// Where a magic link points, as text.
    pub fn link(&self, file: &str) -> Result<Vec<u8>, ProcError> {
        readlinkat(&self.dir, file).map(OsStringExt::into_vec).map_err(|errno| self.failed(file, errno))
    }

    /// stat(2) of what a magic link points to.
    pub fn stat(&self, file: &str) -> Result<FileStat, ProcError> {
        fstatat(&self.dir, file, nix::fcntl::AtFlags::empty()).map_err(|errno| self.failed(file, errno))
    }
}
