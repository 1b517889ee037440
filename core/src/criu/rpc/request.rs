//! From the fields of a request to the flags that mean the same.

use crate::criu::{
    arguments::{Arguments, UsageError},
    records::Options,
};
use std::path::Path;

/// Names of the modes of cgroups, by number.
const CGROUP_MODES: [&str; 7] = ["ignore", "none", "props", "soft", "full", "strict", "soft"];
/// Ways to cut off the network, by number.
const NETWORK_LOCKS: [&str; 4] = ["", "iptables", "nftables", "skip"];

/// All flags of a request, but for directories, which are descriptors. Those of the configuration file that it names come last.
pub fn arguments(options: &Options) -> Result<Arguments, UsageError> {
    let mut arguments = Arguments::default();
    for (flag, given) in switches(options) {
        if given == Some(true) {
            arguments.add_named(flag, None)?;
        }
    }
    for (flag, text) in values(options) {
        if let Some(text) = text {
            arguments.add_named(flag, Some(text))?;
        }
    }
    for (flag, texts) in lists(options) {
        for text in texts {
            arguments.add_named(flag, Some(text))?;
        }
    }
    if let Some(mode) = cgroup_mode(options)? {
        arguments.add_named("manage-cgroups", Some(mode.into()))?;
    }
    if let Some(flags) = options.empty_ns.filter(|flags| *flags != 0) {
        if flags != libc::CLONE_NEWNET as u32 {
            let (flag, why) = ("empty-ns", "only a net namespace (0x40000000) can be left empty".into());
            return Err(UsageError::Value { flag, value: format!("{flags:#x}"), why });
        }
        arguments.add_named("empty-ns", Some("net".into()))?;
    }
    if options.ps.is_some() {
        arguments.add_named("page-server", None)?;
    }
    if !options.exec_cmd.is_empty() {
        arguments.add_named("exec-cmd", None)?;
    }
    // Engines name one that may not be there.
    if let Some(path) = options.config_file.as_deref().map(Path::new).filter(|path| path.exists()) {
        arguments.append(Arguments::read_config(path)?);
    }
    Ok(arguments)
}

fn switches(options: &Options) -> [(&'static str, Option<bool>); 26] {
    [
        ("leave-running", options.leave_running),
        ("leave-stopped", options.leave_stopped),
        ("ext-unix-sk", options.ext_unix_sk),
        ("tcp-established", options.tcp_established),
        ("tcp-close", options.tcp_close),
        ("skip-in-flight", options.tcp_skip_in_flight),
        ("evasive-devices", options.evasive_devices),
        ("shell-job", options.shell_job),
        ("file-locks", options.file_locks),
        ("link-remap", options.link_remap),
        ("force-irmap", options.force_irmap),
        ("track-mem", options.track_mem),
        ("auto-dedup", options.auto_dedup),
        ("restore-sibling", options.rst_sibling),
        ("enable-external-sharing", options.ext_sharing),
        ("enable-external-masters", options.ext_masters),
        ("weak-sysctls", options.weak_sysctls),
        ("lazy-pages", options.lazy_pages),
        ("orphan-pts-master", options.orphan_pts_master),
        ("mntns-compat-mode", options.mntns_compat_mode),
        ("skip-file-rwx-check", options.skip_file_rwx_check),
        ("unprivileged", options.unprivileged),
        ("display-stats", options.display_stats),
        ("allow-uprobes", options.allow_uprobes),
        ("ghost-fiemap", options.ghost_fiemap),
        // No answer waits for the end of the restored tree.
        ("restore-detached", Some(true)),
    ]
}

fn values(options: &Options) -> [(&'static str, Option<String>); 16] {
    let number = |number: Option<u32>| number.map(|n| n.to_string());
    let lock = options.network_lock.and_then(|lock| NETWORK_LOCKS.get(usize::try_from(lock).ok()?));
    [
        ("tree", options.pid.map(|pid| pid.to_string())),
        ("verbosity", options.log_level.map(|level| level.to_string())),
        ("log-file", options.log_file.clone().filter(|_| options.log_to_stderr != Some(true))),
        ("root", options.root.clone()),
        ("prev-images-dir", options.parent_img.clone()),
        ("cpu-cap", number(options.cpu_cap)),
        ("ghost-limit", number(options.ghost_limit)),
        ("timeout", number(options.timeout)),
        ("cgroup-props", options.cgroup_props.clone()),
        ("cgroup-props-file", options.cgroup_props_file.clone()),
        ("cgroup-yard", options.cgroup_yard.clone()),
        ("freeze-cgroup", options.freeze_cgroup.clone().filter(|path| !path.is_empty())),
        ("lsm-profile", options.lsm_profile.clone().filter(|profile| !profile.is_empty())),
        ("lsm-mount-context", options.lsm_mount_context.clone().filter(|context| !context.is_empty())),
        ("network-lock", lock.map(|name| (*name).to_owned())),
        ("ext-mount-map", options.auto_ext_mnt.filter(|auto| *auto).map(|_| "auto".into())),
    ]
}

fn lists(options: &Options) -> Vec<(&'static str, Vec<String>)> {
    let roots = options.cg_root.iter().map(|root| match root.ctrl.as_deref() {
        None | Some("") => root.path.clone(),
        Some(controller) => format!("{controller}:{}", root.path),
    });
    let namespaces = options.join_ns.iter().map(|join| match join.extra_opt.as_deref() {
        None | Some("") => format!("{}:{}", join.ns, join.ns_file),
        Some(extra) => format!("{}:{},{extra}", join.ns, join.ns_file),
    });
    vec![
        ("external", options.external.clone()),
        ("external", options.unix_sk_ino.iter().map(|socket| format!("unix[{}]", socket.inode)).collect()),
        ("veth-pair", options.veths.iter().map(|pair| format!("{}={}", pair.if_in, pair.if_out)).collect()),
        ("ext-mount-map", options.ext_mnt.iter().map(|map| format!("{}:{}", map.key, map.val)).collect()),
        ("skip-mnt", options.skip_mnt.clone()),
        ("enable-fs", options.enable_fs.clone()),
        ("irmap-scan-path", options.irmap_scan_paths.clone()),
        ("cgroup-dump-controller", options.cgroup_dump_controller.clone()),
        ("cgroup-root", roots.collect()),
        ("join-ns", namespaces.collect()),
        (
            "inherit-fd",
            options.inherit_fd.iter().map(|given| format!("fd[{}]:{}", given.fd, given.key)).collect(),
        ),
    ]
}

/// Asking for them without a mode means the soft one.
fn cgroup_mode(options: &Options) -> Result<Option<&'static str>, UsageError> {
    let Some(mode) = options.manage_cgroups_mode else {
        return Ok(options.manage_cgroups.filter(|manage| *manage).map(|_| "soft"));
    };
    let name = usize::try_from(mode).ok().and_then(|mode| CGROUP_MODES.get(mode));
    let wrong = || UsageError::Value {
        flag: "manage-cgroups",
        value: mode.to_string(),
        why: "there is no such mode".into(),
    };
    name.copied().map(Some).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::records::{CgroupRoot, InheritFd, JoinNamespace, MountMap, PageServer, VethPair};

    fn flags(options: &Options) -> Vec<String> {
        let arguments = arguments(options).unwrap();
        let text = |(flag, value): (&crate::criu::flags::Flag, Option<&str>)| match value {
            Some(value) => format!("{}={value}", flag.long),
            None => flag.long.to_owned(),
        };
        arguments.iter().map(text).filter(|text| text != "restore-detached").collect()
    }

    #[test]
    fn fields_become_flags() {
        let map = |key: &str, val: &str| MountMap { key: key.into(), val: val.into() };
        let root =
            |ctrl: Option<&str>, path: &str| CgroupRoot { ctrl: ctrl.map(Into::into), path: path.into() };
        let options = Options {
            pid: Some(7),
            tcp_established: Some(true),
            shell_job: Some(false),
            manage_cgroups: Some(true),
            empty_ns: Some(0x4000_0000),
            ext_mnt: vec![map("/a", "/a"), map("/a", "/a")],
            cg_root: vec![root(None, "/x"), root(Some(""), "/y"), root(Some("cpu"), "/z")],
            veths: vec![VethPair { if_in: "eth0".into(), if_out: "v".into() }],
            inherit_fd: vec![InheritFd { key: "pipe:[5]".into(), fd: 1 }],
            join_ns: vec![JoinNamespace { ns: "net".into(), ns_file: "/n".into(), extra_opt: None }],
            config_file: Some("/nonexistent/runc.conf".into()),
            lsm_profile: Some(String::new()),
            ..Options::default()
        };
        let expected = [
            "tcp-established",
            "tree=7",
            "veth-pair=eth0=v",
            "ext-mount-map=/a:/a",
            "ext-mount-map=/a:/a",
            "cgroup-root=/x",
            "cgroup-root=/y",
            "cgroup-root=cpu:/z",
            "join-ns=net:/n",
            "inherit-fd=fd[1]:pipe:[5]",
            "manage-cgroups=soft",
            "empty-ns=net",
        ];
        assert_eq!(flags(&options), expected);
    }

    #[test]
    fn the_mode_of_cgroups_counts_more_than_the_wish() {
        for (mode, name) in [(0, "ignore"), (1, "none"), (4, "full"), (6, "soft")] {
            let options =
                Options { manage_cgroups: Some(true), manage_cgroups_mode: Some(mode), ..Options::default() };
            assert_eq!(flags(&options), [format!("manage-cgroups={name}")]);
        }
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let table = [
            (Options { empty_ns: Some(0x2000_0000), ..Options::default() }, "--empty-ns 0x20000000"),
            (Options { ps: Some(PageServer::default()), ..Options::default() }, "--page-server"),
            (Options { lazy_pages: Some(true), ..Options::default() }, "--lazy-pages"),
            (Options { exec_cmd: vec!["ls".into()], ..Options::default() }, "--exec-cmd"),
            (Options { manage_cgroups_mode: Some(9), ..Options::default() }, "--manage-cgroups 9"),
        ];
        for (options, message) in table {
            let error = arguments(&options).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
