//! `stasis dump`.

use super::{CommonArgs, ExitStatus, logging, parse_size, report};
use crate::{
    dump::{self, Afterwards, DumpOptions, OnUnclaimed, Resource, Survey, TaskResources},
    plugins::GivenOption,
};
use clap::Args;
use serde_json::json;
use std::{io::Write, path::PathBuf, process::ExitCode, time::Duration};

/// Arguments of `stasis dump`.
#[derive(Debug, Args)]
pub struct DumpArgs {
    /// Dump the tree whose root is this process
    #[arg(short = 't', long = "tree", value_name = "PID")]
    tree: i32,
    /// Directory for the image
    #[arg(short = 'D', long, value_name = "DIR", default_value = ".")]
    images_dir: PathBuf,
    /// Leave the tree running; pages are written from a copy-on-write snapshot
    #[arg(short = 'R', long)]
    leave_running: bool,
    /// Leave the tree stopped (SIGSTOP) instead of killing it
    #[arg(short = 's', long, conflicts_with = "leave_running")]
    leave_stopped: bool,
    /// The tree is a shell's job: its session, group and terminal may be outside
    #[arg(short = 'j', long)]
    shell_job: bool,
    /// Show, for every task, who would take each of its resources, what a dump would refuse, and what would change that. Nothing is
    /// stopped or written
    #[arg(long)]
    dry_run: bool,
    /// What becomes of what no plugin takes: a descriptor of this kind (as its link in /proc/PID/fd shows: socket, pipe, chardev ...; or all), or a
    /// mapping (skip only); may be repeated
    #[arg(long, value_name = "KIND=fail|skip|null|close")]
    on_unclaimed: Vec<OnUnclaimed>,
    /// A resource that is outside of the tree and stays there: keys of plugins, e.g. tty[RDEV:DEV]; of any descriptor, file[MOUNT:INODE]
    /// in hexadecimal, or what /proc/PID/fd shows; may be repeated
    #[arg(long, value_name = "KEY")]
    external: Vec<String>,
    /// Run this command at fixed points, told by CRTOOLS_SCRIPT_ACTION; may be repeated
    #[arg(long, value_name = "COMMAND")]
    action_script: Vec<String>,
    /// With --leave-running: keep the tree frozen while pages are copied, and need no memory for a snapshot
    #[arg(long)]
    no_cow: bool,
    /// Seconds that tasks may take to stop
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    timeout: f64,
    /// Freeze with this cgroup instead of stopping task by task
    #[arg(long, value_name = "DIR")]
    freeze_cgroup: Option<PathBuf>,
    /// Largest deleted file that goes into the image, in bytes on disk; K, M and G are understood
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = parse_size)]
    ghost_limit: u64,
    /// Make a hard link beside a file that was unlinked under the name by which it is open and has others; the restore
    /// takes it away
    #[arg(long)]
    link_remap: bool,
    /// Keep locks and leases on files. Between dump and restore nobody holds them: a restore fails if another process has
    /// taken one
    #[arg(short = 'l', long)]
    file_locks: bool,
    /// Wait until all pages are on the disk (the rest of the image always is)
    #[arg(long)]
    sync: bool,
    /// Copy all pages from outside the tasks
    #[arg(long, hide = true)]
    outside_only: bool,
}

/// Runs the subcommand.
pub fn run(args: &DumpArgs, common: &CommonArgs, plugin_options: Vec<GivenOption>) -> ExitCode {
    let logs = (!args.dry_run).then_some(args.images_dir.as_path());
    if let Err(error) = logging::init(common, logs) {
        return ExitCode::from(report::error(common.json, "dump", &error, ExitStatus::Failure as u8));
    }
    let options = DumpOptions {
        afterwards: match (args.leave_running, args.leave_stopped) {
            (true, _) => Afterwards::Run,
            (_, true) => Afterwards::Stop,
            _ => Afterwards::Kill,
        },
        shell_job: args.shell_job,
        external: args.external.clone(),
        on_unclaimed: args.on_unclaimed.clone(),
        action_scripts: args.action_script.clone(),
        copy_on_write: !args.no_cow,
        timeout: Duration::try_from_secs_f64(args.timeout).unwrap_or(Duration::MAX),
        freeze_cgroup: args.freeze_cgroup.clone(),
        sync: args.sync,
        outside_only: args.outside_only,
        ghost_limit: args.ghost_limit,
        link_remap: args.link_remap,
        file_locks: args.file_locks,
        plugins: common.plugins.choice(),
        plugin_options,
        plugin_timeout: common.plugin_timeout(),
        ..DumpOptions::new(args.tree, &args.images_dir)
    };
    if args.dry_run {
        return ExitCode::from(dry_run(&options, common.json));
    }
    let status = dump::supervised(&options, |result| match result {
        Ok(done) if common.json => {
            println!(
                "{}",
                json!({
                    "ok": true, "tasks": done.tasks, "threads": done.threads,
                    "frozen_us": done.frozen.as_micros() as u64, "total_us": done.total.as_micros() as u64,
                    "image_bytes": done.image_bytes, "page_bytes": done.page_bytes, "warnings": done.warnings,
                })
            );
            ExitStatus::Success as u8
        }
        Ok(done) => {
            tracing::info!(?done, "dumped");
            for warning in &done.warnings {
                eprintln!("stasis dump: warning: {warning}");
            }
            ExitStatus::Success as u8
        }
        Err(error) => {
            let status = error.exit_status();
            report::error(common.json, "dump", &error, status);
            status
        }
    });
    ExitCode::from(status)
}

/// Shows what a dump would find; the status is that of such a dump as far as it can be told.
fn dry_run(options: &DumpOptions, json: bool) -> u8 {
    dump::survey_supervised(options, |result| match result {
        Ok(survey) => {
            let ok = survey.refusals() == 0;
            // A reader that closed the pipe has seen enough.
            let _ = if json {
                writeln!(std::io::stdout(), "{:#}", survey_as_json(survey))
            } else {
                print_survey(&mut std::io::stdout().lock(), survey)
            };
            if ok { ExitStatus::Success as u8 } else { ExitStatus::Unsupported as u8 }
        }
        Err(error) => {
            let status = error.exit_status();
            report::error(json, "dump", &error, status);
            status
        }
    })
}

fn survey_as_json(survey: &Survey) -> serde_json::Value {
    let resource = |resource: &Resource| {
        json!({
            "place": resource.place, "what": resource.what, "taken_by": resource.taken_by,
            "refusal": resource.refusal, "remedy": resource.remedy,
        })
    };
    let task = |task: &TaskResources| {
        json!({
            "pid": task.pid, "name": task.name, "mappings": task.mappings,
            "resources": task.resources.iter().map(resource).collect::<Vec<_>>(),
        })
    };
    json!({
        "ok": survey.refusals() == 0,
        "refusals": survey.refusals(),
        "tasks": survey.tasks.iter().map(task).collect::<Vec<_>>(),
        "warnings": survey.warnings,
    })
}

fn print_survey(out: &mut impl Write, survey: &Survey) -> std::io::Result<()> {
    for task in &survey.tasks {
        writeln!(out, "task {} ({}): {} mappings", task.pid, task.name, task.mappings)?;
        for Resource { place, what, taken_by, refusal, remedy } in &task.resources {
            let taken_by = taken_by.as_deref().unwrap_or("nobody");
            writeln!(out, "    {place:<16} {what:<32} {taken_by}")?;
            let Some(refusal) = refusal else { continue };
            writeln!(out, "        refused: {refusal}")?;
            if !remedy.is_empty() {
                writeln!(out, "        remedy: {remedy}")?;
            }
        }
    }
    for warning in &survey.warnings {
        writeln!(out, "warning: {warning}")?;
    }
    match survey.refusals() {
        0 => writeln!(out, "nothing is refused, as far as a tree can tell that is not stopped"),
        1 => writeln!(out, "one resource would be refused"),
        n => writeln!(out, "{n} resources would be refused"),
    }
}
