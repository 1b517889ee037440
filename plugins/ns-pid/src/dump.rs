//! A pid namespace has no contents but the tasks; what remains is to refuse the shapes that core cannot build.

use crate::PidNamespace;
use stasis_plugin_api::{DumpedNamespace, HookError, Host, NamespaceInfo, Result};
use std::{
    fs::{self, File},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

/// ioctl_nsfs(2).
const NS_GET_USERNS: libc::c_ulong = 0xb701;

pub(crate) fn dump(host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<PidNamespace>> {
    let name = format!("pid:[{}]", namespace.ino);
    if !namespace.members.contains(&1) {
        return Err(HookError::unsupported(
            name,
            "its first process (pid 1) is not part of the tree",
            "dump the tree from that process on",
        ));
    }
    if let Some(outside) = host.tasks().iter().find(|task| !namespace.members.contains(&task.pid)) {
        return Err(HookError::unsupported(
            name,
            format!("task {} ({}) of the tree is not in it", outside.pid, outside.name),
            "dump the tree from the first process of the namespace on; nested pid namespaces are not supported yet",
        ));
    }
    for &pid in &namespace.members {
        check_member(host, pid, &name)?;
    }
    Ok(DumpedNamespace { record: PidNamespace { levels: 1 }, version: 1 })
}

fn check_member(host: &Host<'_>, pid: i32, name: &str) -> Result<()> {
    let proc = host.open_proc(pid)?;
    let base = format!("/proc/self/fd/{}", proc.as_raw_fd());
    let ino = |file: &str| fs::metadata(format!("{base}/{file}")).map(|stat| stat.ino());

    let status = fs::read_to_string(format!("{base}/status"))
        .map_err(|error| HookError::failed(format!("reading status of task {pid}"), error))?;
    if levels(&status) != Some(2) {
        return Err(HookError::unsupported(
            name,
            format!("task {pid} is more than one pid namespace below stasis"),
            "run stasis in the parent of that pid namespace",
        ));
    }
    // A zombie has no namespaces any more, hence the checks below apply only to what can be opened.
    if let (Ok(own), Ok(children)) = (ino("ns/pid"), ino("ns/pid_for_children"))
        && own != children
    {
        return Err(HookError::unsupported(
            name,
            format!("children of task {pid} would start in another pid namespace, pid:[{children}]"),
            "",
        ));
    }
    if let (Ok(file), Ok(user)) = (File::open(format!("{base}/ns/pid")), ino("ns/user"))
        && owner(&file)? != user
    {
        return Err(HookError::unsupported(
            name,
            format!("it is not owned by the user namespace of task {pid}"),
            "create the user and the pid namespace in one call, as `unshare --user --pid` does",
        ));
    }
    Ok(())
}

/// Inode of the user namespace that owns a namespace.
fn owner(file: &File) -> Result<u64> {
    // SAFETY: the ioctl takes no argument and gives a new descriptor.
    let fd = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_USERNS) };
    if fd < 0 {
        return Err(HookError::failed("NS_GET_USERNS", std::io::Error::last_os_error()));
    }
    // SAFETY: the kernel just gave us this descriptor.
    let owner = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    owner.metadata().map(|stat| stat.ino()).map_err(|error| HookError::failed("fstat of a namespace", error))
}

/// How many pids a task has from our namespace inwards: the numbers on the line `NSpid` of proc_pid_status(5).
pub(crate) fn levels(status: &str) -> Option<usize> {
    status.lines().find_map(|line| line.strip_prefix("NSpid:")).map(|pids| pids.split_whitespace().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_counted() {
        assert_eq!(levels("Name:\tsh\nNSpid:\t4711\t1\nNSpgid:\t1\n"), Some(2));
        assert_eq!(levels("NSpid:\t4711\n"), Some(1));
        assert_eq!(levels("Name:\tsh\n"), None);
    }

    #[test]
    fn own_namespace_has_an_owner() {
        let user = fs::metadata("/proc/self/ns/user").unwrap().ino();
        assert_eq!(owner(&File::open("/proc/self/ns/pid").unwrap()).unwrap(), user);
    }
}
