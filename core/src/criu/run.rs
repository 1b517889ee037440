//! Dumps and restores as CRIU would do them: in the work directory, with a log there, and with its files beside the image.

use super::{
    arguments::{Arguments, UsageError},
    files, options,
};
use crate::{
    action::{Action, Observer},
    cli,
    dump::{self, DumpError, DumpReport},
    restore::{self, RestoreError, RestoreReport},
};
use std::{
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Where images are, and where everything else goes.
#[derive(Debug)]
pub struct Place {
    images_dir: PathBuf,
    work_dir: PathBuf,
}

impl Place {
    /// As the flags say; the images directory is made for a dump.
    pub fn named(arguments: &Arguments) -> Result<Self, UsageError> {
        let images = Path::new(arguments.last("images-dir").unwrap_or("."));
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| UsageError::Directory { operation, path, source }
        };
        if arguments.words == ["dump"] {
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(images);
            made.map_err(failed("make the images directory", images))?;
        }
        let work = arguments.last("work-dir").map_or(images, Path::new);
        let find = |what, path: &Path| path.canonicalize().map_err(failed(what, path));
        Self::at(find("use the images directory", images)?, find("use the work directory", work)?)
    }

    /// Makes the work directory that of this process: paths in flags are relative to it.
    pub fn at(images_dir: PathBuf, work_dir: PathBuf) -> Result<Self, UsageError> {
        match std::env::set_current_dir(&work_dir) {
            Ok(()) => Ok(Self { images_dir, work_dir }),
            Err(source) => {
                Err(UsageError::Directory { operation: "use the work directory", path: work_dir, source })
            }
        }
    }

    fn start_log(&self, arguments: &Arguments) -> Result<(), UsageError> {
        let file = arguments.last("log-file").map(|file| self.work_dir.join(file));
        // CRIU counts from errors at 1.
        cli::start_log(arguments.verbosity()?.saturating_sub(1), file.as_deref())?;
        options::warn_of_ignored(arguments);
        Ok(())
    }
}

/// The error goes to the caller's terminal and into the log.
fn complain(operation: &str, error: &dyn std::error::Error) {
    eprintln!("criu {operation}: {error}");
    if cli::logs_to_file() {
        tracing::error!("{operation} failed: {error}");
    }
}

fn note(error: io::Result<()>, what: &str) {
    if let Err(error) = error {
        tracing::warn!("cannot write {what}: {error}");
    }
}

/// Dumps. `answer` is called with the result, perhaps in another process than this.
pub fn dump(
    arguments: &Arguments,
    place: &Place,
    client: Option<Observer>,
    answer: impl Fn(Result<&DumpReport, &DumpError>),
) -> Result<ExitCode, UsageError> {
    place.start_log(arguments)?;
    let images_dir = place.images_dir.clone();
    let observer = Observer::new(move |action, init| {
        // The image is complete, and the tree is not yet killed.
        if action == Action::PostDump {
            files::write_inventory(&images_dir)?;
        }
        client.as_ref().map_or(Ok(()), |client| client.tell(action, init))
    });
    let options = options::dump(arguments, &place.images_dir, Some(observer))?;
    let status = dump::supervised(&options, |result| {
        match result {
            Ok(report) => {
                note(files::write_dump_stats(&place.work_dir, report), "stats-dump");
                tracing::info!(?report, "dumped");
                if arguments.has("display-stats") {
                    println!("{report:#?}");
                }
            }
            Err(error) => complain("dump", error),
        }
        answer(result);
        u8::from(result.is_err())
    });
    Ok(ExitCode::from(status))
}

/// Why there is no restored tree.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The flags.
    #[error(transparent)]
    Usage(#[from] UsageError),
    /// The restore.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

/// Restores.
pub fn restore(
    arguments: &Arguments,
    place: &Place,
    client: Option<Observer>,
) -> Result<RestoreReport, Refusal> {
    place.start_log(arguments)?;
    let options = options::restore(arguments, &place.images_dir, client)?;
    let report = restore::restore(&options).inspect_err(|error| complain("restore", error))?;
    note(files::write_restore_stats(&place.work_dir, &report), "stats-restore");
    tracing::info!(?report, "restored");
    if arguments.has("display-stats") {
        println!("{report:#?}");
    }
    Ok(report)
}

/// Restores, and ends with the root task unless it is detached.
pub fn restore_and_wait(arguments: &Arguments, place: &Place) -> Result<ExitCode, UsageError> {
    match restore(arguments, place, None) {
        Ok(_) if arguments.has("restore-detached") => Ok(ExitCode::SUCCESS),
        Ok(report) => Ok(cli::wait(report.root_pid)),
        Err(Refusal::Usage(error)) => Err(error),
        Err(Refusal::Restore(_)) => Ok(ExitCode::FAILURE),
    }
}
