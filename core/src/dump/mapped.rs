//! Mappings of files that have no path, but that a plugin knows as descriptors: such a mapping is kept as one of an open file
//! description, so that file, descriptors and mappings stay one object. If no task has the file open, it is opened here.

use super::{
    Context, DumpError,
    claim::{self, no_facts},
    inventory::Inventory,
};
use crate::{
    image::records::VmaKind,
    memory::describe::{self, MappedObjects, MemoryDescription, Refused, Unknown},
    plugins::{DescriptorKind, HandleFacts},
    proc::mappings::VmFlags,
    tree::Process,
};
use nix::{fcntl::OFlag, sys::stat::FileStat};
use stasis_plugin_api::HandleInfo;

/// Takes what descriptor kinds know out of the mappings that core does not know. `memory` is that of the living processes.
pub(super) fn adopt(
    context: &Context<'_>,
    memory: &mut [MemoryDescription],
    objects: &mut MappedObjects,
) -> Result<(), DumpError> {
    // Plugins are asked first: they may look at the inventory.
    let mut known = Vec::new();
    {
        let inventory = context.inventory.borrow();
        for (process, memory) in inventory.tree.living().zip(&*memory) {
            let of_process = memory.unknown.iter().map(|found| known_as_descriptor(context, process, found));
            known.push(of_process.collect::<Result<Vec<_>, DumpError>>()?);
        }
    }
    let inventory = &mut *context.inventory.borrow_mut();
    let Inventory { tree, handles, .. } = inventory;
    for ((process, memory), known) in tree.living().zip(memory).zip(known) {
        let MemoryDescription { vmas, unknown, refused } = memory;
        let mut rest = Vec::with_capacity(unknown.len());
        for (found, known) in unknown.drain(..).zip(known) {
            let Some(stat) = known else {
                rest.push(found);
                continue;
            };
            let mapping = &found.mapping;
            let handle = match handles.of_file(stat.st_dev, stat.st_ino) {
                Some(handle) => handle,
                None => {
                    let file = process.proc.open_file(&describe::map_file(mapping), OFlag::O_RDONLY)?;
                    let place = claim::place(mapping.start, mapping.end);
                    handles.add_mapped(file.into(), process.host_pid, place)?
                }
            };
            let vma = &mut vmas[found.vma];
            vma.set_kind(if mapping.shared { VmaKind::SharedFile } else { VmaKind::PrivateFile });
            // A file that is sealed against writing takes the right to write from the mapping, not its other traces.
            let writable = mapping.shared && (vma.may_write || mapping.flags.contains(VmFlags::SHARED));
            vma.file = objects.described_file(mapping, &stat, writable, Inventory::handle_id(handle));
            if let Some(why) = describe::refused(mapping) {
                refused.push((found.mapping, Refused::State(why)));
            }
        }
        *unknown = rest;
    }
    Ok(())
}

/// The file behind a mapping, if it is one that some descriptor kind claims and no mapping kind.
fn known_as_descriptor(
    context: &Context<'_>,
    process: &Process,
    unknown: &Unknown,
) -> Result<Option<FileStat>, DumpError> {
    let mapping = &unknown.mapping;
    if mapping.ino == 0 || claim::mapping_kind(context, process, mapping)?.is_some() {
        return Ok(None);
    }
    let file = describe::map_file(mapping);
    let Ok(stat) = process.proc.stat(&file) else { return Ok(None) };
    if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Ok(None);
    }
    let info = HandleInfo {
        link: String::from_utf8_lossy(&mapping.path).as_ref().into(),
        dev: stat.st_dev,
        ino: stat.st_ino,
        mode: stat.st_mode,
        ..HandleInfo::default()
    };
    let place = claim::place(mapping.start, mapping.end);
    let judge = |kind: &DescriptorKind| {
        let host = context.host(&kind.plugin);
        context.call(&host, process.host_pid, &process.name, &place).claims(kind, &info)
    };
    let facts = HandleFacts::new(&info, &no_facts, &no_facts, &judge);
    Ok(context.registry.descriptor_for(&facts)?.map(|_| stat))
}
