//! From CRIU's flags to the options of the library.

use super::{
    arguments::{Arguments, UsageError},
    flags::Role,
};
use crate::{
    action::Observer,
    cli::parse_size,
    dump::{Afterwards, DumpOptions},
    plugins::GivenOption,
    restore::RestoreOptions,
};
use std::{path::Path, str::FromStr, time::Duration};

/// Options of a dump into `images_dir`.
pub fn dump(
    arguments: &Arguments,
    images_dir: &Path,
    observer: Option<Observer>,
) -> Result<DumpOptions, UsageError> {
    let tree = value(arguments, "tree")?.ok_or(UsageError::Missing("--tree PID"))?;
    let defaults = DumpOptions::new(tree, images_dir);
    let ghost_limit = arguments
        .last("ghost-limit")
        .map(|text| parse_size(text).map_err(|why| wrong("ghost-limit", text, why)))
        .transpose()?;
    Ok(DumpOptions {
        afterwards: match (arguments.has("leave-running"), arguments.has("leave-stopped")) {
            (true, _) => Afterwards::Run,
            (_, true) => Afterwards::Stop,
            _ => Afterwards::Kill,
        },
        shell_job: arguments.has("shell-job"),
        external: external(arguments)?,
        action_scripts: arguments.all("action-script").map(str::to_owned).collect(),
        observer,
        timeout: timeout(arguments)?.unwrap_or(defaults.timeout),
        freeze_cgroup: arguments.last("freeze-cgroup").map(Into::into),
        ghost_limit: ghost_limit.unwrap_or(defaults.ghost_limit),
        link_remap: arguments.has("link-remap"),
        file_locks: arguments.has("file-locks"),
        plugin_options: plugin_options(arguments),
        ..defaults
    })
}

/// Options of a restore from `images_dir`.
pub fn restore(
    arguments: &Arguments,
    images_dir: &Path,
    observer: Option<Observer>,
) -> Result<RestoreOptions, UsageError> {
    let inherit = arguments.all("inherit-fd");
    Ok(RestoreOptions {
        images_dir: images_dir.to_owned(),
        plugin_options: plugin_options(arguments),
        sibling: arguments.has("restore-sibling"),
        leave_stopped: arguments.has("leave-stopped"),
        shell_job: arguments.has("shell-job"),
        external: external(arguments)?,
        action_scripts: arguments.all("action-script").map(str::to_owned).collect(),
        observer,
        inherit_fds: inherit.map(|text| parse("inherit-fd", text)).collect::<Result<_, _>>()?,
        pidfile: arguments.last("pidfile").map(Into::into),
        timeout: timeout(arguments)?,
        plugin_timeout: DumpOptions::new(0, images_dir).plugin_timeout,
        no_file_check: arguments.has("skip-file-rwx-check"),
        ..RestoreOptions::default()
    })
}

fn wrong(flag: &'static str, value: &str, why: impl ToString) -> UsageError {
    UsageError::Value { flag, value: value.to_owned(), why: why.to_string() }
}

fn parse<T: FromStr<Err: ToString>>(flag: &'static str, text: &str) -> Result<T, UsageError> {
    text.parse().map_err(|error: T::Err| wrong(flag, text, error))
}

fn value<T: FromStr<Err: ToString>>(
    arguments: &Arguments,
    flag: &'static str,
) -> Result<Option<T>, UsageError> {
    arguments.last(flag).map(|text| parse(flag, text)).transpose()
}

fn timeout(arguments: &Arguments) -> Result<Option<Duration>, UsageError> {
    Ok(value(arguments, "timeout")?.map(Duration::from_secs))
}

/// All that the user calls outside, the older spellings among it. Whether a key means anything, the plugins know.
fn external(arguments: &Arguments) -> Result<Vec<String>, UsageError> {
    let mut keys: Vec<String> = arguments.all("external").map(str::to_owned).collect();
    for pair in arguments.all("veth-pair") {
        let (inside, outside) =
            pair.split_once('=').ok_or_else(|| wrong("veth-pair", pair, "not of the form IN=OUT"))?;
        keys.push(format!("veth[{inside}]:{outside}"));
    }
    for inodes in arguments.all("ext-unix-sk") {
        keys.extend(inodes.split(',').map(|inode| format!("unix[{inode}]")));
    }
    Ok(keys)
}

/// What plugins may have asked for.
fn plugin_options(arguments: &Arguments) -> Vec<GivenOption> {
    let option = |name: &str, value: Option<&str>| GivenOption {
        name: name.to_owned(),
        value: value.map(str::to_owned),
        if_declared: true,
    };
    let given = arguments.iter().filter(|(flag, _)| flag.role == Role::Plugin);
    let mut options: Vec<GivenOption> = given.map(|(flag, value)| option(flag.long, value)).collect();
    if arguments.has("ext-unix-sk") {
        options.push(option("ext-unix-sk", None));
    }
    options
}

/// Logs which flags have no effect.
pub fn warn_of_ignored(arguments: &Arguments) {
    for (flag, _) in arguments.iter() {
        if let Role::Ignored(why) = flag.role {
            tracing::warn!("--{} has no effect: {why}", flag.long);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn arguments(line: &str) -> Arguments {
        Arguments::parse(line.split_whitespace().map(OsString::from)).unwrap()
    }

    #[test]
    fn dumps() {
        let line = "dump -t 17 -R -j -l --link-remap --ghost-limit 2M --timeout 3 --freeze-cgroup /cg --veth-pair eth0=veth1 \
            --external tty[a:b] --ext-unix-sk=5,6 --manage-cgroups=soft --cgroup-root cpu:/a --cgroup-root :/b --track-mem";
        let options = dump(&arguments(line), Path::new("/images"), None).unwrap();
        assert_eq!((options.tree, options.afterwards, options.shell_job), (17, Afterwards::Run, true));
        assert_eq!((options.file_locks, options.link_remap, options.ghost_limit), (true, true, 2 << 20));
        assert_eq!((options.timeout, options.freeze_cgroup), (Duration::from_secs(3), Some("/cg".into())));
        assert_eq!(options.external, ["tty[a:b]", "veth[eth0]:veth1", "unix[5]", "unix[6]"]);
        let given: Vec<_> =
            options.plugin_options.iter().map(|o| (o.name.as_str(), o.value.as_deref())).collect();
        let expected = [
            ("manage-cgroups", Some("soft")),
            ("cgroup-root", Some("cpu:/a")),
            ("cgroup-root", Some(":/b")),
            ("ext-unix-sk", None),
        ];
        assert_eq!(given, expected);
        assert!(options.plugin_options.iter().all(|option| option.if_declared));
    }

    #[test]
    fn restores() {
        let line = "restore -d -S -s --pidfile p --inherit-fd fd[0]:pipe:[5] --skip-file-rwx-check";
        let options = restore(&arguments(line), Path::new("/images"), None).unwrap();
        assert!(options.sibling && options.leave_stopped && options.no_file_check);
        assert_eq!(options.pidfile, Some("p".into()));
        assert_eq!((options.inherit_fds[0].fd, options.inherit_fds[0].key.as_str()), (0, "pipe:[5]"));
    }

    #[test]
    fn wrong_values_are_named() {
        let table = [
            ("dump", "--tree PID is missing"),
            ("dump -t x", "--tree x: invalid digit"),
            ("dump -t 1 --ghost-limit lots", "--ghost-limit lots: a number of bytes"),
            ("dump -t 1 --timeout soon", "--timeout soon: invalid digit"),
            ("dump -t 1 --veth-pair a", "--veth-pair a: not of the form"),
        ];
        for (line, message) in table {
            let error = dump(&arguments(line), Path::new("/images"), None).unwrap_err().to_string();
            assert!(error.contains(message), "{line}: {error}");
        }
        let error = restore(&arguments("restore --inherit-fd 7:x"), Path::new("/images"), None);
        assert!(error.unwrap_err().to_string().contains("not of the form fd[N]:KEY"));
    }
}
