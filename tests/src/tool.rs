//! The checkpoint tool as a child process: which binary, how it is called, and how long it may take.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Why a call of the tool did not end as it should.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It ended with another status than 0.
    #[error("{command}: {status}\n{said}")]
    Status {
        /// The command line.
        command: String,
        /// Its end.
        status: ExitStatus,
        /// What it wrote to stdout and stderr.
        said: String,
    },
    /// It did not end in time and was killed.
    #[error("{command}: still running after {limit:?}\n{said}")]
    Hangs {
        /// The command line.
        command: String,
        /// The time it had.
        limit: Duration,
        /// What it wrote until then.
        said: String,
    },
    /// It could not be started.
    #[error("{command}: {source}")]
    Start {
        /// The command line.
        command: String,
        /// The errno.
        source: io::Error,
    },
}

/// A checkpoint tool with CRIU's flags.
#[derive(Debug, Clone)]
pub struct Tool {
    /// Its binary.
    pub bin: PathBuf,
    /// Whether it is another tool than stasis.
    pub peer: bool,
}

/// How a call of the tool ended.
#[derive(Debug)]
pub struct Done {
    /// Its exit status.
    pub status: ExitStatus,
    /// stdout and stderr.
    pub said: String,
    /// Wall-clock time.
    pub took: Duration,
    /// The command line.
    pub command: String,
}

impl Done {
    /// Fails unless the status is 0.
    pub fn ok(self) -> Result<Done, ToolError> {
        if self.status.success() {
            return Ok(self);
        }
        Err(ToolError::Status { command: self.command, status: self.status, said: self.said })
    }
}

/// The directory of cargo's build products that the running executable belongs to.
pub fn target_dir() -> io::Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let dir = exe.parent().unwrap_or(Path::new("/"));
    Ok(if dir.ends_with("deps") { dir.parent().unwrap_or(dir).to_owned() } else { dir.to_owned() })
}

impl Tool {
    /// `$STASIS_PEER`, else `$STASIS_BIN`, else the `stasis` next to the running executable.
    pub fn discover() -> io::Result<Tool> {
        if let Some(bin) = std::env::var_os("STASIS_PEER") {
            return Ok(Tool { bin: bin.into(), peer: true });
        }
        let bin = match std::env::var_os("STASIS_BIN") {
            Some(bin) => bin.into(),
            None => target_dir()?.join("stasis"),
        };
        match bin.exists() {
            true => Ok(Tool { bin, peer: false }),
            false => Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("{} is not built: run `cargo build --workspace` first", bin.display()),
            )),
        }
    }

    /// `dump -t PID -D IMAGES` with a log beside it.
    pub fn dump(&self, pid: i32, images: &Path, more: &[&str]) -> Command {
        let mut command = Command::new(&self.bin);
        command.args(["dump", "-t", &pid.to_string(), "-v4", "-D"]).arg(images);
        command.arg("-o").arg(images.with_extension("dump.log")).args(more);
        command
    }

    /// `restore -d -D IMAGES` with a log beside it.
    pub fn restore(&self, images: &Path, more: &[&str]) -> Command {
        let mut command = Command::new(&self.bin);
        command.args(["restore", "-d", "-v4", "-D"]).arg(images);
        command.arg("-o").arg(images.with_extension("restore.log")).args(more);
        command
    }
}

/// Starts a command with its output going to a file, in a process group of its own.
pub fn start(command: &mut Command, output: &Path) -> Result<Child, ToolError> {
    let mut attempt = || -> io::Result<Child> {
        let file = fs::File::create(output)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0).spawn()
    };
    let child = attempt();
    child.map_err(|source| ToolError::Start { command: line(command), source })
}

/// Runs a command to its end; `Err` means that it could not be started or that it hangs.
pub fn run(command: &mut Command, output: &Path, limit: Duration) -> Result<Done, ToolError> {
    let began = Instant::now();
    let mut child = start(command, output)?;
    let said = || fs::read_to_string(output).unwrap_or_default();
    loop {
        // A restored tree may keep nothing of the tool open, so waiting for the child alone is enough.
        match child.try_wait() {
            Ok(Some(status)) => {
                return Ok(Done { status, said: said(), took: began.elapsed(), command: line(command) });
            }
            Ok(None) if began.elapsed() < limit => {
                std::thread::sleep(Duration::from_micros(if began.elapsed().as_millis() < 100 {
                    200
                } else {
                    2000
                }));
            }
            Ok(None) => {
                let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
                let _ = child.wait();
                return Err(ToolError::Hangs { command: line(command), limit, said: said() });
            }
            Err(source) => return Err(ToolError::Start { command: line(command), source }),
        }
    }
}

/// The command line, as one would type it.
pub fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
