//! `stasis unlock`.

use super::{CommonArgs, ExitStatus, logging, report};
use crate::restore::{self, RestoreOptions};
use clap::Args;
use std::{path::PathBuf, process::ExitCode};

/// Give an image up: release what its dump keeps for a restore (the network lock)
#[derive(Debug, Args)]
pub struct UnlockArgs {
    /// Directory of the image
    #[arg(value_name = "DIR", default_value = ".")]
    images_dir: PathBuf,
}

/// Runs the subcommand.
pub fn run(args: &UnlockArgs, common: &CommonArgs) -> ExitCode {
    let failed =
        |error: &dyn std::error::Error, status: u8| report::error(common.json, "unlock", error, status);
    if let Err(error) = logging::init(common, None) {
        return ExitCode::from(failed(&error, ExitStatus::Failure as u8));
    }
    let options = RestoreOptions {
        images_dir: args.images_dir.clone(),
        plugins: common.plugins.choice(),
        ..RestoreOptions::default()
    };
    match restore::unlock(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(failed(&error, error.exit_status())),
    }
}
