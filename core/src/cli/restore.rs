//! `stasis restore`.

use super::{CommonArgs, ExitStatus, logging, report};
use crate::{
    plugins::GivenOption,
    restore::{self, InheritFd, RestoreOptions},
};
use clap::Args;
use nix::{
    sys::wait::{WaitStatus, waitpid},
    unistd::Pid,
};
use serde_json::json;
use std::{path::PathBuf, process::ExitCode, time::Duration};

/// Arguments of `stasis restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Directory of the image
    #[arg(short = 'D', long, value_name = "DIR", default_value = ".")]
    images_dir: PathBuf,
    /// Do not wait for the restored root process to end
    #[arg(short = 'd', long)]
    restore_detached: bool,
    /// Make the restored root process a child of the caller's parent
    #[arg(short = 'S', long, requires = "restore_detached")]
    restore_sibling: bool,
    /// Leave all tasks stopped (SIGSTOP)
    #[arg(short = 's', long)]
    leave_stopped: bool,
    /// Restore into the caller's session, group and terminal what was dumped as a shell's job
    #[arg(short = 'j', long)]
    shell_job: bool,
    /// A resource that is outside of the tree, as at the dump; may be repeated
    #[arg(long, value_name = "KEY")]
    external: Vec<String>,
    /// Descriptor N of this command takes the place of an external resource; may be repeated
    #[arg(long, value_name = "fd[N]:KEY")]
    inherit_fd: Vec<InheritFd>,
    /// Run this command at fixed points, told by CRTOOLS_SCRIPT_ACTION; may be repeated
    #[arg(long, value_name = "COMMAND")]
    action_script: Vec<String>,
    /// Write the pid of the restored root process to this file
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
    /// Do not refuse files that have another mode, size or build id than at the dump
    #[arg(long)]
    no_file_check: bool,
    /// Take the locks of the image again, which is done in any case
    #[arg(short = 'l', long)]
    file_locks: bool,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<f64>,
}

/// Runs the subcommand.
pub fn run(args: &RestoreArgs, common: &CommonArgs, plugin_options: Vec<GivenOption>) -> ExitCode {
    let failed =
        |error: &dyn std::error::Error, status: u8| report::error(common.json, "restore", error, status);
    if let Err(error) = logging::init(common, Some(&args.images_dir)) {
        return ExitCode::from(failed(&error, ExitStatus::Failure as u8));
    }
    let options = RestoreOptions {
        images_dir: args.images_dir.clone(),
        plugins: common.plugins.choice(),
        plugin_options,
        sibling: args.restore_sibling,
        leave_stopped: args.leave_stopped,
        shell_job: args.shell_job,
        external: args.external.clone(),
        action_scripts: args.action_script.clone(),
        observer: None,
        inherit_fds: args.inherit_fd.clone(),
        pidfile: args.pidfile.clone(),
        timeout: args.timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
        plugin_timeout: common.plugin_timeout(),
        no_file_check: args.no_file_check,
        threads: 0,
    };
    let done = match restore::restore(&options) {
        Ok(done) => done,
        Err(error) => return ExitCode::from(failed(&error, error.exit_status())),
    };
    if common.json {
        println!(
            "{}",
            json!({
                "ok": true, "pid": done.root_pid, "tasks": done.tasks, "threads": done.threads,
                "total_us": done.elapsed.as_micros() as u64,
            })
        );
    }
    tracing::info!(?done, "restored");
    if args.restore_detached { ExitCode::SUCCESS } else { wait(done.root_pid) }
}

/// Waits for the restored root and ends as it did; 128 plus the signal if it was killed, as shells do.
pub(crate) fn wait(pid: i32) -> ExitCode {
    loop {
        match waitpid(Pid::from_raw(pid), None) {
            Ok(WaitStatus::Exited(_, status)) => return ExitCode::from(status as u8),
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                return ExitCode::from(128_u8.saturating_add(signal as u8));
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            // Somebody else reaped it: there is nothing left to wait for.
            Err(_) => return ExitCode::SUCCESS,
        }
    }
}
