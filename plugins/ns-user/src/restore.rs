//! Writing the maps of a new user namespace, from its parent.

use crate::{Extent, UserNamespace, dump};
use stasis_plugin_api::{HookError, Result};
use std::{
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::Write as _,
};

pub(crate) fn prepare(record: &UserNamespace, host_pid: i32) -> Result<()> {
    let path = format!("/proc/{host_pid}/ns/user");
    let file = File::open(&path).map_err(|error| HookError::failed(format!("opening {path}"), error))?;
    let owner = dump::owner(&file)?;
    if owner != record.owner {
        return Err(HookError::unsupported(
            "user namespace",
            format!("it belonged to uid {} and would now belong to uid {owner}", record.owner),
            format!("restore as uid {}", record.owner),
        ));
    }
    // "deny" must come before gid_map, and "allow" is what a new namespace has (user_namespaces(7)).
    if record.setgroups_denied {
        write(host_pid, "setgroups", "deny")?;
    }
    for (name, map) in
        [("uid_map", &record.uids), ("gid_map", &record.gids), ("projid_map", &record.projects)]
    {
        if !map.is_empty() {
            write(host_pid, name, &format_map(map))?;
        }
    }
    Ok(())
}

/// A map can be written once only, in one call.
fn write(pid: i32, name: &str, text: &str) -> Result<()> {
    let path = format!("/proc/{pid}/{name}");
    let written = OpenOptions::new().write(true).open(&path).and_then(|mut file| file.write(text.as_bytes()));
    match written {
        Ok(n) if n == text.len() => Ok(()),
        Ok(n) => Err(HookError::invalid(format!("{path} took {n} of {} bytes", text.len()))),
        Err(error) => Err(HookError::failed(format!("writing {path}"), error)),
    }
}

fn format_map(map: &[Extent]) -> String {
    map.iter().fold(String::new(), |mut text, extent| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} {} {}", extent.inside, extent.outside, extent.count);
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Read, process};

    #[test]
    fn map_text_is_what_is_parsed() {
        let map = vec![
            Extent { inside: 0, outside: 1000, count: 1 },
            Extent { inside: 1, outside: 100_000, count: 65_536 },
        ];
        assert_eq!(dump::parse_map(&format_map(&map)).unwrap(), map);
    }

    /// A child in a new user namespace gets the recorded maps.
    #[test]
    fn kernel_shows_what_was_written() {
        // SAFETY: takes no argument.
        if unsafe { libc::geteuid() } != 0 {
            eprintln!("skipped: needs root");
            return;
        }
        let mut child = process::Command::new("unshare")
            .args(["-U", "sh", "-c", "echo ready; read x; cat /proc/self/uid_map; cat /proc/self/setgroups"])
            .stdin(process::Stdio::piped())
            .stdout(process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = child.stdout.take().unwrap();
        let mut ready = [0; 6];
        out.read_exact(&mut ready).unwrap();
        let record = UserNamespace {
            uids: vec![
                Extent { inside: 0, outside: 0, count: 10 },
                Extent { inside: 10, outside: 1000, count: 5 },
            ],
            gids: vec![Extent { inside: 0, outside: 0, count: 1 }],
            setgroups_denied: true,
            ..UserNamespace::default()
        };
        prepare(&record, child.id() as i32).unwrap();
        drop(child.stdin.take());
        let mut text = String::new();
        out.read_to_string(&mut text).unwrap();
        child.wait().unwrap();
        let (maps, setgroups) = text.trim_end().rsplit_once('\n').unwrap();
        assert_eq!(dump::parse_map(maps).unwrap(), record.uids);
        assert_eq!(setgroups, "deny");
    }
}
