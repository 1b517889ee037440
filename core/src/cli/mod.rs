//! The command line: one file per subcommand; parses and prints, decides nothing.
//!
//! Flag names and meanings follow CRIU's (DESIGN section 8): same spelling, same sense, or not at all. Options that
//! plugins declare are taken as `--NAME[=VALUE]` and checked once the plugins are loaded.

mod check;
mod demo;
mod dump;
mod inspect;
mod logging;
mod plugins;
mod report;
mod restore;
mod unlock;

use crate::plugins::{PluginChoice, split_arguments};
use clap::{Args, CommandFactory, Parser, Subcommand};
use std::{path::PathBuf, process::ExitCode, time::Duration};

pub(crate) use check::Checks;
pub use logging::LogError;
pub(crate) use logging::{start as start_log, to_file as logs_to_file};
pub use report::ExitStatus;
pub(crate) use restore::wait;

/// Checkpoints running process trees into files and restores them.
#[derive(Debug, Parser)]
#[command(name = "stasis", version, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

/// Options of every subcommand.
#[derive(Debug, Args, Clone)]
pub struct CommonArgs {
    /// Verbosity of the log: -v for 1, -v4 for everything
    #[arg(
        short, long, global = true, num_args = 0..=1, default_missing_value = "3", value_name = "N",
        overrides_with = "verbosity"
    )]
    verbosity: Option<u8>,
    /// Write the log to this file (relative to the work directory) instead of stderr
    #[arg(short = 'o', long, global = true, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Directory for logs and other by-products (default: the images directory)
    #[arg(short = 'W', long, global = true, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Print results and errors as JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(flatten)]
    plugins: PluginArgs,
}

/// Which plugins to use.
#[derive(Debug, Args, Clone, Default)]
struct PluginArgs {
    /// Look for plugins here (repeatable; default: beside the executable, then the installed library directory)
    #[arg(long, global = true, value_name = "DIR")]
    plugin_dir: Vec<PathBuf>,
    /// Use only these plugins
    #[arg(long, global = true, value_name = "A,B", value_delimiter = ',')]
    plugins: Vec<String>,
    /// Do without these plugins
    #[arg(long, global = true, value_name = "A,B", value_delimiter = ',')]
    without: Vec<String>,
    /// Where several plugins would take a resource, these come first
    #[arg(long, global = true, value_name = "A,B", value_delimiter = ',')]
    prefer: Vec<String>,
    /// As root, load plugins also if others can write to them or to their directory
    #[arg(long, global = true)]
    allow_unsafe_plugins: bool,
    /// End the operation when one hook of a plugin takes longer than this many seconds
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 60)]
    plugin_timeout: u64,
}

impl PluginArgs {
    fn choice(&self) -> PluginChoice {
        PluginChoice {
            directories: self.plugin_dir.clone(),
            only: self.plugins.clone(),
            without: self.without.clone(),
            prefer: self.prefer.clone(),
            allow_unsafe: self.allow_unsafe_plugins,
        }
    }
}

impl CommonArgs {
    fn plugin_timeout(&self) -> Option<Duration> {
        (self.plugins.plugin_timeout > 0).then(|| Duration::from_secs(self.plugins.plugin_timeout))
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write a process tree into an image
    Dump(dump::DumpArgs),
    /// Rebuild a process tree from an image
    Restore(restore::RestoreArgs),
    Check(check::CheckArgs),
    /// Show what is in an image
    Inspect(inspect::InspectArgs),
    /// Show which plugins are found, and what each claims
    Plugins(plugins::PluginsArgs),
    Demo(demo::DemoArgs),
    Unlock(unlock::UnlockArgs),
}

/// Runs the command line and gives the exit status.
pub fn main() -> ExitCode {
    let (arguments, options) = split_arguments(&Cli::command(), std::env::args_os());
    let cli = Cli::parse_from(arguments);
    match &cli.command {
        Command::Dump(args) => dump::run(args, &cli.common, options),
        Command::Restore(args) => restore::run(args, &cli.common, options),
        Command::Check(args) => check::run(args, &cli.common.plugins.choice(), cli.common.json),
        Command::Inspect(args) => inspect::run(args, cli.common.json),
        Command::Unlock(args) => unlock::run(args, &cli.common),
        Command::Demo(args) => demo::run(args),
        Command::Plugins(args) => plugins::run(args, &cli.common.plugins.choice(), cli.common.json),
    }
}

/// A number of bytes with an optional K, M or G, as CRIU takes it.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let units = [(['K', 'k'], 10), (['M', 'm'], 20), (['G', 'g'], 30)];
    let found = units.iter().find_map(|(letters, shift)| Some((text.strip_suffix(letters)?, *shift)));
    let (digits, shift) = found.unwrap_or((text, 0));
    let number: u64 = digits.parse().map_err(|_| "a number of bytes, with K, M or G".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
