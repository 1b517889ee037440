//! A tracer as small as can be: waits until every thread has arrived, looks, and lets the task check itself.

use super::image::{Builder, CODE, EXPECTED, PAGE};
use stasis::restore::blob::proto::{ARRIVED, Status};
use stasis::restore::blob::{RestorerCall, RestorerFailure, RestorerOptions};
use stasis::restore::{
    memory::{MemoryPlan, PageFiles, Parent, Records, TaskMemory},
    paths::Paths,
};
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};
use std::{io, ptr};

/// What is seen of a restored task.
pub struct Restored {
    pub pid: i32,
    pub map: usize,
    pub exit: Option<i32>,
    pub failure: Option<String>,
    pub maps: String,
    pub smaps: String,
    pub status: String,
    pub names: Vec<String>,
    pub steps: Vec<(&'static str, Duration)>,
}

impl Restored {
    pub fn smaps_sum(&self, field: &str) -> u64 {
        let lines = self.smaps.lines().filter_map(|line| line.strip_prefix(field));
        lines.filter_map(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()).sum()
    }
}

/// rdi, rsi: blob to unmap; r12, r13: expectations. Exits with 0, or with 1 when a word is wrong.
#[unsafe(naked)]
unsafe extern "C" fn check() -> ! {
    core::arch::naked_asm!(
        "mov eax, 11",
        "syscall",
        "mov edi, 2",
        "test rax, rax",
        "jnz 5f",
        "2:",
        "test r13, r13",
        "jz 4f",
        "mov rax, [r12]",
        "mov rax, [rax]",
        "cmp rax, [r12+8]",
        "jne 3f",
        "add r12, 16",
        "dec r13",
        "jmp 2b",
        "3:",
        "mov edi, 1",
        "jmp 5f",
        "4:",
        "xor edi, edi",
        "5:",
        "mov eax, 231",
        "syscall",
        "ud2",
    )
}
const CHECK_SIZE: usize = 128;

/// In shared memory: what the tasks tell.
#[repr(C)]
struct Shared {
    status: [Status; 512],
    region: [[u64; 2]; 512],
    times: [u64; 8],
}

fn clone_with(pid: i32) -> i64 {
    let pids = [pid];
    let arguments: [u64; 11] = [0, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0, pids.as_ptr() as u64, 1, 0];
    // SAFETY: a fork with a chosen pid.
    unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments)) }
}

struct World<'a> {
    image: &'a Builder,
    pages: &'a PageFiles,
    exe: i32,
    shared: *mut Shared,
    start: Instant,
}

/// A restored task's life before the restorer.
fn live(world: &World<'_>, mut memory: TaskMemory<'_>, index: usize) -> io::Result<std::convert::Infallible> {
    let pid = world.image.tasks[index].pid;
    let time = |slot: usize| {
        if index == 0 {
            // SAFETY: shared memory of this test.
            unsafe { (*world.shared).times[slot] = world.start.elapsed().as_nanos() as u64 };
        }
    };
    time(0);
    memory.before_forks(world.pages, &mut Paths::default()).map_err(io::Error::other)?;
    for (child, (child_pid, parent)) in world.image.tree.iter().enumerate() {
        if *parent == Some(pid) {
            match clone_with(*child_pid) {
                0 => return live(world, memory.into_child(*child_pid).map_err(io::Error::other)?, child),
                made if made < 0 => return Err(io::Error::last_os_error()),
                _ => {}
            }
        }
    }
    memory.after_forks().map_err(io::Error::other)?;
    time(1);
    memory.fill(world.pages, &mut Paths::default()).map_err(io::Error::other)?;
    time(2);
    // SAFETY: shared memory of this test.
    let status = unsafe { &raw const (*world.shared).status[index] };
    let options =
        RestorerOptions { exe: world.exe, close: vec![world.exe], status, late_death_signals: false };
    let moves = memory.finish();
    let call = RestorerCall::new(&moves, &world.image.tasks[index], &options).map_err(io::Error::other)?;
    // SAFETY: as above.
    unsafe { (*world.shared).region[index] = [call.region().start, call.region().end - call.region().start] };
    time(3);
    call.enter()
}

fn occupied() -> Vec<std::ops::Range<u64>> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let range = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
    };
    maps.lines().filter_map(range).filter(|range| range.start < 1 << 47).collect()
}

fn ptrace(request: u32, pid: i32, address: u64, data: u64) -> i64 {
    // SAFETY: requests of this file touch the tracee and, for registers, a struct of ours.
    unsafe { libc::ptrace(request, pid, address, data) }
}

fn registers_of(pid: i32) -> libc::user_regs_struct {
    // SAFETY: integers alone.
    let mut registers = unsafe { std::mem::zeroed() };
    ptrace(libc::PTRACE_GETREGS, pid, 0, &raw mut registers as u64);
    registers
}

pub fn restore(image: &Builder) -> Vec<Restored> {
    // SAFETY: reads the code of a function of ours.
    let code = unsafe { std::slice::from_raw_parts(check as *const u8, CHECK_SIZE) };
    let (maps, pages, page_file) = image.finish(code);
    let tree: Vec<_> = image
        .tree
        .iter()
        .zip(&image.tasks)
        .map(|(&(pid, parent), task)| Parent { pid, parent, map: Some(task.mm) })
        .collect();
    let start = Instant::now();
    let records =
        Records { maps: &maps, files: &image.files, segments: &image.segments, pages: &pages, tree: &tree };
    let plan = MemoryPlan::new(records, &occupied()).unwrap();
    let planned = start.elapsed();
    let pages = PageFiles::new(vec![page_file]).unwrap();
    let exe = File::open("/proc/self/exe").unwrap();
    // SAFETY: a new shared mapping.
    let shared = unsafe {
        libc::mmap(ptr::null_mut(), size_of::<Shared>(), 3, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0)
    } as *mut Shared;
    // Descendants come to us when their parents end, so that their pids are free at once.
    // SAFETY: sets a flag of this process.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    let mut gate = [0; 2];
    // SAFETY: writes two descriptors.
    assert_eq!(unsafe { libc::pipe2(gate.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    let start = Instant::now();
    let world = World { image, pages: &pages, exe: exe.as_raw_fd(), shared, start };
    let root = image.tasks[0].pid;
    match clone_with(root) {
        0 => {
            let mut byte = 0_u8;
            // SAFETY: waits until the tracer is there; leaves without running the test's destructors.
            unsafe {
                libc::close(gate[1]);
                libc::read(gate[0], (&raw mut byte).cast(), 1);
            }
            let memory = TaskMemory::root(&plan, root).unwrap();
            let error = live(&world, memory, 0).map(|never| match never {}).unwrap_err();
            eprintln!("{error}");
            // SAFETY: ends this process.
            unsafe { libc::_exit(99) }
        }
        made => assert!(made > 0, "{}", io::Error::last_os_error()),
    }
    let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACECLONE;
    assert_eq!(ptrace(libc::PTRACE_SEIZE, root, 0, options as u64), 0);
    // SAFETY: lets the root task go.
    unsafe {
        libc::close(gate[1]);
        libc::close(gate[0]);
    }
    let seen = wait_for_all(&world, start);
    let mut restored = seen;
    restored[0].steps.insert(0, ("plan", planned));
    // SAFETY: the mapping made above.
    unsafe { libc::munmap(shared.cast(), size_of::<Shared>()) };
    restored
}

fn wait_for_all(world: &World<'_>, start: Instant) -> Vec<Restored> {
    let tasks = &world.image.tasks;
    let mut arrived: HashMap<i32, i32> = HashMap::new();
    let mut exits: HashMap<i32, i32> = HashMap::new();
    let wanted: usize = tasks.iter().map(|task| task.threads.len()).sum();
    let next = |arrived: &mut HashMap<i32, i32>, exits: &mut HashMap<i32, i32>| -> bool {
        let mut status = 0;
        // SAFETY: waits for any child.
        let pid = unsafe { libc::waitpid(-1, &mut status, libc::__WALL) };
        if pid < 0 {
            return false;
        }
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            exits.insert(
                pid,
                if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -libc::WTERMSIG(status) },
            );
        } else if libc::WIFSTOPPED(status) {
            let registers = registers_of(pid);
            if status >> 8 == libc::SIGTRAP && registers.rax == ARRIVED {
                arrived.insert(pid, status);
            } else {
                let event = status >> 16 != 0;
                let signal = if event { 0 } else { libc::WSTOPSIG(status) };
                if signal != 0 {
                    eprintln!("{pid} stopped by signal {signal} at {:#x}", registers.rip);
                }
                ptrace(libc::PTRACE_CONT, pid, 0, signal as u64);
            }
        }
        true
    };
    while arrived.len() < wanted && exits.is_empty() {
        assert!(next(&mut arrived, &mut exits));
    }
    let all_there = start.elapsed();
    let mut restored: Vec<_> = tasks.iter().enumerate().map(|(index, _)| look(world, index)).collect();
    for (index, task) in tasks.iter().enumerate().filter(|(_, task)| arrived.contains_key(&task.pid)) {
        let mut registers = registers_of(task.pid);
        // SAFETY: shared memory of this test.
        let [from, len] = unsafe { (*world.shared).region[index] };
        registers.rip = CODE;
        registers.rdi = from;
        registers.rsi = len;
        registers.r12 = EXPECTED;
        registers.r13 = world.image.expectations(index);
        registers.orig_rax = u64::MAX;
        ptrace(libc::PTRACE_SETREGS, task.pid, 0, &raw const registers as u64);
        // The other threads stay where they are and die with the leader.
        ptrace(libc::PTRACE_CONT, task.pid, 0, 0);
    }
    while next(&mut arrived, &mut exits) {}
    for (index, task) in restored.iter_mut().enumerate() {
        task.exit = exits.get(&task.pid).copied();
        // SAFETY: shared memory of this test.
        let status = unsafe { &(*world.shared).status[index] };
        task.failure = RestorerFailure::of(status).map(|failure| failure.to_string());
    }
    // SAFETY: as above.
    let times = unsafe { (*world.shared).times };
    let at = |slot: usize| Duration::from_nanos(times[slot]);
    restored[0].steps = vec![
        ("before the forks", at(0)),
        ("forks", at(1).saturating_sub(at(0))),
        ("fill", at(2).saturating_sub(at(1))),
        ("blob", at(3).saturating_sub(at(2))),
        ("restorer", all_there.saturating_sub(at(3))),
        ("all there", all_there),
    ];
    restored
}

fn look(world: &World<'_>, index: usize) -> Restored {
    let task = &world.image.tasks[index];
    let read = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", task.pid)).unwrap_or_default();
    let large = world.image.tasks.len() > 10 || world.image.maps[index].vmas.len() > 5000;
    let names = (!large).then(|| fs::read_dir(format!("/proc/{}/task", task.pid)).ok()).flatten();
    let names = names
        .into_iter()
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect();
    Restored {
        pid: task.pid,
        map: task.mm as usize,
        exit: None,
        failure: None,
        maps: if large { String::new() } else { read("maps") },
        smaps: if large { String::new() } else { read("smaps") },
        status: read("status"),
        names,
        steps: vec![("page", Duration::from_nanos(PAGE))],
    }
}
