use super::*;
use crate::image::records::{Descriptor, DescriptorTable, Task};
use crate::restore::tree_plan::TreeTask;

/// pid, parent, and the descriptors as (number, handle).
type Table<'a> = (i32, i32, &'a [(u32, u32)]);

fn image(tables: &[Table<'_>], objects: &[(u32, &str, &[u32], &[u32])]) -> Image {
    let mut image = Image::default();
    for (at, (pid, ppid, descriptors)) in tables.iter().enumerate() {
        let files = at as u32 + 1;
        image.tasks.push(Task { pid: *pid, ppid: *ppid, pgid: 1, sid: 1, files, ..Task::default() });
        let descriptors =
            descriptors.iter().map(|&(number, handle)| Descriptor { number, handle, cloexec: false });
        image.tables.insert(files, DescriptorTable { id: files, descriptors: descriptors.collect() });
    }
    for (id, kind, handles, after) in objects {
        let object = Object {
            id: *id,
            kind: (*kind).into(),
            handles: handles.to_vec(),
            after: after.to_vec(),
            description: format!("{kind}{id}"),
            ..Object::default()
        };
        image.objects.insert(*id, object);
        for &handle in *handles {
            image.handles.insert(handle, Handle { id: handle, object: *id, ..Handle::default() });
        }
    }
    image
}

fn tree(image: &Image) -> TreePlan {
    let tasks: Vec<_> = image
        .tasks
        .iter()
        .map(|t| TreeTask { pid: t.pid, ppid: t.ppid, pgid: t.pgid, sid: t.sid, zombie: t.zombie })
        .collect();
    TreePlan::new(&tasks, &DescriptorPlan::stand_ins(image)).unwrap()
}

fn plan(image: &Image) -> Result<DescriptorPlan, DescriptorPlanError> {
    DescriptorPlan::new(
        image,
        &tree(image),
        &|_, kind| if kind == "late" { vec!["a".into()] } else { vec![] },
        0,
        1024,
    )
}

#[test]
fn the_first_holder_creates_and_levels_separate_processes() {
    let image =
        image(&[(1, 0, &[(3, 1)]), (2, 1, &[(0, 1), (5, 2)])], &[(1, "a", &[1], &[]), (2, "b", &[2], &[1])]);
    let plan = plan(&image).unwrap();
    assert_eq!((plan.creator[&1], plan.creator[&2]), (0, 1));
    let levels: Vec<_> = plan.creations.iter().map(|c| (c.item, c.level)).collect();
    assert_eq!(levels, [(Item::Object(1), 0), (Item::Object(2), 1)]);
    assert_eq!((plan.levels, plan.service.first), (2, 6));
}

#[test]
fn within_a_process_no_level_is_needed() {
    let image = image(&[(1, 0, &[(3, 1), (4, 2)])], &[(1, "late", &[1], &[]), (2, "a", &[2], &[])]);
    let plan = plan(&image).unwrap();
    let order: Vec<_> = plan.creations.iter().map(|c| c.item).collect();
    assert_eq!((order, plan.levels), (vec![Item::Object(2), Item::Object(1)], 1));
}

#[test]
fn cycles_are_reported_by_name() {
    let image = image(&[(1, 0, &[])], &[(1, "a", &[1], &[2]), (2, "b", &[2], &[1])]);
    let error = plan(&image).unwrap_err().to_string();
    assert!(error.contains("a1, b2"), "{error}");
}

#[test]
fn what_is_only_in_flight_is_created_where_it_is_used() {
    let mut image =
        image(&[(1, 0, &[]), (2, 1, &[(3, 1)])], &[(1, "socket", &[1], &[]), (2, "pipe", &[2], &[])]);
    image.objects.get_mut(&1).unwrap().uses = vec![2];
    assert_eq!(plan(&image).unwrap().creator[&2], 1);
}

#[test]
fn stand_ins_are_processes_of_the_tree() {
    let mut image = image(&[(1, 0, &[(3, 1)])], &[(1, "socket", &[1], &[])]);
    let actor = Actor { kind: ActorKind::StandIn as i32, pid: 77, ..Actor::default() };
    image.objects.get_mut(&1).unwrap().create_as = Some(actor);
    let tree = tree(&image);
    assert_eq!(tree.nodes[plan(&image).unwrap().creator[&1]].pid, 77);
}

#[test]
fn a_gap_is_used_when_the_highest_numbers_are_taken() {
    let image = image(&[(1, 0, &[(3, 1), (1023, 1)])], &[(1, "a", &[1], &[])]);
    assert_eq!(plan(&image).unwrap().service, ServiceNumbers { first: 4, end: 1023 });
}
