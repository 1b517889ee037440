//! Command lines as engines write them.

use super::*;

fn parse(line: &str) -> Result<Arguments, UsageError> {
    Arguments::parse(line.split_whitespace().map(OsString::from))
}

#[test]
fn command_lines() {
    // (line, flag, its values, words)
    let table: &[(&str, &str, &[&str], &[&str])] = &[
        ("dump -t 17", "tree", &["17"], &["dump"]),
        ("dump --tree=17", "tree", &["17"], &["dump"]),
        ("-t17 dump", "tree", &["17"], &["dump"]),
        ("dump --external a --external b", "external", &["a", "b"], &["dump"]),
        ("dump --ext-mount-map auto -M /a:b", "ext-mount-map", &["auto", "/a:b"], &["dump"]),
        ("dump --manage-cgroups=full", "manage-cgroups", &["full"], &["dump"]),
        ("dump --manage-cgroups full", "manage-cgroups", &[], &["dump", "full"]),
        ("restore --inherit-fd fd[7]:tty[8800:17]", "inherit-fd", &["fd[7]:tty[8800:17]"], &["restore"]),
        ("restore --ext-mount-map console:", "ext-mount-map", &["console:"], &["restore"]),
        ("swrk 3", "tree", &[], &["swrk", "3"]),
        ("dump -Rj -D /x", "images-dir", &["/x"], &["dump"]),
        ("dump --cgroup-root cpu:/a --cgroup-root :/b", "cgroup-root", &["cpu:/a", ":/b"], &["dump"]),
    ];
    for (line, flag, values, words) in table {
        let parsed = parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        assert_eq!(parsed.all(flag).collect::<Vec<_>>(), *values, "{line}");
        assert_eq!(parsed.words, *words, "{line}");
    }
}

#[test]
fn what_lxc_writes_is_understood() {
    let line = "dump --tcp-established --file-locks --link-remap --manage-cgroups=full --ext-mount-map auto \
        --enable-external-sharing --enable-external-masters --enable-fs hugetlbfs --enable-fs tracefs -D /d -o /d/dump.log \
        --cgroup-root cpu:/lxc.payload.a -v4 --ext-mount-map /proc/sys/net:proc/sys/net -t 5 --skip-in-flight \
        --freeze-cgroup /sys/fs/cgroup/freezer//lxc.payload.a --ext-mount-map /dev/console:console --external tty[a:b] \
        --prev-images-dir ../x --track-mem --action-script /s --ghost-limit 256M --leave-running --force-irmap";
    let parsed = parse(line).unwrap();
    assert_eq!(parsed.words, ["dump"]);
    assert_eq!(parsed.all("enable-fs").collect::<Vec<_>>(), ["hugetlbfs", "tracefs"]);
    assert!(parsed.has("force-irmap") && parsed.has("leave-running"));
    assert_eq!(parsed.verbosity().unwrap(), 4);
}

#[test]
fn verbosity_is_counted_or_given() {
    for (line, level) in
        [("", 2), ("-v", 1), ("-vv", 2), ("-vvvv", 4), ("-v4", 4), ("--verbosity=3", 3), ("-v -v -v", 3)]
    {
        assert_eq!(parse(line).unwrap().verbosity().unwrap(), level, "{line}");
    }
    assert!(parse("-vx").unwrap().verbosity().is_err());
}

#[test]
fn mistakes_are_named() {
    let table = [
        ("dump --frobnicate", "unknown flag --frobnicate"),
        ("dump -q", "unknown flag -q"),
        ("dump --tree", "missing argument"),
        ("dump --leave-running=yes", "unexpected argument"),
        ("dump --page-server", "--page-server: pages cannot be sent"),
        ("restore --lazy-pages", "--lazy-pages: memory is restored before"),
    ];
    for (line, message) in table {
        // The value of a switch shows when the next argument is asked for.
        let error = parse(line).expect_err(line).to_string();
        assert!(error.contains(message), "{line}: {error}");
    }
}

#[test]
fn configuration_files_come_first_or_last() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("runc.conf");
    fs::write(&path, "# a comment\n\ntcp-established\nghost-limit 2M # and another\nlog-file=/x\n").unwrap();
    let mut line = parse("dump --ghost-limit 1M").unwrap();
    line.prepend(Arguments::read_config(&path).unwrap());
    assert_eq!(line.last("ghost-limit"), Some("1M"));
    assert_eq!(line.last("log-file"), Some("/x"));
    assert!(line.has("tcp-established"));
    line.append(Arguments::read_config(&path).unwrap());
    assert_eq!(line.last("ghost-limit"), Some("2M"));
    fs::write(&path, "tree\n").unwrap();
    let error = Arguments::read_config(&path).unwrap_err().to_string();
    assert!(error.ends_with("line 1: a value is missing"), "{error}");
    fs::write(&path, "\nnonsense 1\n").unwrap();
    let error = Arguments::read_config(&path).unwrap_err().to_string();
    assert!(error.contains("line 2: unknown flag --nonsense"), "{error}");
}
