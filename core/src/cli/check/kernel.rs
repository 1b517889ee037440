//! Features of the kernel.

use super::{
    Outcome,
    children::{Child, exit, in_child, outcome},
};
use nix::{
    errno::Errno,
    sys::{
        memfd::{MFdFlags, memfd_create},
        ptrace::{self, Options},
        uio::{RemoteIoVec, process_vm_readv},
    },
    unistd::Pid,
};
use std::{
    ffi::{c_int, c_long, c_ulong, c_void},
    fs, io,
    mem::size_of,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
};

fn nothing() -> io::Result<()> {
    Ok(())
}

fn stopped() -> io::Result<Child> {
    Child::stopped(Options::empty(), nothing)
}

/// A system call's result.
fn checked(result: c_long) -> io::Result<c_long> {
    Ok(Errno::result(result)?)
}

/// A ptrace request that nix does not have; `data` points to what the request expects.
fn request<T>(request: u32, pid: Pid, address: usize, data: &mut T) -> io::Result<c_long> {
    let data = std::ptr::from_mut(data).cast::<c_void>();
    // SAFETY: every caller passes the type that the request reads or writes, with its size as `address` where the
    // request takes one.
    checked(unsafe { libc::ptrace(request, pid.as_raw(), address as *mut c_void, data) })
}

pub(super) fn seize() -> Outcome {
    let child = stopped()?;
    ptrace::getregs(child.pid)?;
    ptrace::detach(child.pid, None)?;
    Ok(String::new())
}

pub(super) fn exit_kill() -> Outcome {
    Child::stopped(Options::PTRACE_O_EXITKILL, nothing).map(|_| String::new())
}

/// ptrace(2), PTRACE_GETSIGMASK and PTRACE_PEEKSIGINFO.
pub(super) fn signals() -> Outcome {
    let child = stopped()?;
    let mut mask = 0u64;
    request(libc::PTRACE_GETSIGMASK, child.pid, size_of::<u64>(), &mut mask)?;
    let mut arguments = libc::ptrace_peeksiginfo_args { off: 0, flags: 0, nr: 0 };
    let arguments = std::ptr::from_mut(&mut arguments) as usize;
    // Nothing is pending, so nothing is written.
    request(libc::PTRACE_PEEKSIGINFO, child.pid, arguments, &mut mask)?;
    Ok(String::new())
}

/// NT_X86_XSTATE (include/uapi/linux/elf.h).
pub(super) fn xstate() -> Outcome {
    const NT_X86_XSTATE: usize = 0x202;
    let child = stopped()?;
    let mut buffer = vec![0u8; 64 << 10];
    let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    request(libc::PTRACE_GETREGSET, child.pid, NT_X86_XSTATE, &mut vector)?;
    Ok(format!("{} bytes", vector.iov_len))
}

pub(super) fn rseq() -> Outcome {
    let child = stopped()?;
    // SAFETY: plain numbers.
    let mut configuration: libc::ptrace_rseq_configuration = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::ptrace_rseq_configuration>();
    request(libc::PTRACE_GET_RSEQ_CONFIGURATION, child.pid, size, &mut configuration)?;
    Ok(String::new())
}

/// Installs a filter that allows everything.
fn filter_all() -> io::Result<()> {
    const ALLOW: u32 = 0x7fff_0000; // SECCOMP_RET_ALLOW
    let mut program =
        [libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: ALLOW }];
    let program = libc::sock_fprog { len: 1, filter: program.as_mut_ptr() };
    // SAFETY: plain numbers; seccomp(2) reads the program, which lives until then.
    unsafe {
        checked(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        checked(libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program))?;
    }
    Ok(())
}

pub(super) fn seccomp() -> Outcome {
    const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c; // include/uapi/linux/ptrace.h
    let child = Child::stopped(Options::empty(), filter_all)?;
    let mut program = [0u64; 4096];
    let length = request(PTRACE_SECCOMP_GET_FILTER, child.pid, 0, &mut program)?;
    if length == 1 { Ok(String::new()) } else { Err(io::Error::other("another filter came back")) }
}

pub(super) fn suspend_seccomp() -> Outcome {
    let suspend = Options::from_bits_retain(1 << 21); // PTRACE_O_SUSPEND_SECCOMP
    Child::stopped(suspend, filter_all).map(|_| String::new())
}

/// clone3(2): a child that exits at once; its pid, if `pid` is free.
fn clone3(flags: u64, pid: Option<i32>) -> io::Result<Pid> {
    // SAFETY: plain numbers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags;
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(pid) = &pid {
        arguments.set_tid = std::ptr::from_ref(pid) as u64;
        arguments.set_tid_size = 1;
    }
    // SAFETY: without CLONE_VM this is fork(2); the child only ends itself.
    let child = checked(unsafe {
        libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>())
    })?;
    if child == 0 {
        exit(0);
    }
    Ok(Pid::from_raw(child as i32))
}

pub(super) fn chosen_pid() -> Outcome {
    let highest: i32 = fs::read_to_string("/proc/sys/kernel/pid_max")?.trim().parse().unwrap_or(32_768);
    let free = (2..highest).rev().find(|pid| !Path::new(&format!("/proc/{pid}")).exists());
    let wanted = free.ok_or_else(|| io::Error::other("no pid is free"))?;
    let child = clone3(0, Some(wanted))?;
    outcome(child)?;
    if child.as_raw() == wanted { Ok(String::new()) } else { Err(io::Error::other("another pid was given")) }
}

/// A new namespace of the type that is made by `flag`.
pub(super) fn new_namespace(flag: u64) -> Outcome {
    outcome(clone3(flag, None)?).map(|()| String::new())
}

/// Fields of `/proc/self/stat` by their numbers in proc_pid_stat(5).
fn stat_fields() -> io::Result<Vec<u64>> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    // The name may contain anything, so count from its closing bracket, which stands before field 3.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    Ok([0; 3].into_iter().chain(rest.split_whitespace().map(|word| word.parse().unwrap_or(0))).collect())
}

/// PR_SET_MM_MAP with the values that are there already (struct prctl_mm_map, include/uapi/linux/prctl.h).
pub(super) fn mm_map() -> Outcome {
    const PR_SET_MM_MAP: c_int = 14;
    in_child(|| {
        let fields = stat_fields()?;
        let field = |number: usize| fields.get(number).copied().unwrap_or(0);
        // SAFETY: sbrk(0) only asks.
        let brk = unsafe { libc::sbrk(0) } as u64;
        // code, data, brk, stack, arguments, environment, auxv (pointer, size) and exe_fd (-1: keep).
        let map: [u64; 13] = [
            field(26),
            field(27),
            field(45),
            field(46),
            field(47),
            brk,
            field(28),
            field(48),
            field(49),
            field(50),
            field(51),
            0,
            u64::from(u32::MAX) << 32,
        ];
        // SAFETY: the kernel reads the array, which is a prctl_mm_map: eleven addresses, a null pointer, size 0, fd -1.
        let result = unsafe {
            libc::prctl(libc::PR_SET_MM, PR_SET_MM_MAP, map.as_ptr(), std::mem::size_of_val(&map), 0)
        };
        checked(result.into()).map(drop)
    })
    .map(|()| String::new())
}

/// arch_prctl(2), ARCH_MAP_VDSO_64, which works only when nothing of the old vdso is mapped any more.
pub(super) fn move_vdso() -> Outcome {
    const ARCH_MAP_VDSO_64: c_int = 0x2003; // arch/x86/include/uapi/asm/prctl.h
    let maps = fs::read_to_string("/proc/self/maps")?;
    let mut ranges = Vec::new();
    for line in maps.lines().filter(|line| line.contains("[vdso]") || line.contains("[vvar")) {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let hex = |text: &str| usize::from_str_radix(text, 16).unwrap_or(0);
        ranges.extend(range.map(|(start, end)| (hex(start), hex(end))));
    }
    in_child(|| {
        for (start, end) in &ranges {
            // SAFETY: from here on the child makes plain system calls only, none of which goes through the vdso.
            checked(unsafe { libc::syscall(libc::SYS_munmap, *start, end - start) })?;
        }
        // A place that is free, since the old vdso was there.
        let home = ranges.first().map_or(0, |range| range.0);
        // SAFETY: maps a new vdso there.
        checked(unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_MAP_VDSO_64, home) }).map(drop)
    })
    .map(|()| String::new())
}

pub(super) fn kcmp() -> Outcome {
    const KCMP_FILE: c_int = 0;
    let pid = std::process::id();
    // SAFETY: plain numbers; compares descriptor 2 with itself.
    let same = checked(unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, 2, 2) })?;
    if same == 0 { Ok(String::new()) } else { Err(io::Error::other("a descriptor differs from itself")) }
}

pub(super) fn take_descriptor() -> Outcome {
    let child = Child::sleeping(nothing)?;
    // SAFETY: plain numbers; the results are descriptors of ours.
    unsafe {
        let pidfd = checked(libc::syscall(libc::SYS_pidfd_open, child.pid.as_raw(), 0))?;
        let pidfd = OwnedFd::from_raw_fd(pidfd as i32);
        let taken = checked(libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), 2, 0))?;
        drop(OwnedFd::from_raw_fd(taken as i32));
    }
    Ok(String::new())
}

pub(super) fn read_memory() -> Outcome {
    let value = 0x5741_5349_u64;
    let child = Child::sleeping(nothing)?;
    let mut copy = [0; 8];
    // The child is a fork, so the value is at the same address there.
    let base = std::ptr::from_ref(&value) as usize;
    let remote = RemoteIoVec { base, len: copy.len() };
    process_vm_readv(child.pid, &mut [io::IoSliceMut::new(&mut copy)], &[remote])?;
    if u64::from_ne_bytes(copy) == value {
        Ok(String::new())
    } else {
        Err(io::Error::other("another value was read"))
    }
}

/// PAGEMAP_SCAN (include/uapi/linux/fs.h, struct pm_scan_arg).
pub(super) fn scan_pages() -> Outcome {
    const PAGEMAP_SCAN: c_ulong = 0xc060_6610;
    const PRESENT: u64 = 1 << 3;
    let value = vec![1u8; 8192];
    let start = value.as_ptr() as u64 & !4095;
    let mut regions = [[0u64; 3]; 4];
    let mut arguments: [u64; 12] =
        [96, 0, start, start + 8192, 0, regions.as_mut_ptr() as u64, 4, 0, 0, 0, PRESENT, PRESENT];
    let pagemap = fs::File::open("/proc/self/pagemap")?;
    // SAFETY: the kernel reads and writes the 96 bytes of the argument, and at most four regions.
    let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, arguments.as_mut_ptr()) };
    match checked(found.into())? {
        0 => Err(io::Error::other("a present page was not found")),
        _ => Ok(String::new()),
    }
}

pub(super) fn memory_file() -> Outcome {
    memfd_create(c"stasis-check", MFdFlags::MFD_CLOEXEC)?;
    Ok(String::new())
}

pub(super) fn map_files() -> Outcome {
    let entry = fs::read_dir("/proc/self/map_files")?.next();
    let entry = entry.ok_or_else(|| io::Error::other("no entry"))??;
    fs::File::open(entry.path())?;
    Ok(String::new())
}

pub(super) fn children() -> Outcome {
    let child = Child::sleeping(nothing)?;
    let pid = std::process::id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    match children.split_whitespace().any(|word| word == child.pid.to_string()) {
        true => Ok(String::new()),
        false => Err(io::Error::other("a child is not listed")),
    }
}

/// userfaultfd(2) and what it offers (include/uapi/linux/userfaultfd.h).
pub(super) fn fault_handling() -> Outcome {
    const UFFDIO_API: c_ulong = 0xc018_aa3f;
    const WP_ASYNC: u64 = 1 << 15;
    // SAFETY: plain numbers; the result is a descriptor of ours.
    let fd = unsafe {
        let fd = checked(libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC))?;
        OwnedFd::from_raw_fd(fd as i32)
    };
    // struct uffdio_api: api, features, ioctls.
    let mut api = [0xaa_u64, 0, 0];
    // SAFETY: the kernel reads and writes these 24 bytes.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) }.into())?;
    Ok(if api[1] & WP_ASYNC == 0 { "without tracking of changes".into() } else { String::new() })
}

pub(super) fn timer_list() -> Outcome {
    let text = fs::read_to_string("/proc/timer_list")?;
    match text.contains("cpu: 0") {
        true => Ok(String::new()),
        false => Err(io::Error::other("it lists no timers")),
    }
}

/// Version 2 (Documentation/admin-guide/cgroup-v2.rst): a group of its own, below ours, is frozen and removed.
pub(super) fn freezer() -> Outcome {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mount = mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        after.starts_with("cgroup2 ").then(|| before.split(' ').nth(4))?
    });
    let mount = mount.ok_or_else(|| io::Error::other("no cgroup2 file system is mounted"))?;
    let groups = fs::read_to_string("/proc/self/cgroup")?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or("");
    let group = Group(Path::new(mount).join(own).join(format!("stasis-check-{}", std::process::id())));
    fs::create_dir(&group.0)?;
    let child = Child::sleeping(nothing)?;
    fs::write(group.0.join("cgroup.procs"), child.pid.to_string())?;
    fs::write(group.0.join("cgroup.freeze"), "1")?;
    // A sleeping task is frozen in no time.
    let frozen = (0..100).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(1));
        fs::read_to_string(group.0.join("cgroup.events")).is_ok_and(|events| events.contains("frozen 1"))
    });
    fs::write(group.0.join("cgroup.freeze"), "0")?;
    drop(child);
    if frozen { Ok(String::new()) } else { Err(io::Error::other("it did not freeze")) }
}

/// A control group that is removed at the end, when nothing is in it any more.
struct Group(PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            tracing::warn!("{} stays behind: {error}", self.0.display());
        }
    }
}
