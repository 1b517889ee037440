use super::*;
use stasis_plugin_api::testing::Kit;
use std::{os::fd::AsFd, process::Command};

fn kit() -> Kit {
    let mut kit = Kit::new();
    kit.plugin(Processes);
    kit
}

/// The end of a process as poll(2) sees it.
fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut entry =
        libc::pollfd { fd: std::os::fd::AsRawFd::as_raw_fd(&pidfd), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry.
    unsafe { libc::poll(&raw mut entry, 1, 0) == 1 && entry.revents & libc::POLLIN != 0 }
}

#[test]
fn a_living_task_comes_back() {
    let own = std::process::id().cast_signed();
    let mut kit = kit();
    let plain = kit.hold(kernel::open(own, 0).unwrap(), Processes::KIND).unwrap();
    let thread = kit.hold(kernel::open(own, kernel::PIDFD_THREAD).unwrap(), Processes::KIND).unwrap();
    assert_eq!(kit.dump().unwrap(), 1, "two descriptions of one process");
    assert_eq!(kit.record::<Processes>().unwrap().pid, own);
    kit.restore().unwrap();
    for (number, flag) in [(plain, 0), (thread, kernel::PIDFD_THREAD)] {
        assert!(!has_ended(kit.fd(number)));
        let fdinfo = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
        assert!(fdinfo.contains(&format!("Pid:\t{own}\n")), "{fdinfo}");
        let flags = fdinfo.lines().find_map(|line| line.strip_prefix("flags:\t")).unwrap();
        assert_eq!(u32::from_str_radix(flags, 8).unwrap() & kernel::PIDFD_THREAD, flag);
    }
}

#[test]
fn one_that_is_gone_comes_back_as_it_ended() {
    for (script, status) in [("exit 7", 7 << 8), ("kill -9 $$", 9)] {
        let mut child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let pidfd = kernel::open(child.id().cast_signed(), 0).unwrap();
        child.wait().unwrap();
        let known = kernel::exit_status(pidfd.as_fd());
        let mut kit = kit();
        let number = kit.hold(pidfd, Processes::KIND).unwrap();
        kit.dump().unwrap();
        kit.restore().unwrap();
        assert!(has_ended(kit.fd(number)));
        assert_eq!(kernel::exit_status(kit.fd(number)), known);
        assert!(known.is_none_or(|known| known == status));
    }
}

#[test]
fn strangers_and_threads_are_refused_by_name() {
    let mut child = Command::new("sleep").arg("100").spawn().unwrap();
    let mut kit = kit();
    kit.hold(kernel::open(child.id().cast_signed(), 0).unwrap(), Processes::KIND).unwrap();
    let error = kit.dump().unwrap_err().to_string();
    assert!(error.contains(&format!("process {}, which is not in the tree", child.id())), "{error}");
    child.kill().unwrap();
    child.wait().unwrap();
    drop(kit);
    let mut kit = self::kit();
    // SAFETY: takes nothing.
    let tid = unsafe { libc::gettid() };
    kit.hold(kernel::open(tid, kernel::PIDFD_THREAD).unwrap(), Processes::KIND).unwrap();
    let error = kit.dump().unwrap_err().to_string();
    assert!(error.contains(&format!("thread {tid}")), "{error}");
}
