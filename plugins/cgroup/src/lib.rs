//! Control groups: cgroups(7). With `--manage-cgroups` a dump keeps in which groups the threads of the tree are, in all hierarchies
//! of version 1 and 2, and what these groups are like; a restore puts every thread back before it runs. And cgroup namespaces:
//! cgroup_namespaces(7).
//!
//! Both are in one plugin because they are one thing to whoever restores elsewhere: the root of a namespace moves with the groups
//! below it (`--cgroup-root`).

mod dump;
mod hierarchy;
mod namespace;
mod properties;
mod restore;
mod roots;

use stasis_plugin_api::{
    Event, HookError, Host, Lifecycle, OptionDeclaration, Result, export_plugin, register,
};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}

/// What is done about cgroups.
const MANAGE: &str = "manage-cgroups";
/// Where they go instead.
const ROOT: &str = "cgroup-root";
/// Name of the blob.
const BLOB: &str = "cgroups";

/// What `--manage-cgroups` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Groups must be there, and stay as they are.
    None,
    /// Groups must be there, and get their properties.
    Props,
    /// Groups that are not there are made, with their properties; others stay as they are.
    Soft,
    /// All get their properties.
    Full,
    /// None of them may be there.
    Strict,
}

impl Mode {
    /// None if cgroups are nobody's business.
    fn of(host: &Host<'_>) -> Result<Option<Self>> {
        let values = host.option_values(MANAGE);
        let Some(name) = values.last() else { return Ok(None) };
        match name.as_str() {
            "ignore" => Ok(None),
            "none" => Ok(Some(Self::None)),
            "props" => Ok(Some(Self::Props)),
            "" | "soft" => Ok(Some(Self::Soft)),
            "full" => Ok(Some(Self::Full)),
            "strict" => Ok(Some(Self::Strict)),
            other => Err(HookError::invalid(format!("--{MANAGE}={other} is none of the modes"))
                .remedy("none, props, soft, full, strict or ignore")),
        }
    }
}

struct Cgroups;

impl Lifecycle for Cgroups {
    const KIND: &'static str = "cgroups";

    fn event(&self, host: &Host<'_>, event: Event) -> Result<()> {
        match event {
            Event::BeforeFreeze => Mode::of(host).map(drop),
            Event::Frozen => dump::dump(host),
            Event::BeforeRestore => restore::make(host),
            Event::Cloned => restore::place_root(host),
            Event::Restored => restore::settle(host),
            _ => Ok(()),
        }
    }
}

register!(lifecycle: Cgroups);
register!(namespace: namespace::Cgroup);
export_plugin! {
    name: "cgroup",
    records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")),
    options: [
        OptionDeclaration::optional_value(
            MANAGE,
            "keep in which cgroups the tasks are: none, props, soft (the default), full, strict or ignore"
        ),
        OptionDeclaration::value(ROOT, "[CONTROLLER:]PATH takes the place of the tree's root in that hierarchy, or in all; may be repeated"),
    ]
}
