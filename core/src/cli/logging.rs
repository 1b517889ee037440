//! The log: `tracing` to a file or stderr, by `-v` or `RUST_LOG`.

use super::CommonArgs;
use std::{
    fs::File,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tracing_subscriber::{EnvFilter, fmt::writer::BoxMakeWriter};

/// The log cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the log file {path}: {source}")]
pub struct LogError {
    path: String,
    source: io::Error,
}

static TO_FILE: AtomicBool = AtomicBool::new(false);

/// Whether the log goes to a file, and so must have the errors, too, that the user reads on stderr.
pub fn to_file() -> bool {
    TO_FILE.load(Ordering::Relaxed)
}

/// What `-vN` shows, by N.
const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];

/// Installs the subscriber. `images_dir` is where a relative log file goes unless there is a work directory.
pub fn init(args: &CommonArgs, images_dir: Option<&Path>) -> Result<(), LogError> {
    let base = args.work_dir.as_deref().or(images_dir).unwrap_or(Path::new("."));
    let path = args.log_file.as_ref().map(|file| base.join(file));
    start(args.verbosity.unwrap_or(1), path.as_deref())
}

/// Likewise: what `-v VERBOSITY` shows, into a file or to stderr.
pub fn start(verbosity: u8, file: Option<&Path>) -> Result<(), LogError> {
    let level = LEVELS[usize::from(verbosity).min(LEVELS.len() - 1)];
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let writer = match file {
        None => BoxMakeWriter::new(io::stderr),
        Some(path) => {
            let failed = |source| LogError { path: path.display().to_string(), source };
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(failed)?;
            }
            TO_FILE.store(true, Ordering::Relaxed);
            BoxMakeWriter::new(Arc::new(File::create(path).map_err(failed)?))
        }
    };
    // A second call (tests) keeps the first subscriber.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(false).try_init();
    Ok(())
}
