//! `stasis check`: whether this kernel, with these privileges, offers what dump and restore need. Every feature is
//! really tried out, on children made for that.

mod children;
mod kernel;
mod privileges;

use crate::plugins::{PluginChoice, Registry};
use clap::Args;
use serde_json::{Value, json};
use std::{
    io::{self, Write},
    process::ExitCode,
};

/// Tries out what dump and restore need of the kernel, the privileges and the plugins
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Show only what does not work
    #[arg(long)]
    failed: bool,
}

/// What a probe found: some detail, or why the feature does not work.
type Outcome = io::Result<String>;

/// One feature.
struct Feature {
    name: &'static str,
    /// What it is used for.
    why: &'static str,
    /// Whether nothing works without it.
    needed: bool,
    probe: fn() -> Outcome,
}

const fn needed(name: &'static str, why: &'static str, probe: fn() -> Outcome) -> Feature {
    Feature { name, why, needed: true, probe }
}

const fn optional(name: &'static str, why: &'static str, probe: fn() -> Outcome) -> Feature {
    Feature { needed: false, ..needed(name, why, probe) }
}

const FEATURES: &[Feature] = &[
    needed("privileges", "seizing tasks and giving them back their ids", privileges::capabilities),
    optional("raising hard limits", "tasks whose hard limits are above ours", privileges::raise_limit),
    needed("ptrace seize", "stopping tasks and reading their registers", kernel::seize),
    needed("ptrace exit-kill", "a restore that fails leaves no task behind", kernel::exit_kill),
    needed("signal masks and queues by ptrace", "pending and blocked signals", kernel::signals),
    needed("extended registers", "floating point and vector registers", kernel::xstate),
    needed("rseq configuration", "restartable sequences of the C library", kernel::rseq),
    optional("seccomp filters by ptrace", "tasks with seccomp filters", kernel::seccomp),
    optional("suspending seccomp", "injecting code into tasks with seccomp filters", kernel::suspend_seccomp),
    needed("clone3 with chosen pids", "tasks keep their process ids", kernel::chosen_pid),
    needed("PR_SET_MM_MAP", "heap, arguments and exe link of a task", kernel::mm_map),
    needed("moving the vdso", "the vdso stays where the task knows it", kernel::move_vdso),
    needed("kcmp", "which descriptors and tables are shared", kernel::kcmp),
    needed("pidfd_getfd", "getting at the descriptors of a task", kernel::take_descriptor),
    needed("process_vm_readv", "reading memory of a task", kernel::read_memory),
    needed("PAGEMAP_SCAN", "finding the pages that have contents", kernel::scan_pages),
    needed("memory files", "temporary shared memory", kernel::memory_file),
    needed("/proc/PID/map_files", "mapped files, deleted ones too", kernel::map_files),
    needed("/proc/PID/task/TID/children", "finding the process tree", kernel::children),
    optional("userfaultfd", "fast filling of memory, and tracking of changes", kernel::fault_handling),
    optional("/proc/timer_list", "remaining time of system calls that sleep", kernel::timer_list),
    optional("cgroup freezer", "freezing a whole container at once", kernel::freezer),
];

/// What is known of one feature after its probe.
struct Checked {
    name: String,
    why: String,
    needed: bool,
    outcome: Outcome,
}

/// All that was tried.
pub(crate) struct Checks(Vec<Checked>);

impl Checks {
    /// Tries everything out.
    pub(crate) fn run(choice: &PluginChoice) -> Self {
        let mut all: Vec<Checked> = FEATURES
            .iter()
            .map(|feature| Checked {
                name: feature.name.into(),
                why: feature.why.into(),
                needed: feature.needed,
                outcome: (feature.probe)(),
            })
            .collect();
        let registry = Registry::load(choice);
        all.push(plugins(&registry));
        all.extend(registry.iter().flat_map(namespaces));
        Self(all)
    }

    /// What does not work although it is needed, and why.
    pub(crate) fn failures(&self) -> Vec<String> {
        let failed = self.0.iter().filter(|checked| checked.needed);
        failed
            .filter_map(|checked| Some(format!("{}: {}", checked.name, checked.outcome.as_ref().err()?)))
            .collect()
    }
}

/// Runs it: success if all that is needed works. With `json`, everything is one object on stdout.
pub fn run(args: &CheckArgs, choice: &PluginChoice, json: bool) -> ExitCode {
    let Checks(all) = Checks::run(choice);
    let failed = all.iter().filter(|checked| checked.needed && checked.outcome.is_err()).count();
    let mut out = io::stdout().lock();
    let written = match json {
        true => {
            let checks: Vec<Value> = all.iter().map(Checked::as_json).collect();
            writeln!(out, "{:#}", json!({ "ok": failed == 0, "checks": checks }))
        }
        false => all
            .iter()
            .filter(|checked| !args.failed || checked.outcome.is_err())
            .try_for_each(|checked| checked.print(&mut out))
            .and_then(|()| match failed {
                0 => writeln!(out, "all that is needed works"),
                n => writeln!(out, "{n} of the needed features do not work: dump or restore will fail"),
            }),
    };
    // A reader that closed the pipe has seen enough.
    if failed == 0 && written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn plugins(registry: &Result<Registry, crate::plugins::PluginsError>) -> Checked {
    let outcome = match registry {
        Ok(registry) if registry.plugins().is_empty() => {
            Err(io::Error::other("none found: only plain files can be dumped (see --plugin-dir)"))
        }
        Ok(registry) => {
            let names: Vec<&str> = registry.plugins().iter().map(|plugin| &*plugin.name).collect();
            Ok(names.join(", "))
        }
        Err(error) => Err(io::Error::other(error.to_string())),
    };
    let why = "everything that is no memory, task or plain file".into();
    Checked { name: "plugins".into(), why, needed: true, outcome }
}

/// Namespaces are known by plugins; each says by which flag its type is made.
fn namespaces(registry: &Registry) -> Vec<Checked> {
    let one = |kind: &crate::plugins::NamespaceKind| Checked {
        name: format!("new {} namespace", kind.name()),
        why: format!("tasks in a {} namespace of their own", kind.name()),
        needed: false,
        outcome: kernel::new_namespace(kind.declaration.clone_flag),
    };
    registry.namespaces().map(one).collect()
}

impl Checked {
    fn as_json(&self) -> Value {
        json!({
            "name": self.name,
            "why": self.why,
            "needed": self.needed,
            "works": self.outcome.is_ok(),
            "detail": self.outcome.as_ref().map_or_else(ToString::to_string, Clone::clone),
        })
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let (state, detail) = match &self.outcome {
            Ok(detail) => ("works", detail.clone()),
            Err(error) if self.needed => ("FAILS", format!("{error}; needed for: {}", self.why)),
            Err(error) => ("absent", format!("{error}; used for: {}", self.why)),
        };
        writeln!(out, "{state:<7} {:<34} {detail}", self.name)
    }
}
