//! Who creates which open file description, in which order, and which descriptor numbers are free for our own use. Pure.
//!
//! Every description is created in one process, by default the first that holds it; the others take duplicates from
//! there. Objects that depend on others come in *levels*, with a barrier between, where the other is created in another
//! process; within a process the order of the list is enough.

use super::tree_plan::{NodeKind, TreePlan};
use crate::image::{
    Image,
    records::{Actor, ActorKind, Handle, Object},
};
use std::collections::{BTreeMap, BTreeSet};

/// Something to create.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Item {
    /// A path-backed file of core; id of the handle.
    File(u32),
    /// A plugin's object.
    Object(u32),
}

/// When and where it is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Creation {
    /// What.
    pub item: Item,
    /// Node of the tree plan.
    pub node: usize,
    /// Number of the level; 0 comes first.
    pub level: usize,
    /// Right after the setsid of its node.
    pub early: bool,
}

/// Descriptor numbers that no table of the image uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServiceNumbers {
    /// The first.
    pub first: i32,
    /// The first after them.
    pub end: i32,
}

/// A later phase of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phase {
    /// The object.
    pub object: u32,
    /// Node that runs it.
    pub node: usize,
}

/// The plan of all descriptors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DescriptorPlan {
    /// In order of creation.
    pub creations: Vec<Creation>,
    /// Number of levels.
    pub levels: usize,
    /// Node that creates each handle.
    pub creator: BTreeMap<u32, usize>,
    /// Link phase, by object.
    pub link: Vec<Phase>,
    /// Settle phase, by object.
    pub settle: Vec<Phase>,
    /// Nodes that share a descriptor table (CLONE_FILES), and the one of them that fills it: the first.
    pub sharers: BTreeMap<usize, usize>,
    /// Numbers for our own descriptors: fixed ones first, then parked handles.
    pub service: ServiceNumbers,
}

/// Why descriptors cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorPlanError {
    /// Objects that wait for each other.
    #[error("these resources of the image must each be created before the other: {}", .0.join(", "))]
    Cycle(Vec<String>),
    /// An actor that is no process of the plan.
    #[error("{resource} must be restored by process {pid}, which is not there")]
    Actor {
        /// The object.
        resource: String,
        /// The process.
        pid: i32,
    },
    /// No room for our own descriptors.
    #[error(
        "the tasks use nearly all of the {limit} descriptor numbers that are allowed, and restore needs {needed} of its own (raise RLIMIT_NOFILE)"
    )]
    Numbers {
        /// The limit.
        limit: i32,
        /// How many.
        needed: i32,
    },
}

/// Descriptors of our own besides parked handles.
pub const FIXED: i32 = 8;

struct Planner<'a> {
    image: &'a Image,
    tree: &'a TreePlan,
    /// First node that holds each handle.
    holder: BTreeMap<u32, usize>,
    /// Objects that name a handle in `uses` or `after`.
    user: BTreeMap<u32, u32>,
    sharers: BTreeMap<usize, usize>,
}

impl DescriptorPlan {
    /// Plans the descriptors of `image`. `after` are the kinds that must precede a plugin's kind; `own` is how many
    /// descriptors the user gave; `limit` is the highest number of descriptors that this process may have.
    pub fn new(
        image: &Image,
        tree: &TreePlan,
        after: &dyn Fn(&str, &str) -> Vec<String>,
        own: i32,
        limit: i32,
    ) -> Result<Self, DescriptorPlanError> {
        let mut planner =
            Planner { image, tree, holder: BTreeMap::new(), user: BTreeMap::new(), sharers: BTreeMap::new() };
        planner.find_holders();
        let creator_of_object: BTreeMap<u32, usize> = image
            .objects
            .values()
            .map(|object| Ok((object.id, planner.creator(object, &mut BTreeSet::new())?)))
            .collect::<Result<_, DescriptorPlanError>>()?;
        let mut creator = BTreeMap::new();
        for handle in image.handles.values() {
            let node = match creator_of_object.get(&handle.object) {
                Some(&node) => node,
                None => planner.holder.get(&handle.id).copied().unwrap_or_else(|| {
                    let user = planner.user.get(&handle.id).and_then(|user| creator_of_object.get(user));
                    user.copied().unwrap_or(0)
                }),
            };
            creator.insert(handle.id, node);
        }
        let (creations, levels) = planner.order(&creator_of_object, &creator, after)?;
        let phase = |actor: &dyn Fn(&Object) -> Option<Actor>| {
            let phases = image.objects.values().map(|object| {
                let default = creator_of_object.get(&object.id).copied().unwrap_or(0);
                let node = planner.actor(object, actor(object).as_ref(), default)?;
                Ok(Phase { object: object.id, node })
            });
            phases.collect::<Result<Vec<_>, DescriptorPlanError>>()
        };
        let link = phase(&|object| object.link_as)?;
        let settle = phase(&|object| object.settle_as)?;
        let service = planner.service(own, limit)?;
        let sharers = planner.sharers;
        Ok(Self { creations, levels, creator, link, settle, sharers, service })
    }

    /// Pids that helpers must have: for hooks to run as, and dead ones of which files below /proc are open.
    pub fn stand_ins(image: &Image) -> BTreeSet<i32> {
        let actors = image.objects.values().flat_map(|o| [o.create_as, o.link_as, o.settle_as]).flatten();
        let actors = actors.filter(|actor| actor.kind() == ActorKind::StandIn).map(|actor| actor.pid);
        let paths = image.handles.values().filter_map(|handle| handle.path.as_ref());
        let dead = paths.map(|path| path.process).filter(|&pid| pid != 0 && image.task(pid).is_none());
        actors.chain(dead).collect()
    }
}

impl Planner<'_> {
    fn find_holders(&mut self) {
        let mut owners: BTreeMap<u32, usize> = BTreeMap::new();
        for (number, node) in self.tree.nodes.iter().enumerate() {
            let NodeKind::Task(at) = node.kind else { continue };
            let table = self.image.tasks[at].files;
            // Nodes are in the order of their creation.
            let first = *owners.entry(table).or_insert(number);
            if first != number {
                self.sharers.extend([(number, first), (first, first)]);
                continue;
            }
            for descriptor in self.image.tables.get(&table).map_or(&[][..], |table| &table.descriptors) {
                self.holder.entry(descriptor.handle).or_insert(number);
            }
        }
        for object in self.image.objects.values() {
            for &handle in &object.uses {
                self.user.entry(handle).or_insert(object.id);
            }
        }
    }

    fn actor(
        &self,
        object: &Object,
        actor: Option<&Actor>,
        default: usize,
    ) -> Result<usize, DescriptorPlanError> {
        match actor {
            Some(actor) if actor.kind() != ActorKind::Any => {
                let missing = || DescriptorPlanError::Actor { resource: name(object), pid: actor.pid };
                let node = self.tree.find(actor.pid).ok_or_else(missing)?;
                match self.tree.nodes[node].kind {
                    NodeKind::Task(_) | NodeKind::StandIn => Ok(node),
                    NodeKind::Zombie(_) | NodeKind::Helper => Err(missing()),
                }
            }
            _ => Ok(default),
        }
    }

    /// The process that creates an object: its actor, the first that holds one of its handles, or who creates the object
    /// that has them in flight.
    fn creator(&self, object: &Object, seen: &mut BTreeSet<u32>) -> Result<usize, DescriptorPlanError> {
        let holder = object.handles.iter().filter_map(|handle| self.holder.get(handle)).min().copied();
        let default = match holder {
            Some(node) => node,
            None if seen.insert(object.id) => {
                let user = object.handles.iter().find_map(|handle| self.user.get(handle));
                match user.and_then(|user| self.image.objects.get(user)) {
                    Some(user) => self.creator(user, seen)?,
                    None => 0,
                }
            }
            None => 0,
        };
        self.actor(object, object.create_as.as_ref(), default)
    }

    /// Topological order (Kahn's algorithm) over objects, with a virtual point between kinds that follow each other.
    fn order(
        &self,
        creator: &BTreeMap<u32, usize>,
        handle_creator: &BTreeMap<u32, usize>,
        after: &dyn Fn(&str, &str) -> Vec<String>,
    ) -> Result<(Vec<Creation>, usize), DescriptorPlanError> {
        let objects = &self.image.objects;
        let mut by_kind: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
        for object in objects.values() {
            by_kind.entry(&object.kind).or_default().push(object.id);
        }
        let mut waiting: BTreeMap<u32, usize> = objects.keys().map(|&id| (id, 0)).collect();
        let mut followers: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        let mut kinds_after: BTreeMap<(&str, &str), Vec<String>> = BTreeMap::new();
        for object in objects.values() {
            let kinds = kinds_after
                .entry((&object.plugin, &object.kind))
                .or_insert_with(|| after(&object.plugin, &object.kind));
            let mut before: BTreeSet<u32> = object.after.iter().copied().collect();
            let earlier = kinds.iter().filter_map(|kind| by_kind.get(kind.as_str())).flatten();
            before.extend(earlier.copied().filter(|&other| other != object.id));
            for other in before {
                followers.entry(other).or_default().push(object.id);
                *waiting.entry(object.id).or_default() += 1;
            }
        }
        let mut level: BTreeMap<u32, usize> = BTreeMap::new();
        let mut ready: BTreeSet<u32> = waiting.iter().filter(|(_, n)| **n == 0).map(|(&id, _)| id).collect();
        let mut creations: Vec<Creation> = Vec::with_capacity(objects.len());
        while let Some(id) = ready.pop_first() {
            waiting.remove(&id);
            let node = creator.get(&id).copied().unwrap_or(0);
            let own = level.get(&id).copied().unwrap_or(0);
            let early = objects
                .get(&id)
                .and_then(|o| o.create_as)
                .is_some_and(|a| a.kind() == ActorKind::SessionLeader);
            creations.push(Creation { item: Item::Object(id), node, level: own, early });
            for follower in followers.remove(&id).into_iter().flatten() {
                let other = creator.get(&follower).copied().unwrap_or(0);
                let least = own + usize::from(other != node);
                let entry = level.entry(follower).or_default();
                *entry = least.max(*entry);
                if let Some(n) = waiting.get_mut(&follower) {
                    *n -= 1;
                    if *n == 0 {
                        ready.insert(follower);
                    }
                }
            }
        }
        if !waiting.is_empty() {
            let names = waiting.keys().filter_map(|id| objects.get(id)).map(name).collect();
            return Err(DescriptorPlanError::Cycle(names));
        }
        let files = self.image.handles.values().filter(|handle| handle.object == 0);
        creations.extend(files.map(|handle| Creation {
            item: Item::File(handle.id),
            node: handle_creator.get(&handle.id).copied().unwrap_or(0),
            level: 0,
            early: false,
        }));
        creations.sort_by_key(|creation| creation.level);
        let levels = creations.last().map_or(1, |last| last.level + 1);
        Ok((creations, levels))
    }

    /// The first gap between all numbers in use that is large enough.
    fn service(&self, own: i32, limit: i32) -> Result<ServiceNumbers, DescriptorPlanError> {
        let tables = self.image.tables.values();
        let used: BTreeSet<i32> =
            tables.flat_map(|table| &table.descriptors).map(|descriptor| descriptor.number as i32).collect();
        let parks = |handle: &&Handle| !self.holder.contains_key(&handle.id);
        let actors = self
            .image
            .objects
            .values()
            .filter(|object| object.create_as.is_some_and(|a| a.kind() != ActorKind::Any));
        let parked: usize = actors.map(|object| object.handles.len()).sum();
        let auxiliaries: usize = self.image.objects.values().map(|object| object.auxiliaries as usize).sum();
        let parked = parked + auxiliaries + self.image.handles.values().filter(parks).count();
        let shards = self.image.shards.keys().next_back().map_or(0, |last| *last as usize + 1);
        // For the while: a pidfd for each creator, and what one hook has just made.
        let most = self.image.objects.values().map(|object| object.handles.len()).max().unwrap_or(0);
        let needed = FIXED
            + own
            + (shards + parked + self.tree.nodes.len() + most) as i32
            + super::ghosts::count(self.image)
            + super::namespaces::count(self.image);
        let mut first = 3;
        for number in used.iter().copied().chain([limit]) {
            if number - first >= needed {
                return Ok(ServiceNumbers { first, end: number });
            }
            first = first.max(number + 1);
        }
        Err(DescriptorPlanError::Numbers { limit, needed })
    }
}

/// What an object is called in messages.
pub fn name(object: &Object) -> String {
    if object.description.is_empty() {
        format!("{} (object {})", object.kind, object.id)
    } else {
        object.description.clone()
    }
}

#[cfg(test)]
#[path = "descriptor_plan_tests.rs"]
mod tests;
