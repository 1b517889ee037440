//! An IPC namespace with segments (attached, in part, read-only, removed, nobody's), semaphores with a waiter, and queues with
//! messages and a receiver.

use std::ptr;
use std::time::Duration;

use nix::errno::Errno;

use crate::ctl::{Ctl, Outcome, changed, ensure, pause, same};
use crate::sys::{self, cvt, cvt_long};

const SIZE: usize = 5 << 20;
const PAGE: usize = 4096;

/// Its number, and the bytes where it is attached.
fn segment(key: i32, size: usize) -> Outcome<(i32, *mut u8)> {
    // SAFETY: integer arguments.
    let id = cvt(unsafe { libc::shmget(key, size, libc::IPC_CREAT | libc::IPC_EXCL | 0o640) })?;
    Ok((id, attach(id, 0)?))
}

fn attach(id: i32, flags: i32) -> Outcome<*mut u8> {
    // SAFETY: at an address of the kernel's choice.
    let address = unsafe { libc::shmat(id, ptr::null(), flags) };
    if address as isize == -1 { Err(Errno::last().into()) } else { Ok(address.cast()) }
}

fn put(at: *mut u8, offset: usize, value: u64) {
    // SAFETY: all offsets of this file are within the segments.
    unsafe { at.add(offset).cast::<u64>().write_volatile(value) };
}

fn get(at: *mut u8, offset: usize) -> u64 {
    // SAFETY: as above.
    unsafe { at.add(offset).cast::<u64>().read_volatile() }
}

fn status(id: i32) -> Outcome<libc::shmid_ds> {
    // SAFETY: zeros are valid for this structure of integers, which the kernel fills.
    let (mut one, result) = unsafe {
        let mut one: libc::shmid_ds = std::mem::zeroed();
        let result = libc::shmctl(id, libc::IPC_STAT, &raw mut one);
        (one, result)
    };
    cvt(result)?;
    // What no call of ours looks at.
    one.shm_atime = 0;
    Ok(one)
}

fn semop(id: i32, number: u16, by: i16) -> Outcome {
    let mut operation = libc::sembuf { sem_num: number, sem_op: by, sem_flg: 0 };
    // SAFETY: one operation.
    Ok(cvt(unsafe { libc::semop(id, &raw mut operation, 1) }).map(drop)?)
}

fn value(id: i32, number: i32) -> Outcome<i32> {
    // SAFETY: GETVAL takes no further argument.
    Ok(cvt(unsafe { libc::semctl(id, number, libc::GETVAL) })?)
}

#[repr(C)]
struct Message {
    kind: i64,
    text: [u8; 100],
}

fn send(id: i32, kind: i64, text: &[u8]) -> Outcome {
    let mut message = Message { kind, text: [0; 100] };
    message.text[..text.len()].copy_from_slice(text);
    // SAFETY: the type and as many bytes as there are.
    Ok(cvt(unsafe { libc::msgsnd(id, (&raw const message).cast(), text.len(), libc::IPC_NOWAIT) }).map(drop)?)
}

fn receive(id: i32, kind: i64, flags: i32) -> Outcome<(i64, Vec<u8>)> {
    let mut message = Message { kind: 0, text: [0; 100] };
    // SAFETY: room for the type and 100 bytes.
    let length = unsafe { libc::msgrcv(id, (&raw mut message).cast(), 100, kind, flags) };
    let length = cvt_long(length as i64)? as usize;
    Ok((message.kind, message.text[..length].to_vec()))
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWIPC)?;
    std::fs::write("/proc/sys/kernel/msgmnb", "20000")?;
    // Numbers that do not begin at the beginning.
    for _ in 0..3 {
        // SAFETY: integer arguments, and no structure.
        let id = cvt(unsafe { libc::shmget(libc::IPC_PRIVATE, PAGE, 0o600) })?;
        // SAFETY: as above.
        cvt(unsafe { libc::shmctl(id, libc::IPC_RMID, ptr::null_mut()) })?;
    }
    let (big, at) = segment(0x1234, SIZE)?;
    put(at, 0, 11);
    put(at, SIZE - PAGE, 12);
    let reader = attach(big, libc::SHM_RDONLY)?;
    // A part in the middle only.
    let part = attach(big, 0)?;
    // SAFETY: parts of the mapping above.
    cvt(unsafe { libc::munmap(part.cast(), PAGE * 2) })?;
    // SAFETY: as above.
    cvt(unsafe { libc::munmap(part.add(PAGE * 10).cast(), SIZE - PAGE * 10) })?;
    let (removed, gone) = segment(libc::IPC_PRIVATE, PAGE * 3)?;
    put(gone, PAGE, 13);
    // SAFETY: no structure is involved.
    cvt(unsafe { libc::shmctl(removed, libc::IPC_RMID, ptr::null_mut()) })?;
    let (alone, detached) = segment(0x77, PAGE)?;
    put(detached, 8, 14);
    // SAFETY: attached above, and not used afterwards.
    cvt(unsafe { libc::shmdt(detached.cast()) })?;

    // SAFETY: integer arguments.
    let set = cvt(unsafe { libc::semget(0x99, 3, libc::IPC_CREAT | 0o600) })?;
    semop(set, 1, 7)?;
    // SAFETY: integer arguments.
    let queue = cvt(unsafe { libc::msgget(0x55, libc::IPC_CREAT | 0o600) })?;
    // SAFETY: as above.
    let other = cvt(unsafe { libc::msgget(libc::IPC_PRIVATE, libc::IPC_CREAT | 0o620) })?;
    send(queue, 3, b"three")?;
    send(queue, 1, b"")?;
    send(queue, 3, &sys::bytes(5, 99))?;

    let waiter = ctl.child("waiter", |ctl| {
        ctl.announce("ready.waiter", b"")?;
        semop(set, 2, -1)?;
        ensure(get(gone, PAGE) == 13, "the removed segment in a child")?;
        put(at, 0, 21);
        Ok(())
    })?;
    let receiver = ctl.child("receiver", |ctl| {
        ctl.announce("ready.receiver", b"")?;
        same("what the receiver got", receive(other, 0, 0)?, (9, b"late".to_vec()))
    })?;
    for name in ["waiter", "receiver"] {
        ctl.await_ready(name)?;
    }
    pause(Duration::from_millis(30));
    let before = status(big)?;

    if ctl.wait()? {
        put(at, SIZE - PAGE, 0);
    }

    let after = status(big)?;
    let owner = |one: &libc::shmid_ds| (one.shm_perm.uid, one.shm_perm.mode, one.shm_perm.__key, one.shm_nattch);
    same("the segment", owner(&after), owner(&before))?;
    same("what is in it", [get(at, 0), get(reader, SIZE - PAGE), get(reader, PAGE)], [11, 12, 0])?;
    put(at, PAGE * 5, 15);
    same("the part", get(part, PAGE * 5), 15)?;
    same("the removed one", get(gone, PAGE), 13)?;
    ensure(status(removed)?.shm_perm.mode as u32 & 0o1000 != 0, "the removed segment is not removed")?;
    // SAFETY: integer arguments.
    same("the key", cvt(unsafe { libc::shmget(0x77, 0, 0) })?, alone)?;
    let attached = attach(alone, 0)?;
    same("the one that nobody had", get(attached, 8), 14)?;

    same("semaphores", [value(set, 0)?, value(set, 1)?, value(set, 2)?], [0, 7, 0])?;
    semop(set, 2, 1)?;
    waiter.join()?;
    same("what the waiter wrote", get(reader, 0), 21)?;

    send(other, 9, b"late")?;
    receiver.join()?;
    same("first of its type", receive(queue, 1, libc::IPC_NOWAIT)?, (1, Vec::new()))?;
    same("first of all", receive(queue, 0, libc::IPC_NOWAIT)?, (3, b"three".to_vec()))?;
    same("last", receive(queue, 0, libc::IPC_NOWAIT)?, (3, sys::bytes(5, 99)))?;
    let end = receive(queue, 0, libc::IPC_NOWAIT);
    ensure(end.is_err(), "one message too many")?;
    let limit = std::fs::read_to_string("/proc/sys/kernel/msgmnb")?;
    if limit.trim() == "20000" { Ok(()) } else { Err(changed(format!("kernel.msgmnb is {limit}"))) }
}
