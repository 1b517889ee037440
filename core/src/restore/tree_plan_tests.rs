//! Plans are carried out by a model of the kernel, and must give the tree they were made from.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Debug, Clone)]
struct Process {
    ppid: i32,
    pgid: i32,
    sid: i32,
    dead: bool,
}

/// What a kernel knows of processes: fork, setsid, setpgid, exit with adoption.
#[derive(Debug, Default)]
struct Kernel {
    processes: BTreeMap<i32, Process>,
    adopters: BTreeSet<i32>,
}

impl Kernel {
    fn fork(&mut self, parent: i32, pid: i32) {
        let child = Process { ppid: parent, dead: false, ..self.processes[&parent].clone() };
        assert!(self.processes.insert(pid, child).is_none(), "pid {pid} is taken");
    }

    fn group_exists(&self, pgid: i32, sid: i32) -> bool {
        self.processes.values().any(|p| p.pgid == pgid && p.sid == sid)
    }

    /// Ends a process; its children go to the nearest adopter. `reap`: it leaves no zombie.
    fn exit(&mut self, pid: i32, reap: bool) {
        let mut reaper = self.processes[&pid].ppid;
        while !self.adopters.contains(&reaper) && self.processes.contains_key(&reaper) {
            reaper = self.processes[&reaper].ppid;
        }
        for child in self.processes.values_mut().filter(|p| p.ppid == pid) {
            child.ppid = reaper;
        }
        if reap {
            self.processes.remove(&pid);
        } else if let Some(process) = self.processes.get_mut(&pid) {
            process.dead = true;
        }
    }

    fn tasks(&self) -> Vec<TreeTask> {
        let task = |(&pid, p): (&i32, &Process)| TreeTask {
            pid,
            ppid: if self.processes.contains_key(&p.ppid) { p.ppid } else { 0 },
            pgid: p.pgid,
            sid: p.sid,
            zombie: p.dead,
        };
        self.processes.iter().map(task).collect()
    }
}

/// Carries out a plan from a process 1_000_000 outside.
fn carry_out(plan: &TreePlan, outside: &TreeTask) -> Kernel {
    let mut kernel = Kernel::default();
    let start = Process { ppid: 0, pgid: outside.pgid, sid: outside.sid, dead: false };
    kernel.processes.insert(1_000_000, start);
    let pid =
        |node: usize| if plan.nodes[node].pid == 0 { 2_000_000 + node as i32 } else { plan.nodes[node].pid };
    fn live(plan: &TreePlan, kernel: &mut Kernel, node: usize, pid: &dyn Fn(usize) -> i32) {
        for step in &plan.nodes[node].steps {
            match *step {
                Step::Adopt => drop(kernel.adopters.insert(pid(node))),
                Step::Fork(child) => {
                    kernel.fork(pid(node), pid(child));
                    live(plan, kernel, child, pid);
                }
                Step::NewSession => {
                    assert!(!kernel.processes.values().any(|p| p.pgid == pid(node)), "setsid: EPERM");
                    let me = kernel.processes.get_mut(&pid(node)).unwrap();
                    (me.sid, me.pgid) = (pid(node), pid(node));
                }
                Step::NewGroup => kernel.processes.get_mut(&pid(node)).unwrap().pgid = pid(node),
            }
        }
    }
    kernel.fork(1_000_000, pid(0));
    live(plan, &mut kernel, 0, &pid);
    for late in [false, true] {
        for (number, node) in plan.nodes.iter().enumerate().filter(|(_, node)| node.join_late == late) {
            if let Some(pgid) = node.join {
                let sid = kernel.processes[&pid(number)].sid;
                assert!(kernel.group_exists(pgid, sid), "setpgid({}, {pgid}): EPERM", pid(number));
                kernel.processes.get_mut(&pid(number)).unwrap().pgid = pgid;
            }
        }
    }
    for (number, node) in plan.nodes.iter().enumerate() {
        match node.kind {
            NodeKind::Helper | NodeKind::StandIn => kernel.exit(pid(number), true),
            NodeKind::Zombie(_) => kernel.exit(pid(number), false),
            NodeKind::Task(_) => {}
        }
    }
    kernel.processes.remove(&1_000_000);
    kernel
}

fn check(tasks: &[TreeTask]) -> Result<(), TreeError> {
    let plan = TreePlan::new(tasks, &BTreeSet::new())?;
    let root = tasks.iter().find(|task| task.ppid == 0).unwrap();
    let outside = |id: i32| if tasks.iter().any(|task| task.pid == id) { 999 } else { id };
    let start = TreeTask { sid: outside(root.sid), pgid: outside(root.pgid), ..*root };
    let kernel = carry_out(&plan, &start);
    let mut expected = tasks.to_vec();
    expected.sort_by_key(|task| task.pid);
    assert_eq!(kernel.tasks(), expected, "{plan:#?}");
    Ok(())
}

fn task(pid: i32, ppid: i32, pgid: i32, sid: i32) -> TreeTask {
    TreeTask { pid, ppid, pgid, sid, zombie: false }
}

#[test]
fn a_shell_with_jobs() {
    check(&[task(10, 0, 10, 10), task(11, 10, 11, 10), task(12, 10, 11, 10), task(13, 12, 11, 10)]).unwrap();
}

#[test]
fn a_child_of_the_earlier_session_is_forked_first() {
    let tasks = [task(10, 0, 9, 9), task(11, 10, 11, 11), task(12, 11, 9, 9)];
    check(&tasks).unwrap();
    let plan = TreePlan::new(&tasks, &BTreeSet::new()).unwrap();
    assert_eq!(plan.nodes[1].steps, [Step::Fork(2), Step::NewSession]);
}

#[test]
fn dead_leaders_get_a_helper() {
    // A daemon: its session leader 11 is dead, the init adopted it; 13 is in a group whose leader 14 is dead.
    check(&[task(1, 0, 1, 1), task(12, 1, 11, 11), task(13, 1, 14, 11)]).unwrap();
}

#[test]
fn a_dead_group_leader_of_a_live_session() {
    check(&[task(1, 0, 1, 1), task(12, 1, 11, 1), task(13, 1, 11, 1)]).unwrap();
}

#[test]
fn an_orphan_of_a_live_session() {
    check(&[task(1, 0, 1, 1), task(5, 1, 5, 5), task(6, 1, 5, 5)]).unwrap();
}

#[test]
fn zombies_keep_their_groups() {
    let zombie = TreeTask { zombie: true, ..task(2, 1, 2, 1) };
    check(&[task(1, 0, 1, 1), zombie, task(3, 1, 2, 1)]).unwrap();
}

#[test]
fn a_founder_that_left_its_group() {
    check(&[task(1, 0, 1, 1), task(2, 1, 1, 1), task(3, 1, 2, 1)]).unwrap();
}

#[test]
fn two_roots_are_no_tree() {
    assert_eq!(check(&[task(1, 0, 1, 1), task(2, 0, 1, 1)]), Err(TreeError::NoTree(2)));
}

proptest! {
    /// Any history of a container with an init as root can be rebuilt.
    #[test]
    fn histories_are_rebuilt(history in prop::collection::vec((0usize..6, 0usize..40, 0usize..40), 1..60)) {
        let mut kernel = Kernel::default();
        kernel.processes.insert(1, Process { ppid: 0, pgid: 1, sid: 1, dead: false });
        kernel.adopters.insert(1);
        let mut next = 2;
        for (what, who, other) in history {
            let alive: Vec<i32> = kernel.processes.iter().filter(|(_, p)| !p.dead).map(|(&pid, _)| pid).collect();
            let pid = alive[who % alive.len()];
            let me = kernel.processes[&pid].clone();
            match what {
                0 | 1 => { kernel.fork(pid, next); next += 1; }
                2 if !kernel.processes.values().any(|p| p.pgid == pid) => {
                    let me = kernel.processes.get_mut(&pid).unwrap();
                    (me.sid, me.pgid) = (pid, pid);
                }
                3 if me.sid != pid => kernel.processes.get_mut(&pid).unwrap().pgid = pid,
                4 if me.sid != pid => {
                    let target = alive[other % alive.len()];
                    let pgid = kernel.processes[&target].pgid;
                    if kernel.group_exists(pgid, me.sid) {
                        kernel.processes.get_mut(&pid).unwrap().pgid = pgid;
                    }
                }
                5 if pid != 1 => kernel.exit(pid, other % 4 != 0),
                _ => {}
            }
        }
        match check(&kernel.tasks()) {
            // Named, and before anything is created.
            Ok(()) | Err(TreeError::Session { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}
