//! The workloads, one behaviour a file, named for it.

use std::path::Path;
use std::process::ExitCode;

use crate::ctl::{Ctl, Fail, Outcome};

/// One behaviour.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// Its name.
    pub name: &'static str,
    /// What it is about.
    pub about: &'static str,
    /// Takes minutes or gigabytes: runs in one flavour and one variant only.
    pub heavy: bool,
    /// Whether `/proc` of its tree holds still while it waits.
    pub steady: bool,
    /// Whether it may run in namespaces of its own.
    pub anywhere: bool,
    /// Only for the fault tests.
    pub apart: bool,
    /// Needs somebody outside, whom its own test starts.
    pub guest: bool,
    /// Flags that a dump of it needs.
    pub flags: &'static [&'static str],
    run: fn(&Ctl) -> Outcome,
}

/// Declares the modules and the table of workloads: `name: "about" [, heavy] [, unsteady] [, host] [, apart] [, guest] [, flags("--x")]`.
macro_rules! workloads {
    ($($name:ident: $about:literal $(, $mark:ident $(($($flag:literal),*))?)*;)*) => {
        $(pub mod $name;)*

        /// Every workload.
        pub const ALL: &[Workload] = &[$({
            #[allow(unused_mut)]
            let mut workload = Workload {
                name: stringify!($name),
                about: $about,
                heavy: false,
                steady: true,
                anywhere: true,
                apart: false,
                guest: false,
                flags: &[],
                run: $name::run,
            };
            $(workloads!(@mark workload $mark $(($($flag),*))?);)*
            workload
        }),*];
    };
    (@mark $workload:ident heavy) => { $workload.heavy = true };
    (@mark $workload:ident unsteady) => { $workload.steady = false };
    (@mark $workload:ident apart) => { $workload.apart = true };
    (@mark $workload:ident guest) => { ($workload.apart, $workload.guest) = (true, true) };
    (@mark $workload:ident flags ($($flag:literal),*)) => { $workload.flags = &[$($flag),*] };
    (@mark $workload:ident host) => { $workload.anywhere = false };
}

workloads! {
    mem_private: "private memory of every protection, with holes";
    mem_zero: "pages that read as zero, touched and untouched";
    mem_shared: "shared anonymous memory between parent, child and two places of one task";
    mem_file_private: "a file mapped privately with some pages changed";
    mem_file_shared: "a file mapped shared, seen by file and by mapping";
    mem_thp: "transparent huge pages stay huge";
    mem_file_limit: "memory of a process that may write small files only";
    mem_full_table: "memory of a process that can open nothing more";
    mem_no_fork: "a process that may not fork";
    mem_madvise: "settings made by madvise";
    mem_guards: "guard regions in mappings of every kind";
    mem_sealed: "sealed memory";
    mem_droppable: "memory that the kernel may drop";
    mem_hugetlb: "hugetlb pages, private and shared, with a child";
    mem_locked: "locked memory: at once, on fault, without access, and all that is to come";
    sysv_shm: "System V shared memory, in parts, removed, and in a child";
    mem_zero_device: "/dev/zero and files mapped without reserve";
    mem_stack: "a deep stack, held while frozen and unwound after";
    mem_growsdown: "a mapping that grows downwards";
    mem_heap: "the brk heap, grown and shrunk afterwards";
    mem_sparse: "ten pages in a reserve of one TiB";
    mem_cow_children: "copy-on-write memory still shared by parent and children";
    mem_cow_orphans: "copy-on-write memory still shared by siblings whose parent is dead";
    mem_vdso: "time through the vdso at its old address";
    mem_many_maps: "60,000 mappings", heavy;
    mem_2gib: "2 GiB of memory", heavy;
    threads: "threads with names, masks, thread-local values and joins";
    threads_registers: "register contents up to AVX-512, held in a loop";
    threads_rseq_robust: "robust list, rseq area and clear_child_tid";
    threads_futex: "a thread that waits on a futex without end";
    futex_waiters: "waits on futexes: plain, bitset, several words, shared memory";
    futex_locks: "locks with priority inheritance, owners and waiters";
    futex_robust: "robust locks whose owners end afterwards, and the word cleared at the end of a thread";
    threads_dead_leader: "a process whose first thread has ended";
    threads_credentials: "threads with credentials of their own";
    threads_scheduling: "threads under every scheduling policy";
    threads_1000: "1,000 threads", heavy;
    sig_handlers: "handlers with masks, flags and ignored signals";
    sig_pending: "blocked, pending and queued signals with their values";
    sig_altstack: "a handler at work on an alternate stack";
    sig_traps: "SIGTRAP and its kin: ignored, handled, pending";
    timers_posix: "POSIX timers of every kind, pending ones too";
    timers_interval: "interval timers, one with its signal pending";
    prctl_state: "what prctl sets for processes and threads";
    sig_stopped: "a child that is stopped";
    sleep_relative: "sleeps with remaining time: nanosleep, poll, futex, select";
    poll_blocked: "tasks in poll without end";
    sleep_absolute: "sleeps until a point in time";
    tree_groups: "process groups and sessions";
    tree_zombies: "children that have ended and are not yet waited for";
    tree_orphans: "orphans under a child subreaper";
    tree_dead_leaders: "sessions and groups whose leaders are gone";
    tree_blocked: "tasks blocked in wait, read and write";
    tree_fork_storm: "processes that fork all the time", unsteady;
    tree_300: "300 children", heavy;
    tree_shared_fs: "processes that share cwd and umask";
    tree_shared_files: "processes that share a descriptor table, and one with a copy of it";
    wait_socket_timeout: "waits on sockets that have a timeout";
    wait_limits: "waits with a time limit, which end by it: epoll_wait, sigtimedwait, semtimedop, io_getevents", unsteady;
    wait_limits_sockets: "waits on sockets that end by their timeout";
    wait_masks: "waits with a signal mask of their own: sigsuspend, ppoll, pselect, epoll_pwait";
    wait_calls: "calls that last: epoll_wait, sigtimedwait, locks, accept, wait, msgrcv", flags("--file-locks");
    fs_identity: "working directory, umask, personality and name";
    fs_chroot: "a root directory of its own", host;
    files_offsets: "offsets of regular files, shared by dup and by fork";
    files_flags: "open flags of regular files";
    files_dirs: "open directories, read half";
    files_numbers: "descriptors at scattered numbers, some close-on-exec";
    ghost_files: "files opened and unlinked: several descriptors, holes, owners, modes, attributes, times";
    ghost_nameless: "O_TMPFILE files, one of which is given a name afterwards";
    ghost_mapped: "unlinked files mapped private and shared, and open at once, in two tasks";
    ghost_exe: "a program whose executable was unlinked";
    ghost_dirs: "removed directories: open, as working directory, with files in them";
    ghost_root: "a root directory that was removed", host;
    ghost_replaced: "unlinked files whose names are in use again";
    ghost_linked: "files unlinked under one name that have others", flags("--link-remap");
    files_named: "O_PATH: files, symbolic links, sockets, fifos and devices";
    files_owner: "owners of files who are other users";
    files_namespaces: "namespaces held open by descriptors";
    fifo_unlinked: "unlinked fifos in every mode, with data";
    files_proc: "files below /proc: of the task, of others, of dead ones";
    locks_all: "POSIX locks, locks of descriptions, flock", flags("--file-locks");
    locks_leases: "leases", flags("--file-locks");
    pipe_data: "pipes with data read half";
    pipe_ends: "pipes with closed ends and ends in many tasks";
    pipe_full: "a full pipe and its size";
    pipe_packets: "packet mode";
    pipe_flags: "flags and owner of pipe ends";
    fifo_named: "named fifos with data";
    eventfd: "eventfds: counters, semaphore, shared";
    epoll_basic: "epoll sets with data, edge-triggered, one-shot and exclusive entries";
    epoll_nested: "epoll in epoll";
    epoll_dup: "epoll entries whose number was closed or taken again";
    epoll_exclusive: "a write that wakes one of three tasks (EPOLLEXCLUSIVE)";
    timerfd: "timerfds of all clocks: armed, expired, interval, unarmed";
    timerfd_cancel: "timers that are cancelled when the clock is set", heavy;
    signalfd: "signalfds with pending signals";
    signalfd_adder: "a signalfd that a child has put into its parent's epoll set";
    inotify: "watches on directories, files, links and renamed files, with their numbers; no event of restore's own";
    inotify_events: "events in the queue: all of them, or one that says that some were lost";
    ns_cgroup: "a cgroup namespace";
    bpf_map: "BPF maps with their entries";
    inotify_many: "10,000 watches", heavy;
    fanotify: "marks on a file, a directory with its children, and a file system", host;
    mqueue: "message queues with a name, by several descriptions, with messages", host;
    memfd: "memory files: holes, positions, several descriptions, seals, modes";
    memfd_mapped: "memory files that several tasks map, open or not; private mappings; sealed ones";
    memfd_hugetlb: "memory files of hugetlb pages, open and mapped";
    pidfd: "descriptors of tasks that run, have ended, and are gone";
    devices: "memory devices";
    unix_pair: "connected unix sockets, credentials and a pipe's end in flight";
    tcp_listen: "TCP sockets that are not connected: listening, in groups, bound, unbound, ended";
    tcp_connected: "TCP connections: megabytes in their queues, half closed, IPv4, IPv6, mapped", flags("--tcp-established");
    tcp_states: "TCP connections in LAST_ACK, CLOSING, SYN_SENT", flags("--tcp-established");
    tcp_server: "an echo server whose clients are outside the tree", guest;
    net_server: "an echo server in a net namespace that its test connects with its own", guest;
    tcp_ended: "connections that end with the dump, and a listener", guest;
    aio: "rings of asynchronous I/O with finished requests";
    net_namespace: "a net namespace: devices, addresses, routes, rules, neighbours, settings";
    net_tun: "tun and tap devices with their descriptors";
    net_rules: "rules of nf_tables, and a tracked connection", flags("--tcp-established");
    netlink: "netlink sockets with ports, groups and options";
    raw_sockets: "raw sockets and echo requests";
    packet_sockets: "packet sockets with memberships, options and interfaces";
    udp_sockets: "UDP sockets with queues, senders, options, peers and memberships";
    unix_server: "a server with listeners of every kind and three clients";
    unix_datagrams: "datagrams with their senders, connected sockets, peers that are gone";
    unix_names: "names that are relative, removed, taken, moved or chosen by the kernel";
    unix_flight: "sockets in flight: nested, and in each other's queues";
    unix_states: "half-closed and closed connections, options, filters";
    unix_waiting: "connections that are not accepted yet";
    unix_waiting_data: "connections that are not accepted yet, with data";
    unix_dead_creator: "sockets whose creator has ended";
    unix_outside: "peers outside the tree", guest;
    pty_shell: "a shell that leads a session, with a background job and /dev/tty";
    pty_data: "terminals with data in both directions, a half-typed line among them";
    pty_settings: "termios, window size, packet mode, locks and owners of terminals";
    pty_flow: "terminals whose output is stopped, by character and by call";
    pty_sessions: "sessions on terminals of their own, without descriptors of them, and their foreground groups";
    pty_hangup: "terminals that have hung up";
    pty_instance: "a devpts of the tree's own";
    seccomp_strict: "a filter that allows hardly anything";
    seccomp_threads: "filters of single threads, and their synchronisation";
    ns_tree: "a tree in fresh user, mount and pid namespaces", host;
    ipc_sysv: "an IPC namespace: segments, semaphores and message queues with their users";
    ns_names: "host and domain name of a UTS namespace";
    ns_clocks: "clocks of a time namespace";
    ns_mounts: "proc, tmpfs with content and bind mounts";
    mnt_tmpfs: "tmpfs with every kind of file, limits, a part of one";
    mnt_groups: "propagation: shared, slave, both, unbindable; bind mounts of what was removed; overmounts";
    mnt_flags: "per-mount flags; files on all of them";
    mnt_kinds: "overlay, mqueue, sysfs, devpts, hugetlbfs, binfmt_misc and others";
    mnt_pivot: "a root of its own by pivot_root, with a chroot inside";
    mnt_nested: "several mount namespaces in one tree";
    mnt_root: "a tmpfs as root, without proc";
    fds_mixed: "15,000 descriptors of mixed kinds", heavy;
    mixture: "many behaviours in one tree";
    stress: "a random mixture in fifty tasks", apart;
    limits_other_user: "resource limits of a process of another user";
    tcp_many: "10,000 connections from clients outside", guest;
    refused_keyring: "a process with a keyring of its own", apart;
    refused_memory: "a process that shares its parent's memory", apart;
    refused_thread: "a thread with a descriptor table of its own", apart;
    refused_dispatch: "a thread with syscall user dispatch", apart;
    refused: "descriptors that nobody can keep", apart;
    unclaimed: "descriptors that only the tests' plugin claims", apart;
    external_counter: "an event counter that two plugins claim", apart;
    external_frames: "a tun device and a mapped ring of packets, for a plugin from outside", apart, host;
    external_redis: "connections to a redis server outside, for a plugin from outside", guest;
    external_file: "a file below /run that only the plugin of `stasis plugins new` brings along", apart, host, heavy;
}

/// The workload of a name.
pub fn find(name: &str) -> Option<&'static Workload> {
    ALL.iter().find(|workload| workload.name == name)
}

/// Sets the workload up, waits, checks, and leaves the verdict in `DIR/result`.
pub fn run(name: &str, dir: &Path) -> ExitCode {
    let Some(workload) = find(name) else {
        eprintln!("no workload is called {name}");
        return ExitCode::from(2);
    };
    let ctl = Ctl::new(dir);
    let verdict = match (workload.run)(&ctl) {
        Ok(()) => "PASS".to_owned(),
        Err(Fail::Absent(why)) => format!("SKIP: {why}"),
        Err(fail) => format!("FAIL: {fail}"),
    };
    // A workload that changed its root sees its directory elsewhere.
    let written = ctl
        .announce("result", verdict.as_bytes())
        .or_else(|_| Ctl::new(Path::new("/")).announce("result", verdict.as_bytes()));
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: cannot write the verdict: {error}; it was: {verdict}");
            ExitCode::FAILURE
        }
    }
}
