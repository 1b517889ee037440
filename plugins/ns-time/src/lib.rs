//! Time namespaces: time_namespaces(7). One of the whole tree: its CLOCK_MONOTONIC and CLOCK_BOOTTIME go on where they
//! were at the dump, on whatever machine and after however long.

use nix::time::{ClockId, clock_gettime};
use stasis_plugin_api::{
    DumpedNamespace, HookError, Host, Namespace, NamespaceInfo, Result, export_plugin, namespace, register,
};
use std::{
    fs::{self, File},
    os::fd::AsRawFd,
};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::ns_time::v1::TimeNamespace;

const SECOND: i64 = 1_000_000_000;

struct Time;

/// Offsets in nanoseconds of the monotonic and the boot-time clock: lines `NAME SECONDS NANOSECONDS`.
fn parse_offsets(text: &str) -> Option<[i64; 2]> {
    let offset = |names: [&str; 2]| {
        let mut words = text.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            words.next().filter(|word| names.contains(word)).map(|_| words)
        })?;
        let (seconds, rest): (i64, i64) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        seconds.checked_mul(SECOND)?.checked_add(rest)
    };
    Some([offset(["monotonic", "1"])?, offset(["boottime", "7"])?])
}

fn offsets(path: &str) -> Result<[i64; 2]> {
    let text =
        fs::read_to_string(path).map_err(|error| HookError::failed(format!("reading {path}"), error))?;
    parse_offsets(&text).ok_or_else(|| HookError::invalid(format!("{path} reads {text:?}")))
}

/// The clocks as this process sees them.
fn clocks() -> Result<[i64; 2]> {
    let read = |clock| {
        let time = clock_gettime(clock).map_err(|errno| HookError::failed("clock_gettime", errno))?;
        Ok::<i64, HookError>(time.tv_sec() * SECOND + time.tv_nsec())
    };
    Ok([read(ClockId::CLOCK_MONOTONIC)?, read(ClockId::CLOCK_BOOTTIME)?])
}

impl Namespace for Time {
    type Record = TimeNamespace;
    const KIND: &'static str = "time";
    /// clone3(2) would put the task into it before its offsets can be set.
    const CLONE_FLAG: u64 = 0;

    fn after(&self) -> Vec<&'static str> {
        vec!["user"]
    }

    fn dump(&self, host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<TimeNamespace>> {
        namespace::whole_tree(host, namespace)?;
        let proc = namespace::member(host, namespace)?;
        let base = format!("/proc/self/fd/{}", proc.as_raw_fd());
        let link = |name: &str| fs::read_link(format!("{base}/ns/{name}")).ok();
        if link("time") != link("time_for_children") {
            return Err(HookError::unsupported(
                format!("time:[{}]", namespace.ino),
                "children of its tasks would start in another time namespace",
                "",
            ));
        }
        let (theirs, ours) =
            (offsets(&format!("{base}/timens_offsets"))?, offsets("/proc/self/timens_offsets")?);
        let clocks = clocks()?;
        let inside = |at: usize| clocks[at] - ours[at] + theirs[at];
        Ok(DumpedNamespace {
            record: TimeNamespace { monotonic_ns: inside(0), boottime_ns: inside(1) },
            version: 1,
        })
    }

    fn enter(&self, _: &Host<'_>, record: &TimeNamespace) -> Result<()> {
        let failed = |what: &'static str| move |errno| HookError::failed(what, errno);
        let ours = offsets("/proc/self/timens_offsets")?;
        // SAFETY: an integer argument; the new namespace is for children only, so far.
        let made = unsafe { libc::unshare(libc::CLONE_NEWTIME) };
        nix::errno::Errno::result(made).map_err(failed("unshare of a time namespace"))?;
        let clocks = clocks()?;
        let lines = [("monotonic", record.monotonic_ns, 0), ("boottime", record.boottime_ns, 1)].map(
            |(name, wanted, at): (&str, i64, usize)| {
                let offset = wanted.saturating_sub(clocks[at] - ours[at]);
                // The nanoseconds are never negative.
                format!("{name} {} {}\n", offset.div_euclid(SECOND), offset.rem_euclid(SECOND))
            },
        );
        fs::write("/proc/self/timens_offsets", lines.concat())
            .map_err(|error| HookError::failed("setting the offsets of a time namespace", error))?;
        let children = File::open("/proc/self/ns/time_for_children")
            .map_err(|error| HookError::failed("opening a time namespace", error))?;
        // SAFETY: integer arguments; this process has one thread.
        let entered = unsafe { libc::setns(children.as_raw_fd(), libc::CLONE_NEWTIME) };
        nix::errno::Errno::result(entered).map(drop).map_err(failed("setns of a time namespace"))
    }
}

register!(namespace: Time);
export_plugin! { name: "ns-time", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_read() {
        let text = "monotonic          -5          900000000\nboottime           7         0\n";
        assert_eq!(parse_offsets(text), Some([-4_100_000_000, 7_000_000_000]));
        assert_eq!(parse_offsets("monotonic 1"), None);
    }
}
