//! `criu swrk FD`: requests of one caller by a socket, in CRIU's published protocol. runc, crun and all that is built on them
//! use it.
//!
//! This process has one thread and is the first one of a dump or restore, so a root task that is to be a sibling becomes a child of
//! the caller.

mod client;
mod request;

use super::{
    VERSION,
    arguments::{Arguments, UsageError},
    records::{Dumped, Features, Options, Request, RequestType, Response, Restored, Version},
    run::{self, Place, Refusal},
};
use crate::{action::Observer, dump::DumpError, restore::RestoreError};
use client::Client;
use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Serves the caller at the other end of descriptor `number`. Success means that the last request was.
pub fn serve(number: &str) -> Result<ExitCode, UsageError> {
    let wrong = |why: String| UsageError::Socket { number: number.to_owned(), why };
    let number = number.parse().map_err(|error: std::num::ParseIntError| wrong(error.to_string()))?;
    let client = Client::inherited(number).map_err(|error| wrong(error.to_string()))?;
    let mut status = ExitCode::SUCCESS;
    loop {
        let more = match client.receive() {
            Ok(Some(request)) => {
                let (done, keep_open) = answer(&client, &request);
                status = if done { ExitCode::SUCCESS } else { ExitCode::FAILURE };
                keep_open
            }
            Ok(None) => return Ok(status),
            Err(error) => {
                eprintln!("criu swrk: {error}");
                return Ok(ExitCode::FAILURE);
            }
        };
        if !more {
            // The caller reads the answer and closes, or shuts down its end.
            while let Ok(Some(_)) = client.receive() {}
            return Ok(status);
        }
    }
}

/// Serves one request; whether it succeeded, and whether another may follow.
fn answer(client: &Client, request: &Request) -> (bool, bool) {
    let keep_open = request.keep_open == Some(true);
    let kind = RequestType::try_from(request.r#type).unwrap_or(RequestType::Empty);
    let response = match kind {
        RequestType::Version => Response { version: Some(version()), ..succeeded(kind) },
        RequestType::FeatureCheck => {
            Response { features: Some(features(request.features.as_ref())), ..succeeded(kind) }
        }
        RequestType::Check => match crate::cli::Checks::run(&Default::default()).failures().as_slice() {
            [] => succeeded(kind),
            failures => failed(kind, libc::ENOSYS, failures.join("; ")),
        },
        RequestType::Dump => return (dump(client, request), false),
        RequestType::Restore => match restore(client, request) {
            Ok(pid) => Response { restore: Some(Restored { pid }), ..succeeded(kind) },
            Err(refusal) => {
                let errno = if let Refusal::Restore(error) = &refusal { restore_errno(error) } else { 0 };
                complain(&refusal);
                failed(kind, errno, refusal.to_string())
            }
        },
        _ => {
            let message = format!("requests of kind {} are not served", request.r#type);
            Response { r#type: request.r#type, ..failed(kind, libc::EOPNOTSUPP, message) }
        }
    };
    (respond(client, &response), keep_open && !matches!(kind, RequestType::Restore))
}

/// Those of the library are told where they arise.
fn complain(refusal: &Refusal) {
    if let Refusal::Usage(error) = refusal {
        eprintln!("criu swrk: {error}");
        tracing::error!("{error}");
    }
}

fn succeeded(kind: RequestType) -> Response {
    Response { r#type: kind.into(), success: true, ..Response::default() }
}

fn failed(kind: RequestType, errno: i32, message: String) -> Response {
    Response {
        r#type: kind.into(),
        success: false,
        cr_errno: (errno != 0).then_some(errno),
        cr_errmsg: Some(message),
        ..Response::default()
    }
}

/// Whether the request succeeded, and the caller has heard so.
fn respond(client: &Client, response: &Response) -> bool {
    match client.send(response) {
        Ok(()) => response.success,
        Err(error) => {
            tracing::error!("the caller has gone away: {error}");
            false
        }
    }
}

fn version() -> Version {
    let gitid = Some(format!("stasis-{}", env!("CARGO_PKG_VERSION")));
    let (major_number, minor_number) = VERSION;
    Version { major_number, minor_number, gitid, ..Version::default() }
}

/// Of those asked for, what is there.
fn features(wanted: Option<&Features>) -> Features {
    let absent = |wanted: Option<bool>| wanted.map(|_| false);
    let wanted = wanted.cloned().unwrap_or_default();
    Features {
        mem_track: absent(wanted.mem_track),
        lazy_pages: absent(wanted.lazy_pages),
        pidfd_store: absent(wanted.pidfd_store),
    }
}

fn dump(client: &Client, request: &Request) -> bool {
    let kind = RequestType::Dump;
    let answer = |result: Result<(), &DumpError>| {
        let response = match result {
            Ok(()) => Response { dump: Some(Dumped { restored: Some(false) }), ..succeeded(kind) },
            Err(error) => failed(kind, 0, error.to_string()),
        };
        respond(client, &response);
    };
    let begin = || -> Result<ExitCode, UsageError> {
        let (arguments, place) = begin(client, request)?;
        run::dump(&arguments, &place, observer(client, request), |result| answer(result.map(drop)))
    };
    match begin() {
        Ok(status) => status == ExitCode::SUCCESS,
        Err(error) => {
            let refusal = Refusal::Usage(error);
            complain(&refusal);
            respond(client, &failed(kind, libc::EINVAL, refusal.to_string()))
        }
    }
}

fn restore(client: &Client, request: &Request) -> Result<i32, Refusal> {
    let (arguments, place) = begin(client, request)?;
    Ok(run::restore(&arguments, &place, observer(client, request))?.root_pid)
}

fn restore_errno(error: &RestoreError) -> i32 {
    if let RestoreError::PidTaken { .. } = error { libc::EEXIST } else { error.to_failure().errno }
}

/// Goes to where the request says.
fn begin(client: &Client, request: &Request) -> Result<(Arguments, Place), UsageError> {
    let options = request.opts.as_ref().ok_or(UsageError::Missing("opts"))?;
    let mut arguments = request::arguments(options)?;
    arguments
        .words
        .push(if request.r#type == i32::from(RequestType::Dump) { "dump" } else { "restore" }.into());
    let images_dir = match (images_number(options), options.images_dir.as_deref()) {
        (Some(number), _) => client_directory(client, number)?,
        (None, Some(path)) => PathBuf::from(path),
        (None, None) => return Err(UsageError::Missing("images_dir_fd")),
    };
    let work_dir = match options.work_dir_fd.filter(|number| *number >= 0) {
        Some(number) => client_directory(client, number)?,
        None => images_dir.clone(),
    };
    Ok((arguments, Place::at(images_dir, work_dir)?))
}

fn images_number(options: &Options) -> Option<i32> {
    options.images_dir_fd.filter(|number| *number >= 0)
}

/// The path of a directory that the caller has open. It may be in another mount namespace, where the path means something else: then
/// the way leads through the caller's descriptor.
fn client_directory(client: &Client, number: i32) -> Result<PathBuf, UsageError> {
    let pid = client.pid().unwrap_or(0);
    let link = PathBuf::from(format!("/proc/{pid}/fd/{number}"));
    let failed = |source: io::Error| UsageError::Directory {
        operation: "use the caller's directory",
        path: link.clone(),
        source,
    };
    let identity = |path: &Path| fs::metadata(path).map(|data| (data.dev(), data.ino()));
    let wanted = identity(&link).map_err(failed)?;
    let path = fs::read_link(&link).map_err(failed)?;
    Ok(if identity(&path).is_ok_and(|found| found == wanted) { path } else { link })
}

/// The caller, if it wants to be told.
fn observer(client: &Client, request: &Request) -> Option<Observer> {
    let wanted = request.opts.as_ref().and_then(|options| options.notify_scripts) == Some(true);
    let is_restore = request.r#type == i32::from(RequestType::Restore);
    let client = client.clone();
    wanted
        .then(|| Observer::new(move |action, init| client.notify(action.name(), init.filter(|_| is_restore))))
}
