//! `stasis inspect`: what is in an image. Needs no plugin: the image brings the descriptors of its plugins' records.

mod decode;

use crate::image::{BLOBS_FILE, CORE_FILE, Image, ImageError, records::*};
use clap::Args;
use decode::Decoder;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

/// Shows what is in an image: tasks, mappings, descriptors, records, sizes
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Directory of the image
    #[arg(value_name = "DIR", required_unless_present = "images_dir")]
    directory: Option<PathBuf>,
    /// The same, as other subcommands take it
    #[arg(short = 'D', long, value_name = "DIR", conflicts_with = "directory")]
    images_dir: Option<PathBuf>,
    /// List every mapping
    #[arg(long)]
    mappings: bool,
    /// Check the checksums of all pages, too
    #[arg(long)]
    verify: bool,
}

/// Runs it. With `json`, everything is one object on stdout.
pub fn run(args: &InspectArgs, json: bool) -> ExitCode {
    match inspect(args, json) {
        Ok(sound) => {
            if sound {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            match json {
                true => {
                    println!("{}", json!({ "ok": false, "operation": "inspect", "error": error.to_string() }))
                }
                false => eprintln!("stasis inspect: {error}"),
            }
            ExitCode::FAILURE
        }
    }
}

/// Whether a restore would accept the image.
fn inspect(args: &InspectArgs, json: bool) -> Result<bool, ImageError> {
    let directory = args.directory.as_ref().or(args.images_dir.as_ref()).cloned().unwrap_or_default();
    let image = Image::inspect(&directory)?;
    if args.verify {
        image.verify_pages(std::thread::available_parallelism().map_or(1, Into::into))?;
    }
    let mut out = io::BufWriter::new(io::stdout().lock());
    let written = if json {
        as_json(&image).map(|value| writeln!(out, "{value:#}").and_then(|()| out.flush()))?
    } else {
        Human { image: &image, decoder: Decoder::new(&image), mappings: args.mappings }
            .print(&mut out)
            .and_then(|()| out.flush())
    };
    if let Err(error) = written {
        // A reader that closed the pipe has seen enough.
        tracing::debug!("stdout: {error}");
    }
    Ok(image.fault.is_none() && image.unknown.is_empty())
}

fn as_json(image: &Image) -> Result<Value, ImageError> {
    let decoder = Decoder::new(image);
    let with_record = |mut value: Value, record: Value| {
        value["record"] = record;
        value
    };
    let mut header = decoder.core(&image.header);
    for plugin in header["plugins"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        plugin.remove("descriptors");
    }
    let maps: Vec<Value> = image
        .memory_maps
        .values()
        .map(|map| {
            let mut value = decoder.core(map);
            for (vma, shown) in map.vmas.iter().zip(value["vmas"].as_array_mut().into_iter().flatten()) {
                if vma.kind() == VmaKind::Plugin {
                    shown["record"] = decoder.plugin(&vma.plugin, &vma.plugin_kind, "", &vma.record);
                }
            }
            value
        })
        .collect();
    let objects = image.objects.values().map(|object| {
        let record = decoder.plugin(&object.plugin, &object.kind, &object.message, &object.record);
        with_record(decoder.core(object), record)
    });
    let namespaces = image.namespaces.values().map(|namespace| {
        let record = decoder.plugin(&namespace.plugin, &namespace.kind, "", &namespace.record);
        with_record(decoder.core(namespace), record)
    });
    let task_records = image.task_records.iter().map(|task| {
        with_record(decoder.core(task), decoder.plugin(&task.plugin, &task.kind, "", &task.record))
    });
    let page_maps = image.page_maps.values().chain(image.segment_pages.values());
    let blobs = image.blob_list()?;
    let unknown = image
        .unknown
        .iter()
        .map(|record| json!({ "kind": record.kind, "version": record.version, "length": record.length }));
    Ok(json!({
        "ok": image.fault.is_none() && image.unknown.is_empty(),
        "directory": image.directory,
        "header": header,
        "tasks": image.tasks.iter().map(|task| decoder.core(task)).collect::<Vec<_>>(),
        "memory_maps": maps,
        "mapped_files": image.mapped_files.values().map(|r| decoder.core(r)).collect::<Vec<_>>(),
        "ghost_files": image.ghosts.values().map(|r| decoder.core(r)).collect::<Vec<_>>(),
        "shared_segments": image.segments.values().map(|r| decoder.core(r)).collect::<Vec<_>>(),
        "page_maps": page_maps.map(|r| decoder.core(r)).collect::<Vec<_>>(),
        "page_files": image.shards.values().map(|r| decoder.core(r)).collect::<Vec<_>>(),
        "descriptor_tables": image.tables.values().map(|r| decoder.core(r)).collect::<Vec<_>>(),
        "handles": image.handles.values().map(|r| decoder.core(r)).collect::<Vec<_>>(),
        "objects": objects.collect::<Vec<_>>(),
        "namespaces": namespaces.collect::<Vec<_>>(),
        "task_records": task_records.collect::<Vec<_>>(),
        "blobs": blobs
            .iter()
            .map(|(plugin, name, bytes)| json!({ "plugin": plugin, "name": name, "bytes": bytes }))
            .collect::<Vec<_>>(),
        "sizes": sizes(image).into_iter().collect::<BTreeMap<_, _>>(),
        "unknown_records": unknown.collect::<Vec<_>>(),
        "fault": image.fault.as_ref().map(ToString::to_string),
    }))
}

/// Bytes of each file.
fn sizes(image: &Image) -> Vec<(String, u64)> {
    let length = |name: &str| image.directory.join(name).metadata().map_or(0, |metadata| metadata.len());
    let framed = [CORE_FILE, BLOBS_FILE].map(|name| (name.to_owned(), length(name)));
    let pages = image.shards.values().map(|s| (crate::image::shard_file_name(s.index), s.length));
    framed.into_iter().chain(pages).filter(|(_, length)| *length > 0).collect()
}

/// For people.
struct Human<'a> {
    image: &'a Image,
    decoder: Decoder,
    mappings: bool,
}

impl Human<'_> {
    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let Header { format, tool_version, kernel_release, machine, plugins, options, .. } =
            &self.image.header;
        writeln!(out, "image {}", self.image.directory.display())?;
        writeln!(
            out,
            "  format {format}, written by stasis {tool_version} on Linux {kernel_release} {machine}"
        )?;
        for plugin in plugins {
            writeln!(out, "  plugin {} {}: {}", plugin.name, plugin.version, plugin.kinds.join(", "))?;
        }
        for option in options {
            writeln!(out, "  option --{}={} (plugin {})", option.name, option.value, option.plugin)?;
        }
        for (name, length) in sizes(self.image) {
            writeln!(out, "  {name}: {}", bytes(length))?;
        }
        self.tree(out)?;
        self.namespaces(out)?;
        self.memory(out)?;
        self.descriptors(out)?;
        for record in &self.image.unknown {
            writeln!(out, "unknown record kind {} version {}", record.kind, record.version)?;
        }
        match &self.image.fault {
            Some(fault) => writeln!(out, "a restore would refuse this image: {fault}"),
            None => Ok(()),
        }
    }

    fn tree(&self, out: &mut impl Write) -> io::Result<()> {
        let mut children: BTreeMap<i32, Vec<&Task>> = BTreeMap::new();
        for task in &self.image.tasks {
            children.entry(task.ppid).or_default().push(task);
        }
        writeln!(out, "tasks")?;
        let mut stack: Vec<(usize, &Task)> =
            children.remove(&0).unwrap_or_default().into_iter().map(|t| (1, t)).collect();
        while let Some((depth, task)) = stack.pop() {
            let name =
                task.threads.first().map_or_else(Default::default, |t| String::from_utf8_lossy(&t.name));
            let state = match (task.zombie, task.group_stop) {
                (true, _) => format!("zombie, wait status {:#x}", task.exit_status),
                (_, 0) => format!("{} thread{}", task.threads.len(), plural(task.threads.len())),
                (_, signal) => format!("{} threads, stopped by signal {signal}", task.threads.len()),
            };
            writeln!(
                out,
                "{:indent$}{} {name}: {state}, group {}, session {}{}",
                "",
                task.pid,
                task.pgid,
                task.sid,
                task.exe.as_ref().map_or_else(String::new, |exe| format!(", {}", path(exe))),
                indent = depth * 2
            )?;
            // Each task is taken out once, so a tree that goes round in circles ends here, too.
            let below = children.remove(&task.pid).unwrap_or_default();
            stack.extend(below.into_iter().rev().map(|child| (depth + 1, child)));
        }
        Ok(())
    }

    fn namespaces(&self, out: &mut impl Write) -> io::Result<()> {
        for namespace in self.image.namespaces.values() {
            let NamespaceObject { id, kind, plugin, inode, record, .. } = namespace;
            let record = self.decoder.plugin(plugin, kind, "", record);
            writeln!(out, "namespace {id}: {kind}:[{inode}], plugin {plugin}: {record}")?;
        }
        Ok(())
    }

    fn memory(&self, out: &mut impl Write) -> io::Result<()> {
        for (id, map) in &self.image.memory_maps {
            let mapped: u64 =
                map.vmas.iter().fold(0, |sum, vma| sum.saturating_add(vma.end.saturating_sub(vma.start)));
            let pages = self.image.page_maps.get(id).map_or(0, stored);
            writeln!(
                out,
                "memory map {id} ({}): {} mappings, {} mapped, {} stored",
                self.users(|task| task.mm == *id),
                map.vmas.len(),
                bytes(mapped),
                bytes(pages)
            )?;
            for vma in map.vmas.iter().filter(|_| self.mappings) {
                self.mapping(out, vma)?;
            }
        }
        for (id, segment) in &self.image.segments {
            let pages = self.image.segment_pages.get(id).map_or(0, stored);
            writeln!(out, "shared segment {id}: {}, {} stored", bytes(segment.size), bytes(pages))?;
        }
        Ok(())
    }

    fn mapping(&self, out: &mut impl Write, vma: &Vma) -> io::Result<()> {
        let letter = |bit: i32, letter: char| if vma.prot & bit as u32 != 0 { letter } else { '-' };
        let what = match vma.kind() {
            VmaKind::PrivateFile | VmaKind::SharedFile => {
                let file = self.image.mapped_files.get(&vma.file).and_then(|file| file.path.as_ref());
                file.map_or_else(|| "?".into(), path)
            }
            VmaKind::SharedAnonymous => format!("segment {}", vma.file),
            VmaKind::Plugin => {
                let record = self.decoder.plugin(&vma.plugin, &vma.plugin_kind, "", &vma.record);
                format!("plugin {}/{} {record}", vma.plugin, vma.plugin_kind)
            }
            _ => String::from_utf8_lossy(&vma.name).into_owned(),
        };
        writeln!(
            out,
            "    {:012x}-{:012x} {}{}{} {} {:x} {what}",
            vma.start,
            vma.end,
            letter(libc::PROT_READ, 'r'),
            letter(libc::PROT_WRITE, 'w'),
            letter(libc::PROT_EXEC, 'x'),
            vma.kind().as_str_name().to_lowercase().replace('_', "-"),
            vma.offset
        )
    }

    fn descriptors(&self, out: &mut impl Write) -> io::Result<()> {
        for (id, table) in &self.image.tables {
            writeln!(out, "descriptor table {id} ({})", self.users(|task| task.files == *id))?;
            for Descriptor { number, handle, cloexec } in &table.descriptors {
                let cloexec = if *cloexec { " close-on-exec" } else { "" };
                let what =
                    self.image.handles.get(handle).map_or_else(|| "?".into(), |handle| self.handle(handle));
                writeln!(out, "  {number:>4}{cloexec} {what}")?;
            }
        }
        for handle in self.image.handles.values().filter(|handle| handle.in_flight) {
            writeln!(out, "in flight: {}", self.handle(handle))?;
        }
        Ok(())
    }

    fn handle(&self, handle: &Handle) -> String {
        let flags = handle.status_flags;
        match self.image.objects.get(&handle.object) {
            Some(object) => {
                let Object { plugin, kind, message, record, description, .. } = object;
                let record = self.decoder.plugin(plugin, kind, message, record);
                format!("{plugin}/{kind} {description} flags {flags:#o} role {} {record}", handle.role)
            }
            None if !handle.external.is_empty() => format!("external {}", handle.external),
            None => {
                let path = handle.path.as_ref().map_or_else(|| "?".into(), path);
                format!("{path} flags {flags:#o} position {}", handle.position)
            }
        }
    }

    /// Which tasks share something.
    fn users(&self, uses: impl Fn(&Task) -> bool) -> String {
        let pids: Vec<String> =
            self.image.tasks.iter().filter(|t| !t.zombie && uses(t)).map(|t| t.pid.to_string()).collect();
        format!("task{} {}", plural(pids.len()), pids.join(", "))
    }
}

fn stored(map: &PageMap) -> u64 {
    map.extents.iter().fold(0, |sum, extent| sum.saturating_add(u64::from(extent.pages) * 4096))
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

fn path(path: &PathRef) -> String {
    let deleted = if path.deleted { " (deleted)" } else { "" };
    format!("{}{deleted}", String::from_utf8_lossy(&path.path))
}

fn bytes(count: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(size, _)| count >= *size) {
        Some((size, unit)) => format!("{:.1} {unit}", count as f64 / *size as f64),
        None => format!("{count} bytes"),
    }
}
