//! The guardian on real processes: seize, collect, inspect, write, snapshot, and every way to end.
#[path = "guardian_support/mod.rs"]
mod support;

use stasis::guardian::{
    Guardian, WriteJob,
    protocol::{Outcome, PageRange},
};
use std::{
    fs,
    os::{fd::AsFd, unix::fs::FileExt},
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use support::*;

const TIME: Duration = Duration::from_secs(20);

#[test]
fn sleep_keeps_its_total_time_over_many_stops() {
    let started = Instant::now();
    let mut child = Command::new("sleep").arg("3").spawn().unwrap();
    let pid = child.id() as i32;
    wait_for(|| maps(pid).contains("libc") && state(pid) == 'S');
    let before = maps(pid);
    for _ in 0..20 {
        let mut guardian = Guardian::spawn().unwrap();
        let tasks = guardian.seize(pid, TIME, None).unwrap();
        assert_eq!(tasks.iter().map(|task| task.pid).collect::<Vec<_>>(), [pid]);
        let collected = guardian.collect().unwrap();
        let restart = collected[0].threads[0].restart.expect("sleeping with a relative timeout");
        assert_eq!(restart.syscall, libc::SYS_clock_nanosleep as u64);
        let left = Duration::from_secs(3).saturating_sub(started.elapsed());
        if let Some(remaining) = restart.remaining_ns {
            let difference = remaining - left.as_nanos() as i64;
            assert!(difference.abs() < 500_000_000, "{remaining} ns remain, expected about {left:?}");
        }
        let states = guardian.inspect(&[pid]).unwrap();
        assert_eq!(states[0].actions.len(), 64);
        assert_ne!(states[0].brk, 0);
        guardian.finish(Outcome::Run).unwrap();
        assert_eq!(maps(pid), before);
    }
    assert!(child.wait().unwrap().success());
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(2990), "woke too early: {took:?}");
    assert!(took < Duration::from_secs(6), "slept on too long: {took:?}");
}

#[test]
fn remaining_sleeps_of_many_are_told_apart() {
    let script = "for n in 1 2 3 4 5 6 7 8 9; do sleep ${n}000 & done; echo ready; wait";
    let mut shell = Killed(Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap());
    ready(&mut shell.0);
    let sleeping = |pid: &str| pid.parse().is_ok_and(|pid| state(pid) == 'S' && maps(pid).contains("sleep"));
    wait_for(|| children(shell.pid()).split_ascii_whitespace().filter(|pid| sleeping(pid)).count() == 9);
    let mut guardian = Guardian::spawn().unwrap();
    guardian.seize(shell.pid(), TIME, None).unwrap();
    for _ in 0..2 {
        let collected = guardian.collect().unwrap();
        let threads = collected.iter().flat_map(|task| &task.threads);
        let restarts: Vec<_> = threads.filter_map(|thread| thread.restart).collect();
        let mut found: Vec<i64> =
            restarts.iter().map(|restart| restart.remaining_ns.expect("found") / 1_000_000_000).collect();
        found.sort();
        let expected: Vec<i64> = (1..=9).map(|n| n * 1000).collect();
        assert_eq!(found.len(), 9);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((expected - 60..=*expected).contains(found), "{found} of {expected} seconds remain");
        }
    }
    guardian.finish(Outcome::Kill).unwrap();
}

#[test]
fn a_busy_computation_gives_the_same_result() {
    let program =
        "import math\ns=0.0\nfor i in range(1,3000001): s+=math.sin(i)*math.sqrt(i)\nprint(repr(s))";
    let expected = Command::new("python3").args(["-c", program]).output().unwrap().stdout;
    let child = Command::new("python3").args(["-c", program]).stdout(Stdio::piped()).spawn().unwrap();
    let pid = child.id() as i32;
    let mut times = 0;
    while times < 60 {
        let mut guardian = Guardian::spawn().unwrap();
        let step = guardian.seize(pid, TIME, None).and_then(|_| {
            guardian.collect()?;
            guardian.inspect(&[pid])?;
            guardian.finish(Outcome::Run)
        });
        if step.is_err() {
            break;
        }
        times += 1;
    }
    assert!(times > 3, "the program ended too early to be a test");
    assert_eq!(child.wait_with_output().unwrap().stdout, expected);
}

#[test]
fn a_thousand_threads() {
    let mut program = Killed(python(
        "import threading,time\nthreading.stack_size(65536)\nfor _ in range(1000): threading.Thread(target=time.sleep,args=(1000,),daemon=True).start()\nprint('ready',flush=True)\ntime.sleep(1000)",
    ));
    ready(&mut program.0);
    let pid = program.pid();
    let before = maps(pid);
    let mut guardian = Guardian::spawn().unwrap();
    let start = Instant::now();
    let tasks = guardian.seize(pid, TIME, None).unwrap();
    let seized = start.elapsed();
    assert_eq!(tasks[0].tids.len(), 1001);
    let collected = guardian.collect().unwrap();
    let collected_at = start.elapsed();
    assert_eq!(collected[0].threads.len(), 1001);
    let states = guardian.inspect(&[pid]).unwrap();
    let inspected = start.elapsed();
    assert_eq!(states[0].threads.len(), 1001);
    let addresses: std::collections::BTreeSet<u64> =
        states[0].threads.iter().map(|thread| thread.clear_child_tid).collect();
    assert_eq!(addresses.len(), 1001, "every thread has its own");
    guardian.finish(Outcome::Run).unwrap();
    println!(
        "1,001 threads: seize {seized:?}, collect {:?}, inspect {:?}, finish {:?}",
        collected_at - seized,
        inspected - collected_at,
        start.elapsed() - inspected
    );
    assert_eq!(maps(pid), before);
    assert_eq!(fs::read_dir(format!("/proc/{pid}/task")).unwrap().count(), 1001);
}

#[test]
fn three_hundred_processes() {
    let mut program = Killed(python(
        "import os,time\nfor _ in range(300):\n if not os.fork():\n  time.sleep(1000)\nprint('ready',flush=True)\ntime.sleep(1000)",
    ));
    ready(&mut program.0);
    let mut guardian = Guardian::spawn().unwrap();
    let start = Instant::now();
    let tasks = guardian.seize(program.pid(), TIME, None).unwrap();
    let seized = start.elapsed();
    assert_eq!(tasks.len(), 301);
    guardian.collect().unwrap();
    let collected = start.elapsed();
    let pids: Vec<i32> = tasks.iter().map(|task| task.pid).collect();
    assert_eq!(guardian.inspect(&pids).unwrap().len(), 301);
    let inspected = start.elapsed();
    let copies = guardian.snapshot(&pids).unwrap();
    assert_eq!(copies.len(), 301);
    guardian.reap_snapshots().unwrap();
    let copied = start.elapsed();
    guardian.finish(Outcome::Kill).unwrap();
    println!(
        "301 processes: seize {seized:?}, collect {:?}, inspect {:?}, snapshot and reap {:?}, kill {:?}",
        collected - seized,
        inspected - collected,
        copied - inspected,
        start.elapsed() - copied
    );
    for pid in pids {
        assert!(is_gone(pid), "{pid} is still there");
    }
}

#[test]
fn one_process() {
    let mut program = Killed(python("import time\nprint('r',flush=True)\ntime.sleep(1000)"));
    ready(&mut program.0);
    let pid = program.pid();
    for round in 0..3 {
        let mut guardian = Guardian::spawn().unwrap();
        let start = Instant::now();
        guardian.seize(pid, TIME, None).unwrap();
        let seized = start.elapsed();
        guardian.collect().unwrap();
        let collected = start.elapsed();
        guardian.inspect(&[pid]).unwrap();
        let inspected = start.elapsed();
        guardian.finish(Outcome::Run).unwrap();
        println!(
            "1 process, round {round}: seize {seized:?}, collect {:?}, inspect {:?}, finish {:?}",
            collected - seized,
            inspected - collected,
            start.elapsed() - inspected
        );
    }
}

#[test]
fn a_snapshot_stays_while_the_original_changes() {
    let mut program = Killed(python(
        "import mmap,sys,ctypes\nm=mmap.mmap(-1,64*4096,flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS)\nm[0:4096]=b'a'*4096\nm[8192:8195]=b'xyz'\nprint(ctypes.addressof(ctypes.c_char.from_buffer(m)),flush=True)\nsys.stdin.readline()\nm[0:4096]=b'b'*4096\nprint('changed',flush=True)\nsys.stdin.readline()\nprint('done',flush=True)",
    ));
    let address: u64 = read_line(&mut program.0).trim().parse().unwrap();
    let pid = program.pid();
    let (before, descriptors) = (maps(pid), descriptors(pid));
    let mut guardian = Guardian::spawn().unwrap();
    guardian.seize(pid, TIME, None).unwrap();
    let copies = guardian.snapshot(&[pid]).unwrap();
    guardian.resume_originals().unwrap();
    assert_eq!(maps(pid), before);
    write_line(&mut program.0);
    assert_eq!(read_line(&mut program.0), "changed\n");
    let copy = copies[0].1;
    assert_eq!(fs::read_dir(format!("/proc/{copy}/fd")).unwrap().count(), 0, "the copy holds no descriptor");
    let shard = tempfile::tempfile().unwrap();
    let ranges = vec![PageRange { address, len: 16 * 4096, raw: false }];
    let jobs = [WriteJob { pid: copy, shard: shard.as_fd(), offset: 4096, ranges }];
    let written = guardian.write_pages(&jobs).unwrap();
    assert_eq!(written[0].error, None);
    assert_eq!(written[0].bytes, 16 * 4096, "every page has its place; zero pages leave holes");
    assert_eq!(written[0].zeros, [(address + 4096, 4096), (address + 3 * 4096, 13 * 4096)]);
    assert_eq!(written[0].stopped_at, (1, 0));
    let mut page = [0u8; 4096];
    shard.read_exact_at(&mut page, 4096).unwrap();
    assert!(page.iter().all(|&byte| byte == b'a'), "the copy has the old contents");
    shard.read_exact_at(&mut page, 4096 + 2 * 4096).unwrap();
    assert_eq!(&page[..4], b"xyz\0");
    shard.read_exact_at(&mut page, 8192).unwrap();
    assert_eq!(page, [0u8; 4096]);
    guardian.reap_snapshots().unwrap();
    assert!(is_gone(copy));
    guardian.finish(Outcome::Run).unwrap();
    assert_eq!(children(pid), "");
    assert_eq!((maps(pid), support::descriptors(pid)), (before, descriptors));
    write_line(&mut program.0);
    assert_eq!(read_line(&mut program.0), "done\n");
}

#[test]
fn pages_of_a_stopped_task_are_written_and_nothing_stays() {
    let mut program = Killed(python(
        "import mmap,sys,ctypes\nn=100*1024*1024\nm=mmap.mmap(-1,n,flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS)\nfor i in range(0,n,4096): m[i:i+4]=(i//4096+1).to_bytes(4,'little')\nprint(ctypes.addressof(ctypes.c_char.from_buffer(m)),flush=True)\nsys.stdin.readline()",
    ));
    let address: u64 = read_line(&mut program.0).trim().parse().unwrap();
    let pid = program.pid();
    let (before, fds) = (maps(pid), descriptors(pid));
    let shard = tempfile::tempfile().unwrap();
    let mut guardian = Guardian::spawn().unwrap();
    guardian.seize(pid, TIME, None).unwrap();
    let half = 50 << 20;
    let ranges = vec![
        PageRange { address, len: half, raw: true },
        PageRange { address: address + half, len: half, raw: false },
    ];
    let written = guardian.write_pages(&[WriteJob { pid, shard: shard.as_fd(), offset: 0, ranges }]).unwrap();
    assert_eq!(
        (written[0].error.clone(), written[0].bytes, written[0].stopped_at),
        (None, 100 << 20, (2, 0))
    );
    guardian.finish(Outcome::Run).unwrap();
    for page in [0u64, 1, 12_800, 25_599] {
        let mut word = [0u8; 4];
        shard.read_exact_at(&mut word, page * 4096).unwrap();
        assert_eq!(u64::from(u32::from_le_bytes(word)), page + 1);
    }
    assert_eq!((maps(pid), descriptors(pid)), (before, fds));
}

#[test]
fn an_unreadable_page_ends_a_write_and_not_the_task() {
    let mut program = Killed(python(
        "import mmap,sys,ctypes\nm=mmap.mmap(-1,8*4096,flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS)\nm[0:32768]=b'z'*32768\na=ctypes.addressof(ctypes.c_char.from_buffer(m))\nctypes.CDLL(None).mprotect(ctypes.c_void_p(a+16384),4096,0)\nprint(a,flush=True)\nsys.stdin.readline()\nprint('alive',flush=True)",
    ));
    let address: u64 = read_line(&mut program.0).trim().parse().unwrap();
    let pid = program.pid();
    for raw in [false, true] {
        let shard = tempfile::tempfile().unwrap();
        let mut guardian = Guardian::spawn().unwrap();
        guardian.seize(pid, TIME, None).unwrap();
        let ranges = vec![
            PageRange { address, len: 4 * 4096, raw },
            PageRange { address: address + 16384, len: 16384, raw },
        ];
        let written =
            guardian.write_pages(&[WriteJob { pid, shard: shard.as_fd(), offset: 0, ranges }]).unwrap();
        assert!(written[0].error.is_some());
        assert!(written[0].stopped_at.0 <= 1 && written[0].bytes <= 4 * 4096);
        guardian.finish(Outcome::Run).unwrap();
    }
    write_line(&mut program.0);
    assert_eq!(read_line(&mut program.0), "alive\n");
}
