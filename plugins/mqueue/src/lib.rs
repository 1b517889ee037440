//! POSIX message queues: mq_overview(7).
//!
//! A queue with a name stays in its IPC namespace with its messages, as a file stays on its file system; it is opened
//! again and must be of the same size. Refused by name: queues without a name, queues of an IPC namespace of the tree,
//! and registrations for a notification, whose signal value the kernel does not show.

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector, export_plugin,
    register,
};
use std::{
    ffi::{CString, OsStr},
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt, OpenOptionsExt},
        },
    },
    path::Path,
};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use records::stasis::mqueue::v1::Queue;

/// `MQUEUE_MAGIC` (ipc/mqueue.c).
const MQUEUE_MAGIC: u64 = 0x1980_0202;

struct Queues;

fn refused(why: &str, remedy: &str) -> HookError {
    HookError::unsupported("message queue", why, remedy)
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}

fn check(result: i64) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// mq_getattr(3): the longest message and the number of messages that fit.
fn sizes(queue: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    // SAFETY: a zeroed struct mq_attr is one.
    let mut attributes: libc::mq_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the call fills the attributes.
    if unsafe { libc::mq_getattr(queue.as_raw_fd(), &raw mut attributes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((attributes.mq_msgsize as u32, attributes.mq_maxmsg as u32))
}

/// mq_open(2), whose names have no slash.
fn open(name: &[u8], flags: i32) -> io::Result<OwnedFd> {
    let name = name.strip_prefix(b"/").unwrap_or(name);
    let name = CString::new(name).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let none = std::ptr::null::<libc::mq_attr>();
    // SAFETY: a name that ends with NUL; no attributes.
    check(unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags | libc::O_CLOEXEC, 0, none) })
}

/// Who is to be notified (ipc/mqueue.c, mqueue_read_file).
fn notified(queue: BorrowedFd<'_>) -> io::Result<i32> {
    // Another description, which can be read and has a position of its own.
    let file = File::open(format!("/proc/self/fd/{}", queue.as_raw_fd()))?;
    let mut text = [0; 128];
    let n = file.read_at(&mut text, 0)?;
    let text = String::from_utf8_lossy(&text[..n]).into_owned();
    Ok(text.rsplit_once("NOTIFY_PID:").and_then(|(_, pid)| pid.trim().parse().ok()).unwrap_or(0))
}

/// Whether a task is in our IPC namespace.
fn is_ours(host: &Host<'_>, pid: i32) -> Result<bool> {
    let proc = host.open_proc(pid)?;
    let inode = |path: &Path| fs::metadata(path).map(|meta| meta.ino()).map_err(failed("look at ns/ipc"));
    let theirs = inode(Path::new(&format!("/proc/self/fd/{}/ns/ipc", proc.as_raw_fd())))?;
    Ok(theirs == inode(Path::new("/proc/self/ns/ipc"))?)
}

impl Descriptor for Queues {
    type Record = Queue;
    const KIND: &'static str = "mqueue";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Filesystem(MQUEUE_MAGIC)]
    }

    fn describe(&self, host: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        if handle.mode & libc::S_IFMT != libc::S_IFREG {
            return Err(refused("it is the directory of all queues", "let the program close it"));
        }
        if handle.link.ends_with(" (deleted)") {
            return Err(refused("its name is removed", "keep its name (mq_unlink) until the dump"));
        }
        let pid = handle.holders.first().map_or(0, |holder| holder.pid);
        if pid == 0 || !is_ours(host, pid)? {
            let why = "it is in an IPC namespace of the tree, which goes with it";
            return Err(refused(why, "run the program in the IPC namespace of stasis"));
        }
        let notified = notified(fd).map_err(failed("read a message queue's state"))?;
        if host.tasks().iter().any(|task| task.host_pid == notified) {
            let why =
                format!("task {notified} waits for a notification, whose value the kernel does not show");
            return Err(refused(&why, "let the program cancel it (mq_notify)"));
        }
        Ok(Described {
            identity: format!("{}:{}", handle.dev, handle.ino).into(),
            description: format!("message queue {}", handle.link).into(),
            ..Described::default()
        })
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Queue>> {
        let handle = &object.handles[0];
        let queue = host.open_handle(handle.id)?;
        let link = fs::read_link(format!("/proc/self/fd/{}", queue.as_raw_fd()));
        let link = link.map_err(failed("read the link of a message queue"))?;
        let (longest, most) = sizes(std::os::fd::AsFd::as_fd(&queue)).map_err(failed("mq_getattr"))?;
        // Opened by mq_open, its link is the name alone.
        let by_path = fs::symlink_metadata(&link)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == (handle.dev, handle.ino));
        Ok(Dumped::new(Queue { path: link.as_os_str().as_bytes().to_vec(), by_path, longest, most }))
    }

    fn create(&self, _: &Host<'_>, object: &ObjectInfo, record: &Queue) -> Result<Vec<OwnedFd>> {
        let name = String::from_utf8_lossy(&record.path);
        let open = |handle: &HandleInfo| {
            let mode = handle.status_flags.cast_signed() & libc::O_ACCMODE;
            let opened = if record.by_path {
                let path = Path::new(OsStr::from_bytes(&record.path));
                let (read, write) = (mode != libc::O_WRONLY, mode != libc::O_RDONLY);
                OpenOptions::new()
                    .read(read)
                    .write(write)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path)
                    .map(OwnedFd::from)
            } else {
                self::open(&record.path, mode)
            };
            let queue = opened.map_err(|error| {
                HookError::failed(format!("open message queue {name}"), error)
                    .remedy("message queues with a name are not in the image: make it again")
            })?;
            let now = sizes(std::os::fd::AsFd::as_fd(&queue)).map_err(failed("mq_getattr"))?;
            if now != (record.longest, record.most) {
                let what = format!("message queue {name} has {} messages of {} bytes now", now.1, now.0);
                return Err(HookError::invalid(what).remedy("make it again as it was at the dump"));
            }
            Ok(queue)
        };
        object.handles.iter().map(open).collect()
    }
}

register!(descriptor: Queues);
export_plugin! { name: "mqueue", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_plugin_api::testing::Kit;
    use std::os::fd::AsFd;

    fn make(name: &std::ffi::CStr) -> OwnedFd {
        // SAFETY: a zeroed struct mq_attr is one.
        let mut attributes: libc::mq_attr = unsafe { std::mem::zeroed() };
        (attributes.mq_maxmsg, attributes.mq_msgsize) = (5, 64);
        let flags = libc::O_CREAT | libc::O_RDWR | libc::O_NONBLOCK;
        // SAFETY: a name that ends with NUL, and attributes.
        check(unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0o600, &raw const attributes) })
            .unwrap()
    }

    fn unlink(name: &std::ffi::CStr) {
        // SAFETY: a name that ends with NUL.
        unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) };
    }

    #[test]
    fn a_queue_is_opened_again_with_its_messages() {
        let name = c"stasis-test-mqueue";
        let queue = make(name);
        let message = b"hello";
        // SAFETY: a message of that length; no time.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_mq_timedsend,
                queue.as_raw_fd(),
                message.as_ptr(),
                message.len(),
                7,
                std::ptr::null::<libc::timespec>(),
            )
        };
        assert_eq!(sent, 0);
        let mut kit = Kit::new();
        kit.plugin(Queues);
        let number = kit.hold(queue, Queues::KIND).unwrap();
        let writer = kit.hold(open(b"/stasis-test-mqueue", libc::O_WRONLY).unwrap(), Queues::KIND).unwrap();
        assert_eq!(kit.dump().unwrap(), 1);
        kit.restore().unwrap();
        assert_eq!(sizes(kit.fd(number)).unwrap(), (64, 5));
        let (mut text, mut priority) = ([0_u8; 64], 0_u32);
        // SAFETY: room for the longest message; no time.
        let got = unsafe {
            libc::syscall(
                libc::SYS_mq_timedreceive,
                number,
                text.as_mut_ptr(),
                text.len(),
                &raw mut priority,
                std::ptr::null::<libc::timespec>(),
            )
        };
        assert_eq!((&text[..got as usize], priority), (&message[..], 7));
        assert_eq!(notified(kit.fd(writer).as_fd()).unwrap(), 0);
        unlink(name);
    }

    #[test]
    fn what_cannot_be_kept_is_refused() {
        let name = c"stasis-test-refused";
        let queue = make(name);
        // SAFETY: a zeroed sigevent is one (SIGEV_SIGNAL with signal 0 is replaced).
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        (event.sigev_notify, event.sigev_signo) = (libc::SIGEV_SIGNAL, libc::SIGURG);
        let mut kit = Kit::new();
        kit.plugin(Queues);
        let number = kit.hold(queue, Queues::KIND).unwrap();
        // Not before: when its process closes any descriptor of the queue, a registration ends.
        // SAFETY: a complete sigevent.
        assert_eq!(unsafe { libc::syscall(libc::SYS_mq_notify, number, &raw const event) }, 0);
        assert!(kit.dump().unwrap_err().to_string().contains("notification"));
        unlink(name);
        assert!(kit.dump().unwrap_err().to_string().contains("removed"));
    }
}
