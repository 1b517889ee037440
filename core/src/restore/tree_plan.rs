//! Who forks whom, in which order, so that parents, sessions and process groups come out as in the image. Pure.
//!
//! A process inherits its session from the one that forks it and can only ever start a session of its own (setsid(2)). So
//! a child that belongs to its parent's earlier session is forked before the parent's setsid. A task whose session is
//! neither (its leader is dead, or it was orphaned and adopted by another) is forked by a *helper* inside that session,
//! which then exits: the orphan goes to the nearest ancestor that is a child subreaper (prctl(2)), which its parent in
//! the image is made for the while. Process groups whose leader is dead are founded by a helper with that pid.

use std::collections::{BTreeMap, BTreeSet};

/// What the plan needs to know of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeTask {
    /// Process id.
    pub pid: i32,
    /// Parent, 0 for the root task.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// Ended, but not yet waited for.
    pub zombie: bool,
}

/// What a process of the plan is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeKind {
    /// A task of the image; index into the plan's input.
    Task(usize),
    /// A zombie of the image, likewise; exits when all groups are formed.
    Zombie(usize),
    /// Exits when all groups are formed.
    Helper,
    /// A stand-in for a dead process that hooks must run as; exits when all descriptors are settled.
    StandIn,
}

/// What a process does after its birth, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Becomes a child subreaper for the while.
    Adopt,
    /// Forks a node.
    Fork(usize),
    /// Starts a session; objects that its leader must create are created right after it.
    NewSession,
    /// Founds the process group of its own pid.
    NewGroup,
}

/// One process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its pid; 0: any that the image does not use.
    pub pid: i32,
    /// What it is.
    pub kind: NodeKind,
    /// Who forks it; none for the root.
    pub creator: Option<usize>,
    /// What it does first.
    pub steps: Vec<Step>,
    /// Group that it joins when all groups are founded.
    pub join: Option<i32>,
    /// It founded a group that others join, so it joins another one only after them.
    pub join_late: bool,
}

/// The whole tree; node 0 is the root task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TreePlan {
    /// The processes.
    pub nodes: Vec<Node>,
}

/// Why a tree cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// Not exactly one task without parent, or a task that hangs below itself.
    #[error("the tasks of the image are no tree: task {0} does not hang below one root")]
    NoTree(i32),
    /// Nobody can put this task into its session.
    #[error(
        "task {pid} belongs to session {sid}, in which nobody below its parent {ppid} could fork it (this shape of sessions cannot be restored)"
    )]
    Session {
        /// The task.
        pid: i32,
        /// Its session.
        sid: i32,
        /// Its parent.
        ppid: i32,
    },
    /// A group of another session.
    #[error("task {pid} belongs to process group {pgid}, which is of another session than {sid}")]
    Group {
        /// The task.
        pid: i32,
        /// Its group.
        pgid: i32,
        /// Its session.
        sid: i32,
    },
    /// A stand-in with the pid of a task.
    #[error("a helper is to run as pid {0}, which is a task of the image")]
    StandIn(i32),
}

impl TreePlan {
    /// Plans the tree of `tasks`, with a stand-in for each pid in `stand_ins`.
    pub fn new(tasks: &[TreeTask], stand_ins: &BTreeSet<i32>) -> Result<Self, TreeError> {
        Planner::new(tasks)?.plan(stand_ins)
    }

    /// The node with this pid.
    pub fn find(&self, pid: i32) -> Option<usize> {
        self.nodes.iter().position(|node| node.pid == pid)
    }

    /// Number of tasks that will run on.
    pub fn live_tasks(&self) -> usize {
        self.nodes.iter().filter(|node| matches!(node.kind, NodeKind::Task(_))).count()
    }

    /// Number of processes that are there until all descriptors are settled.
    pub fn settlers(&self) -> usize {
        let stays = |node: &&Node| matches!(node.kind, NodeKind::Task(_) | NodeKind::StandIn);
        self.nodes.iter().filter(stays).count()
    }
}

/// When a parent that starts a session forks a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    BeforeSession,
    AfterSession,
}

struct Planner<'a> {
    tasks: &'a [TreeTask],
    of: BTreeMap<i32, usize>,
    /// Indexes, parents before children.
    order: Vec<usize>,
    parent: Vec<Option<usize>>,
    children: Vec<Vec<usize>>,
    /// Session in which a task is born; that of stasis itself is the root's, if nobody leads it, else 0.
    birth: Vec<i32>,
    nodes: Vec<Node>,
    forks: Vec<Vec<(When, usize)>>,
    adopts: BTreeSet<usize>,
    founded: BTreeSet<i32>,
}

impl<'a> Planner<'a> {
    fn new(tasks: &'a [TreeTask]) -> Result<Self, TreeError> {
        let of: BTreeMap<i32, usize> = tasks.iter().enumerate().map(|(at, task)| (task.pid, at)).collect();
        let mut children = vec![Vec::new(); tasks.len()];
        let mut parent = vec![None; tasks.len()];
        let mut roots = Vec::new();
        for (at, task) in tasks.iter().enumerate() {
            match of.get(&task.ppid) {
                Some(&above) => {
                    parent[at] = Some(above);
                    children[above].push(at);
                }
                None => roots.push(at),
            }
        }
        let [root] = roots[..] else {
            return Err(TreeError::NoTree(roots.get(1).map_or(0, |&at| tasks[at].pid)));
        };
        let mut order = vec![root];
        let mut next = 0;
        while let Some(&at) = order.get(next) {
            order.extend(&children[at]);
            next += 1;
        }
        if let Some(lost) = (0..tasks.len()).find(|at| order.len() < tasks.len() && !order.contains(at)) {
            return Err(TreeError::NoTree(tasks[lost].pid));
        }
        Ok(Self {
            tasks,
            of,
            order,
            parent,
            children,
            birth: vec![0; tasks.len()],
            nodes: Vec::new(),
            forks: Vec::new(),
            adopts: BTreeSet::new(),
            founded: BTreeSet::new(),
        })
    }

    fn leads(&self, at: usize) -> bool {
        self.tasks[at].sid == self.tasks[at].pid
    }

    fn plan(mut self, stand_ins: &BTreeSet<i32>) -> Result<TreePlan, TreeError> {
        // Node numbers: tasks in creation order first, so that the root is node 0.
        let mut node_of = vec![0; self.tasks.len()];
        for at in self.order.clone() {
            let task = &self.tasks[at];
            let kind = if task.zombie { NodeKind::Zombie(at) } else { NodeKind::Task(at) };
            node_of[at] = self.add(task.pid, kind);
        }
        self.choose_births(&node_of)?;
        for &pid in stand_ins {
            if self.of.contains_key(&pid) {
                return Err(TreeError::StandIn(pid));
            }
            let existing = self.nodes.iter().position(|node| node.pid == pid);
            match existing {
                // The helper that leads a dead leader's session will do.
                Some(helper) => self.nodes[helper].kind = NodeKind::StandIn,
                None => {
                    let node = self.add(pid, NodeKind::StandIn);
                    self.fork(0, node, When::AfterSession);
                }
            }
        }
        self.groups(&node_of)?;
        self.check_adoptions(&node_of)?;
        self.write_steps();
        Ok(TreePlan { nodes: self.nodes })
    }

    fn add(&mut self, pid: i32, kind: NodeKind) -> usize {
        self.nodes.push(Node { pid, kind, creator: None, steps: Vec::new(), join: None, join_late: false });
        self.forks.push(Vec::new());
        self.nodes.len() - 1
    }

    fn fork(&mut self, by: usize, node: usize, when: When) {
        self.nodes[node].creator = Some(by);
        self.forks[by].push((when, node));
    }

    /// Sessions in which a task must be able to be born, for itself or for children that were forked before its setsid.
    fn demands(&self) -> Vec<BTreeSet<i32>> {
        let mut demands = vec![BTreeSet::new(); self.tasks.len()];
        for &at in self.order.iter().rev() {
            if self.leads(at) {
                let own = self.tasks[at].pid;
                let below: BTreeSet<i32> =
                    self.children[at].iter().flat_map(|&child| demands[child].iter().copied()).collect();
                demands[at] = below.into_iter().filter(|&sid| sid != own).collect();
            } else {
                demands[at].insert(self.tasks[at].sid);
            }
        }
        demands
    }

    fn choose_births(&mut self, node_of: &[usize]) -> Result<(), TreeError> {
        let demands = self.demands();
        let mut dead_leaders: BTreeMap<i32, (usize, usize)> = BTreeMap::new();
        for at in self.order.clone() {
            let task = self.tasks[at];
            let Some(above) = self.parent[at] else {
                // Stasis' own session stands for the one that the root was born in. A pid namespace shows it as 0; any
                // other number that nobody has is that of a dead leader.
                self.birth[at] = if self.leads(at) { 0 } else { task.sid };
                continue;
            };
            let mut options = vec![(self.birth[above], When::BeforeSession)];
            if self.leads(above) {
                options.push((self.tasks[above].pid, When::AfterSession));
            }
            let wanted = options.iter().find(|(sid, _)| demands[at].contains(sid)).copied();
            let chosen = match wanted {
                Some(option) => Some(option),
                // A leader without wishes is born wherever its parent is last.
                None if self.leads(at) => options.last().copied(),
                None => None,
            };
            match chosen {
                Some((sid, when)) => {
                    self.birth[at] = sid;
                    self.fork(node_of[above], node_of[at], when);
                }
                None => self.orphan(at, above, node_of, &mut dead_leaders)?,
            }
        }
        Ok(())
    }

    /// A task that nobody in its parent can fork into its session.
    fn orphan(
        &mut self,
        at: usize,
        above: usize,
        node_of: &[usize],
        dead_leaders: &mut BTreeMap<i32, (usize, usize)>,
    ) -> Result<(), TreeError> {
        let task = self.tasks[at];
        let refused = TreeError::Session { pid: task.pid, sid: task.sid, ppid: task.ppid };
        self.birth[at] = task.sid;
        let below = |other: usize| self.ancestors(other).any(|up| up == above);
        // The leader if it can, or any other member that is already placed.
        let mut members: Vec<usize> =
            self.order.iter().copied().filter(|&o| self.tasks[o].sid == task.sid).collect();
        members.sort_by_key(|&o| !self.leads(o));
        let placed = |o: &usize| self.nodes[node_of[*o]].creator.is_some();
        let member =
            members.into_iter().find(|&o| o != at && !self.tasks[o].zombie && below(o) && placed(&o));
        if let Some(member) = member {
            let helper = self.add(0, NodeKind::Helper);
            self.fork(node_of[member], helper, When::AfterSession);
            self.fork(helper, node_of[at], When::AfterSession);
            self.adopts.insert(node_of[above]);
            return Ok(());
        }
        if self.of.contains_key(&task.sid) || task.sid <= 0 {
            return Err(refused);
        }
        let (helper, reaper) = match dead_leaders.get(&task.sid) {
            Some(&known) => known,
            None => {
                let helper = self.add(task.sid, NodeKind::Helper);
                self.fork(node_of[above], helper, When::AfterSession);
                self.founded.insert(task.sid);
                *dead_leaders.entry(task.sid).or_insert((helper, above))
            }
        };
        if reaper != above {
            return Err(refused);
        }
        self.fork(helper, node_of[at], When::AfterSession);
        self.adopts.insert(node_of[above]);
        Ok(())
    }

    fn ancestors(&self, at: usize) -> impl Iterator<Item = usize> {
        std::iter::successors(self.parent[at], |&up| self.parent[up])
    }

    /// Every orphan's nearest child subreaper is its parent.
    fn check_adoptions(&self, node_of: &[usize]) -> Result<(), TreeError> {
        for (at, task) in self.tasks.iter().enumerate() {
            let creator = self.nodes[node_of[at]].creator;
            let Some(helper) = creator.filter(|&by| self.nodes[by].kind == NodeKind::Helper) else {
                continue;
            };
            let up = |&node: &usize| match self.nodes[node].kind {
                NodeKind::Task(at) | NodeKind::Zombie(at) => self.parent[at].map(|above| node_of[above]),
                NodeKind::Helper | NodeKind::StandIn => self.nodes[node].creator,
            };
            let reaper = std::iter::successors(up(&helper), up).find(|node| self.adopts.contains(node));
            if reaper != self.parent[at].map(|above| node_of[above]) {
                return Err(TreeError::Session { pid: task.pid, sid: task.sid, ppid: task.ppid });
            }
        }
        Ok(())
    }

    fn groups(&mut self, node_of: &[usize]) -> Result<(), TreeError> {
        let root = self.tasks[self.order[0]];
        let led = self.of.contains_key(&root.sid);
        let outside = |task: &TreeTask| !led && task.sid == root.sid && task.pgid == root.pgid;
        let wanted: BTreeMap<i32, i32> =
            self.tasks.iter().filter(|task| !outside(task)).map(|task| (task.pgid, task.sid)).collect();
        let mut helpers: BTreeMap<i32, i32> = BTreeMap::new();
        for at in self.order.clone() {
            let (task, node) = (self.tasks[at], node_of[at]);
            let founds = wanted.contains_key(&task.pid) && !self.leads(at);
            if founds {
                self.nodes[node].join_late = task.pgid != task.pid;
                self.nodes[node].steps.push(Step::NewGroup);
            }
            let led_by = self.of.get(&task.pgid).map(|&leader| self.tasks[leader].sid);
            let refused = TreeError::Group { pid: task.pid, pgid: task.pgid, sid: task.sid };
            if task.pgid == task.pid || (led_by.is_none() && outside(&task)) {
                continue;
            }
            if self.leads(at) || led_by.is_some_and(|sid| sid != task.sid) {
                return Err(refused);
            }
            self.nodes[node].join = Some(task.pgid);
            if led_by.is_some() || task.pgid == task.sid && self.founded.contains(&task.pgid) {
                continue;
            }
            match helpers.get(&task.pgid) {
                Some(&sid) if sid == task.sid => {}
                Some(_) => return Err(refused),
                None if task.pgid <= 0 || self.founded.contains(&task.pgid) => return Err(refused),
                None => {
                    let helper = self.add(task.pgid, NodeKind::Helper);
                    self.nodes[helper].steps.push(Step::NewGroup);
                    self.fork(node, helper, When::AfterSession);
                    helpers.insert(task.pgid, task.sid);
                }
            }
        }
        Ok(())
    }

    /// Puts each node's steps in order.
    fn write_steps(&mut self) {
        for number in 0..self.nodes.len() {
            let node = &self.nodes[number];
            let leads = match node.kind {
                NodeKind::Task(at) | NodeKind::Zombie(at) => self.leads(at),
                NodeKind::Helper | NodeKind::StandIn => self.founded.contains(&node.pid),
            };
            let mut steps = Vec::with_capacity(self.forks[number].len() + 2);
            if self.adopts.contains(&number) {
                steps.push(Step::Adopt);
            }
            let forks = |when| {
                self.forks[number]
                    .iter()
                    .filter(move |(w, _)| *w == when)
                    .map(|&(_, child)| Step::Fork(child))
            };
            steps.extend(forks(When::BeforeSession));
            if leads {
                steps.push(Step::NewSession);
            }
            steps.extend(forks(When::AfterSession));
            // Last: a child may belong to the group in which this process was born.
            steps.extend(&node.steps);
            self.nodes[number].steps = steps;
        }
    }
}

#[cfg(test)]
#[path = "tree_plan_tests.rs"]
mod tests;
