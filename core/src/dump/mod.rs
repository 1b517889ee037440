//! The dump pipeline: reads as the list of steps in ARCHITECTURE.md.

mod claim;
mod collect;
mod context;
mod error;
mod ghosts;
mod host;
mod inventory;
mod mapped;
mod options;
mod pages;
mod resources;
mod survey;
mod unclaimed;

pub use error::DumpError;
pub use options::{Afterwards, DumpOptions};
pub use survey::{Resource, Survey, TaskResources};
pub use unclaimed::{OnUnclaimed, OnUnclaimedError, Policy, Unclaimed};

use crate::{
    action::Action,
    front::{self, Supervision},
    guardian::{Guardian, protocol::Outcome},
    image::ImageWriter,
    plugins::{CallContext, HookWatch, Registry},
};
use host::DumpHost;
use inventory::Inventory;
use stasis_plugin_api::Event;
use std::{
    cell::{Cell, RefCell},
    time::{Duration, Instant},
};

/// What a dump did.
#[derive(Debug, Clone, Default)]
pub struct DumpReport {
    /// Processes in the image.
    pub tasks: usize,
    /// Threads in the image.
    pub threads: usize,
    /// Until all tasks had stopped.
    pub freezing: Duration,
    /// Copying pages, their checksums included.
    pub copying: Duration,
    /// From the first task stopped to the last one running again; until the end of the dump if none does.
    pub frozen: Duration,
    /// All of it.
    pub total: Duration,
    /// Bytes of pages stored.
    pub page_bytes: u64,
    /// Bytes of the whole image.
    pub image_bytes: u64,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Everything about one dump that its steps share.
pub(crate) struct Context<'a> {
    options: &'a DumpOptions,
    registry: Registry,
    watch: &'static HookWatch,
    /// None in a dry run.
    writer: Option<ImageWriter>,
    guardian: RefCell<Guardian>,
    inventory: RefCell<Inventory>,
    warnings: RefCell<Vec<String>>,
    /// Whether the scripts were asked to cut connections off, and not yet to let them go on.
    network_locked: Cell<bool>,
}

impl<'a> Context<'a> {
    fn new(
        options: &'a DumpOptions,
        guardian: Guardian,
        watch: &'static HookWatch,
        writer: impl FnOnce() -> Result<Option<ImageWriter>, DumpError>,
    ) -> Result<Self, DumpError> {
        let mut registry = Registry::load(&options.plugins)?;
        for name in registry.set_options(&options.plugin_options)? {
            tracing::warn!("--{name}: no plugin knows it, so it is ignored");
        }
        Ok(Self {
            options,
            registry,
            watch,
            writer: writer()?,
            guardian: RefCell::new(guardian),
            inventory: RefCell::default(),
            warnings: RefCell::default(),
            network_locked: Cell::default(),
        })
    }

    /// The image.
    fn writer(&self) -> Result<&ImageWriter, DumpError> {
        self.writer.as_ref().ok_or(DumpError::DryRun)
    }

    /// What the hooks of `plugin` may ask.
    fn host<'s>(&'s self, plugin: &'s str) -> DumpHost<'s> {
        DumpHost { context: self, plugin }
    }

    /// A watched call of a hook.
    fn call<'s>(
        &self,
        host: &'s DumpHost<'s>,
        task: i32,
        task_name: &'s str,
        resource: &'s str,
    ) -> CallContext<'s, DumpHost<'s>> {
        CallContext { watch: self.watch, host, task, task_name, resource }
    }

    /// Runs Lifecycle hooks.
    fn lifecycle(&self, event: Event) -> Result<(), DumpError> {
        for kind in self.registry.lifecycles() {
            let host = self.host(&kind.plugin);
            self.call(&host, 0, "", "").event(kind, event)?;
        }
        Ok(())
    }

    /// Runs the user's scripts.
    fn action(&self, action: Action) -> Result<(), DumpError> {
        let options = self.options;
        Ok(options.scripts().run(action, Some(options.tree))?)
    }

    /// Lets the tree run on, connections included.
    fn resume(&self) -> Result<(), DumpError> {
        self.lifecycle(Event::BeforeResume)?;
        self.network_locked.set(false);
        self.action(Action::NetworkUnlock)?;
        Ok(self.guardian.borrow_mut().resume_originals()?)
    }

    /// Whether the user wants to stop; asked between steps.
    fn check_interrupted(&self) -> Result<(), DumpError> {
        Ok(front::check_interrupted()?)
    }
}

/// Dumps a process tree, in a child process that may crash or hang with its plugins; `report` runs there and gives the exit
/// status. To be called by a process with a single thread.
///
/// The guardian is forked here, before any plugin is loaded.
pub fn supervised(options: &DumpOptions, report: impl Fn(Result<&DumpReport, &DumpError>) -> u8) -> u8 {
    supervise(options, |guardian, watch| dump(options, guardian, watch), report)
}

/// Looks at a process tree that runs on, and tells what a dump would find; otherwise as [`supervised`].
pub fn survey_supervised(options: &DumpOptions, report: impl Fn(Result<&Survey, &DumpError>) -> u8) -> u8 {
    supervise(options, |guardian, watch| survey::survey(options, guardian, watch), report)
}

fn supervise<T>(
    options: &DumpOptions,
    work: impl Fn(Guardian, &'static HookWatch) -> Result<T, DumpError>,
    report: impl Fn(Result<&T, &DumpError>) -> u8,
) -> u8 {
    let run = || -> Result<u8, DumpError> {
        let watch = HookWatch::new().map_err(no_page)?;
        let guardian = Guardian::spawn()?;
        let supervision = Supervision {
            watch,
            plugin_timeout: options.plugin_timeout,
            aftermath: "the tree runs on as before",
        };
        let command = || report(work(guardian, watch).as_ref());
        Ok(front::supervise(&supervision, command)?)
    };
    run().unwrap_or_else(|error| report(Err(&error)))
}

fn no_page(source: std::io::Error) -> DumpError {
    DumpError::Front(front::FrontError::System { operation: "map the hook status page", source })
}

/// The dump itself.
fn dump(
    options: &DumpOptions,
    guardian: Guardian,
    watch: &'static HookWatch,
) -> Result<DumpReport, DumpError> {
    let started = Instant::now();
    let writer = || Ok(Some(ImageWriter::create(&options.images_dir)?));
    let context = Context::new(options, guardian, watch, writer)?;
    let mut report = DumpReport::default();
    let result = steps(&context, &mut report);
    if result.is_err() {
        if context.network_locked.get()
            && let Err(error) = context.action(Action::NetworkUnlock)
        {
            tracing::error!("{error}");
        }
        // The first error is what the user wants to know; what fails on the way back is in the log.
        if let Err(error) = context.guardian.borrow_mut().finish(Outcome::Run) {
            tracing::error!("putting the tree back: {error}");
        }
        if let Err(error) = context.lifecycle(Event::Aborted) {
            tracing::error!("aborting: {error}");
        }
    }
    result?;
    let Context { guardian, warnings, .. } = context;
    drop(guardian);
    report.warnings = warnings.into_inner();
    report.total = started.elapsed();
    Ok(report)
}

/// Forks a copy-on-write child in each of these processes; none if one of them may not fork (limits, pids.max, overcommit).
fn take_snapshots(context: &Context<'_>, pids: &[i32]) -> Result<Vec<(i32, i32)>, DumpError> {
    if pids.is_empty() {
        return Ok(Vec::new());
    }
    match context.guardian.borrow_mut().snapshot(pids) {
        Ok(snapshots) => Ok(snapshots),
        Err(error) if error.is_refused_call() => {
            let message =
                format!("no copy-on-write snapshot, the tree stays frozen while it is copied: {error}");
            context.warnings.borrow_mut().push(message);
            Ok(Vec::new())
        }
        Err(error) => Err(error.into()),
    }
}

/// What makes the image and what becomes of the tree. An error leaves the tree stopped; the caller puts it back.
fn steps(context: &Context<'_>, report: &mut DumpReport) -> Result<(), DumpError> {
    let options = context.options;
    context.action(Action::PreDump)?;
    context.lifecycle(Event::BeforeFreeze)?;
    context.check_interrupted()?;
    let frozen = Instant::now();
    let passed = |step: &'static str| tracing::debug!(after = ?frozen.elapsed(), "{step}");
    let found = collect::seize(context)?;
    report.freezing = frozen.elapsed();
    passed("seized");
    let mut frozen_tree = collect::describe(context, &found)?;
    passed("described and claimed");
    context.check_interrupted()?;
    frozen_tree.inspect(context)?;
    passed("asked the tasks");
    context.network_locked.set(true);
    context.action(Action::NetworkLock)?;
    context.action(Action::QueryExtFiles)?;
    context.lifecycle(Event::Frozen)?;
    frozen_tree.write(context)?;
    resources::namespaces(context, &frozen_tree.namespaces)?;
    resources::objects(context)?;
    resources::tables(context, |pid| frozen_tree.table_number(pid), |uid| frozen_tree.uid_inside(uid))?;
    resources::tasks(context)?;
    passed("records written");
    context.check_interrupted()?;
    let may_snapshot = options.afterwards == Afterwards::Run && options.copy_on_write;
    let mut pages = frozen_tree.pages(context, may_snapshot)?;
    passed("pages found");
    report.tasks = context.inventory.borrow().tree.processes.len();
    report.threads =
        context.inventory.borrow().tree.processes.iter().map(|process| process.threads.len()).sum();

    let copying = Instant::now();
    let later = pages.snapshots().to_vec();
    pages.copy_frozen(&context.guardian, &later)?;
    passed("pages copied");
    let snapshots = take_snapshots(context, &later)?;
    passed("snapshots forked");
    let snapshot = !snapshots.is_empty();
    if snapshot {
        context.resume()?;
        report.frozen = frozen.elapsed();
        pages.copy_snapshots(&context.guardian, context.writer()?, &snapshots)?;
        context.guardian.borrow_mut().reap_snapshots()?;
    } else if !later.is_empty() {
        pages.without_snapshots(context.writer()?)?;
        pages.copy_rest(&context.guardian, &later)?;
    }
    report.page_bytes = pages.bytes();
    passed("all pages copied");
    context.check_interrupted()?;
    let shards = if options.afterwards == Afterwards::Run && !snapshot {
        // Checksums of pages need no frozen tree.
        context.resume()?;
        report.frozen = frozen.elapsed();
        pages.finish(context.writer()?)?
    } else {
        pages.finish(context.writer()?)?
    };
    report.copying = copying.elapsed();
    passed("checksums");
    if options.afterwards == Afterwards::Kill {
        resources::commit(context)?;
    }
    let stats = context.writer()?.finish(shards, options.sync)?;
    passed("image complete");
    report.image_bytes = stats.core_bytes + stats.blob_bytes + stats.page_bytes;
    // From here on the image is complete: an error is no reason to undo it.
    context.guardian.borrow_mut().keep_links()?;
    for error in [context.lifecycle(Event::Dumped), context.action(Action::PostDump)] {
        context.warnings.borrow_mut().extend(error.err().map(|error| error.to_string()));
    }
    let outcome = match options.afterwards {
        Afterwards::Kill => Outcome::Kill,
        Afterwards::Run => Outcome::Run,
        Afterwards::Stop => Outcome::Stopped,
    };
    context.guardian.borrow_mut().finish(outcome)?;
    if report.frozen.is_zero() {
        report.frozen = frozen.elapsed();
    }
    Ok(())
}
