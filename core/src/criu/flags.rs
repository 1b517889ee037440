//! CRIU's flags, as its manual lists them, and what becomes of each: one table for the command line, for configuration files
//! and for requests by socket.
//!
//! This list is another program's interface, so it may name resource kinds (`core/tests/tidy.rs`); nothing here acts by them.

/// What follows a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// Nothing.
    Nothing,
    /// A value.
    Value,
    /// A value, attached to it (`--flag=VALUE`, `-fVALUE`), or nothing.
    Optional,
}

/// What becomes of a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It means something to this module, or to core by way of it.
    Own,
    /// It is for the plugin that declares an option of that name. If none does, it is left out with a warning.
    Plugin,
    /// It has no effect here, which is logged as a warning: why.
    Ignored(&'static str),
    /// It asks for something that is not there: what.
    Refused(&'static str),
}

/// One flag.
#[derive(Debug, PartialEq, Eq)]
pub struct Flag {
    /// Without the dashes.
    pub long: &'static str,
    /// One letter for it.
    pub short: Option<char>,
    /// What follows it.
    pub takes: Takes,
    /// What becomes of it.
    pub role: Role,
}

impl Flag {
    /// The flag of a name.
    pub fn find(long: &str) -> Option<&'static Self> {
        FLAGS.iter().find(|flag| flag.long == long)
    }

    /// The flag of a letter.
    pub fn find_short(short: char) -> Option<&'static Self> {
        FLAGS.iter().find(|flag| flag.short == Some(short))
    }
}

const fn flag(long: &'static str, takes: Takes, role: Role) -> Flag {
    Flag { long, short: None, takes, role }
}

const fn with_short(short: char, long: &'static str, takes: Takes, role: Role) -> Flag {
    Flag { short: Some(short), ..flag(long, takes, role) }
}

use Role::{Ignored, Own, Plugin, Refused};
use Takes::{Nothing, Optional, Value};

const WHOLE_IMAGES: Role = Ignored("every image is whole");
const NO_PAGE_SERVER: Role = Refused("pages cannot be sent to a page server");
const NO_SECURITY_MODULES: Role = Ignored("security labels are neither changed nor translated");

/// All of them.
pub const FLAGS: &[Flag] = &[
    // Where and how.
    with_short('D', "images-dir", Value, Own),
    with_short('W', "work-dir", Value, Own),
    with_short('o', "log-file", Value, Own),
    with_short('v', "verbosity", Optional, Own),
    with_short('V', "version", Nothing, Own),
    with_short('h', "help", Nothing, Own),
    flag("pidfile", Value, Own),
    flag("log-pid", Nothing, Ignored("there is one log")),
    flag("config", Value, Own),
    flag("no-default-config", Nothing, Own),
    flag("feature", Value, Own),
    flag("action-script", Value, Own),
    flag("display-stats", Nothing, Own),
    flag("timeout", Value, Own),
    flag("stream", Nothing, Refused("images are directories")),
    flag("exec-cmd", Nothing, Refused("nothing is executed in place of the tool (use --restore-detached)")),
    flag("status-fd", Value, Ignored("nothing is served after a dump")),
    with_short('L', "libdir", Value, Ignored("CRIU's plugins are not those of stasis")),
    flag("unprivileged", Nothing, Ignored("it runs with the privileges that it has")),
    flag("close", Value, Ignored("no descriptor of the caller reaches a task")),
    flag("deprecated", Nothing, Ignored("nothing here is deprecated")),
    flag("all", Nothing, Ignored("all that is needed is always checked")),
    flag("extra", Nothing, Ignored("all that is needed is always checked")),
    flag("experimental", Nothing, Ignored("all that is needed is always checked")),
    // The tree.
    with_short('t', "tree", Value, Own),
    with_short('d', "restore-detached", Nothing, Own),
    with_short('S', "restore-sibling", Nothing, Own),
    with_short('s', "leave-stopped", Nothing, Own),
    with_short('R', "leave-running", Nothing, Own),
    with_short('j', "shell-job", Nothing, Own),
    flag("freeze-cgroup", Value, Own),
    flag("cpu-cap", Optional, Ignored("processor features are checked anyway")),
    flag("lsm-profile", Value, NO_SECURITY_MODULES),
    flag("lsm-mount-context", Value, NO_SECURITY_MODULES),
    flag("allow-uprobes", Nothing, Ignored("mappings of probes are like any other here")),
    // Files.
    flag("external", Value, Own),
    flag("inherit-fd", Value, Own),
    with_short('l', "file-locks", Nothing, Own),
    flag("link-remap", Nothing, Own),
    flag("ghost-limit", Value, Own),
    flag("ghost-fiemap", Nothing, Ignored("holes are always kept")),
    flag("evasive-devices", Nothing, Ignored("devices are opened by their paths")),
    flag("file-validation", Value, Ignored("files are always compared by all that is known of them")),
    flag("skip-file-rwx-check", Nothing, Own),
    flag("irmap-scan-path", Value, Plugin),
    with_short('f', "force-irmap", Nothing, Plugin),
    // Mounts.
    with_short('r', "root", Value, Plugin),
    with_short('M', "ext-mount-map", Value, Plugin),
    flag("enable-external-sharing", Nothing, Plugin),
    flag("enable-external-masters", Nothing, Plugin),
    flag("enable-fs", Value, Plugin),
    flag("skip-mnt", Value, Plugin),
    flag("mntns-compat-mode", Nothing, Ignored("there is one way to rebuild mounts")),
    // Namespaces and cgroups.
    flag("empty-ns", Value, Plugin),
    with_short('J', "join-ns", Value, Plugin),
    flag("weak-sysctls", Nothing, Plugin),
    flag("manage-cgroups", Optional, Plugin),
    flag("cgroup-root", Value, Plugin),
    flag("cgroup-props", Value, Plugin),
    flag("cgroup-props-file", Value, Plugin),
    flag("cgroup-dump-controller", Value, Plugin),
    flag("cgroup-yard", Value, Plugin),
    // Sockets and terminals.
    with_short('x', "ext-unix-sk", Optional, Own),
    flag("tcp-established", Nothing, Plugin),
    flag("tcp-close", Nothing, Plugin),
    flag("skip-in-flight", Nothing, Plugin),
    flag("network-lock", Value, Plugin),
    flag("veth-pair", Value, Own),
    flag("orphan-pts-master", Nothing, Plugin),
    // Memory in steps.
    flag("track-mem", Nothing, WHOLE_IMAGES),
    flag("prev-images-dir", Value, WHOLE_IMAGES),
    flag("auto-dedup", Nothing, WHOLE_IMAGES),
    flag("pre-dump-mode", Value, WHOLE_IMAGES),
    flag("lazy-pages", Nothing, Refused("memory is restored before the tasks run")),
    flag("page-server", Nothing, NO_PAGE_SERVER),
    flag("address", Value, NO_PAGE_SERVER),
    flag("port", Value, NO_PAGE_SERVER),
    flag("ps-socket", Value, NO_PAGE_SERVER),
    flag("tls", Nothing, NO_PAGE_SERVER),
    flag("tls-cacert", Value, NO_PAGE_SERVER),
    flag("tls-cacrl", Value, NO_PAGE_SERVER),
    flag("tls-cert", Value, NO_PAGE_SERVER),
    flag("tls-key", Value, NO_PAGE_SERVER),
    flag("tls-no-cn-verify", Nothing, NO_PAGE_SERVER),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_flag_is_there_once() {
        let names: BTreeSet<_> = FLAGS.iter().map(|flag| flag.long).collect();
        assert_eq!(names.len(), FLAGS.len());
        let letters: Vec<_> = FLAGS.iter().filter_map(|flag| flag.short).collect();
        assert_eq!(letters.iter().collect::<BTreeSet<_>>().len(), letters.len());
    }
}
