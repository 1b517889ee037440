//! Makes the objects in the namespace of the first task, each with the number that it had.

use crate::{
    blob, kernel,
    record::stasis::ns_ipc::v1::{IpcNamespace, Permissions, Queue, Segment, SemaphoreSet},
};
use nix::errno::Errno;
use stasis_plugin_api::{HookError, Host, Result};
use std::{fs, io::Read};

/// Files of /proc/sys/kernel in which the number for the next object is chosen (CONFIG_CHECKPOINT_RESTORE).
const NEXT_SEGMENT: &str = "shm_next_id";
const NEXT_SEMAPHORE: &str = "sem_next_id";
const NEXT_QUEUE: &str = "msg_next_id";

pub(crate) fn enter(host: &Host<'_>, record: &IpcNamespace) -> Result<()> {
    for sysctl in &record.sysctls {
        let path = format!("/proc/sys/{}", sysctl.path);
        // What is so already is not written: a user namespace may change few of them.
        if fs::read_to_string(&path).is_ok_and(|value| value.trim() == sysctl.value) {
            continue;
        }
        fs::write(&path, &sysctl.value)
            .map_err(|error| HookError::failed(format!("setting {path} to {}", sysctl.value), error))?;
    }
    record.segments.iter().try_for_each(|one| segment(host, one))?;
    record.semaphores.iter().try_for_each(semaphores)?;
    record.queues.iter().try_for_each(queue)
}

/// Segments that went with their last user are removed when all their users have them.
pub(crate) fn finish(record: &IpcNamespace) -> Result<()> {
    for segment in record.segments.iter().filter(|segment| segment.removed) {
        let id = permissions(segment.permissions.as_ref())?.id;
        // SAFETY: no structure is involved.
        let removed = unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
        Errno::result(removed).map_err(|errno| HookError::failed(format!("removing segment {id}"), errno))?;
    }
    Ok(())
}

fn permissions(permissions: Option<&Permissions>) -> Result<&Permissions> {
    permissions.ok_or_else(|| HookError::invalid("an object without permissions"))
}

/// Makes an object under its number.
fn make(what: &str, file: &str, permissions: &Permissions, get: impl FnOnce(i32) -> i32) -> Result<()> {
    let id = permissions.id;
    let name = format!("{what} {id}");
    let path = format!("/proc/sys/kernel/{file}");
    fs::write(&path, id.to_string())
        .map_err(|error| HookError::failed(format!("choosing the number of {name} in {path}"), error))?;
    let made = Errno::result(get(libc::IPC_CREAT | libc::IPC_EXCL | 0o600));
    let made = made.map_err(|errno| HookError::failed(format!("making {name}"), errno))?;
    if made == id { Ok(()) } else { Err(HookError::invalid(format!("{name} got number {made}"))) }
}

fn set(name: impl FnOnce() -> String, result: i32) -> Result<()> {
    let done = Errno::result(result);
    done.map(drop).map_err(|errno| HookError::failed(format!("setting owner and mode of {}", name()), errno))
}

/// The part of `struct ipc_perm` that IPC_SET takes.
fn fill(to: &mut libc::ipc_perm, from: &Permissions) {
    (to.uid, to.gid, to.mode) = (from.uid, from.gid, from.mode as _);
}

fn segment(host: &Host<'_>, segment: &Segment) -> Result<()> {
    let permissions = permissions(segment.permissions.as_ref())?;
    let id = permissions.id;
    let failed = |what: &'static str| move |error| HookError::failed(format!("{what} segment {id}"), error);
    let size = usize::try_from(segment.size).map_err(|_| HookError::invalid("a segment without end"))?;
    make("shared memory segment", NEXT_SEGMENT, permissions, |flags| {
        // SAFETY: integer arguments.
        unsafe { libc::shmget(permissions.key, size, flags) }
    })?;
    if !segment.extents.is_empty() {
        let mut attached = kernel::Attached::new(id, size, 0).map_err(failed("attaching"))?;
        let name = blob(id);
        let mut contents = host.blob_reader(&name);
        for extent in &segment.extents {
            let room = attached.slice(extent.offset as usize, extent.length as usize);
            let room =
                room.ok_or_else(|| HookError::invalid(format!("data beyond the end of segment {id}")))?;
            contents.read_exact(room).map_err(failed("filling"))?;
        }
    }
    // SAFETY: zeros are valid for this structure of integers.
    let mut wanted: libc::shmid_ds = unsafe { std::mem::zeroed() };
    fill(&mut wanted.shm_perm, permissions);
    // SAFETY: the kernel reads the structure.
    set(|| format!("segment {id}"), unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut wanted) })?;
    if segment.locked {
        // SAFETY: no structure is involved. SHM_LOCK is 11 (include/uapi/linux/shm.h).
        let locked = unsafe { libc::shmctl(id, 11, std::ptr::null_mut()) };
        Errno::result(locked).map_err(|errno| HookError::failed(format!("locking segment {id}"), errno))?;
    }
    Ok(())
}

fn semaphores(record: &SemaphoreSet) -> Result<()> {
    let permissions = permissions(record.permissions.as_ref())?;
    let id = permissions.id;
    make("semaphore set", NEXT_SEMAPHORE, permissions, |flags| {
        // SAFETY: integer arguments.
        unsafe { libc::semget(permissions.key, record.values.len() as i32, flags) }
    })?;
    let mut values: Vec<u16> = record.values.iter().map(|&value| value as u16).collect();
    kernel::set_values(id, &mut values)
        .map_err(|error| HookError::failed(format!("setting semaphores {id}"), error))?;
    // SAFETY: zeros are valid for this structure of integers.
    let mut wanted: libc::semid_ds = unsafe { std::mem::zeroed() };
    fill(&mut wanted.sem_perm, permissions);
    // SAFETY: the kernel reads the structure.
    set(|| format!("semaphores {id}"), unsafe { libc::semctl(id, 0, libc::IPC_SET, &raw mut wanted) })
}

fn queue(record: &Queue) -> Result<()> {
    let permissions = permissions(record.permissions.as_ref())?;
    let id = permissions.id;
    // SAFETY: integer arguments.
    make("message queue", NEXT_QUEUE, permissions, |flags| unsafe { libc::msgget(permissions.key, flags) })?;
    // SAFETY: zeros are valid for this structure of integers.
    let mut wanted: libc::msqid_ds = unsafe { std::mem::zeroed() };
    fill(&mut wanted.msg_perm, permissions);
    wanted.msg_qbytes = record.limit;
    // SAFETY: the kernel reads the structure.
    set(|| format!("queue {id}"), unsafe { libc::msgctl(id, libc::IPC_SET, &raw mut wanted) })?;
    for message in &record.messages {
        kernel::send(id, message.r#type, &message.text).map_err(|error| {
            HookError::failed(format!("putting a message into queue {id}"), error)
                .remedy("the limits of the namespace (kernel.msgmax) may be smaller than they were")
        })?;
    }
    Ok(())
}
