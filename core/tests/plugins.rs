//! Loading plugins: the real one next to the test binary, and files that are none.

use stasis::{
    image::records::{Header, PluginUse},
    plugins::{
        CallContext, DescriptorKind, GivenOption, HandleFacts, HookWatch, Judge, PluginChoice, PluginsError,
        Registry, Wanted, load, split_arguments,
    },
};
use stasis_plugin_api::{
    ErrorKind, HandleInfo, HookError, SessionInfo, TaskInfo,
    abi::{AbiResult, HostAbi},
    abi_stable::std_types::{RErr, RNone, ROption, RSlice, RSliceMut, RStr, RString, RVec},
};
use std::{
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

/// A built plugin, if `cargo build` made one: nothing depends on the plugins, so `cargo test -p stasis` does not.
fn plugin_file() -> Option<PathBuf> {
    let executable = std::env::current_exe().unwrap();
    let profile = executable.parent()?.parent()?;
    let file = profile.join("libstasis_plugin_eventfd.so");
    if !file.exists() {
        eprintln!("SKIPPED: {} is not built (cargo build --workspace)", file.display());
        return None;
    }
    Some(file)
}

fn choice(directory: &Path) -> PluginChoice {
    PluginChoice { directories: vec![directory.into()], ..PluginChoice::default() }
}

fn with_plugin(f: impl FnOnce(&Path)) {
    let Some(file) = plugin_file() else { return };
    let directory = tempfile::tempdir().unwrap();
    fs::copy(&file, directory.path().join(file.file_name().unwrap())).unwrap();
    f(directory.path());
}

#[test]
fn bad_files_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.so");
    let refused = |expected: &str| {
        let error = load(&path).err().unwrap().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert!(error.contains(expected), "{error:?} instead of {expected:?}");
        assert!(!error.contains('\n'), "{error}");
    };
    fs::write(&path, "").unwrap();
    refused("no 64-bit ELF file");
    fs::write(&path, "hello, world, this is some text of more than sixty-four bytes, really").unwrap();
    refused("no 64-bit ELF file");
    fs::copy(std::env::current_exe().unwrap(), &path).unwrap();
    refused("it exports no plugin root module");
    let Some(plugin) = plugin_file() else { return };
    let whole = fs::read(&plugin).unwrap();
    for part in [whole.len() / 100, whole.len() / 3, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..part]).unwrap();
        refused("is not a stasis plugin");
    }
    let mut other = whole.clone();
    other[18] = 0xb7; // e_machine: EM_AARCH64
    fs::write(&path, &other).unwrap();
    refused("no shared library for x86_64");
}

#[test]
fn missing_directories_are_named() {
    let error = Registry::load(&choice(Path::new("/nonexistent"))).err().unwrap().to_string();
    assert_eq!(
        error,
        "cannot read plugin directory /nonexistent: No such file or directory (os error 2) (check --plugin-dir)"
    );
}

#[test]
fn dispatch_and_choice() {
    with_plugin(|directory| {
        let registry = Registry::load(&choice(directory)).unwrap();
        let handle = HandleInfo { link: "anon_inode:[eventfd]".into(), mode: 0o600, ..Default::default() };
        let nobody: Judge<'_, DescriptorKind> = &|_| Ok(false);
        let facts = HandleFacts::new(&handle, &|| None, &|| None, nobody);
        let kind = registry.descriptor_for(&facts).unwrap().expect("claimed");
        assert_eq!((&*kind.plugin, kind.name()), ("eventfd", "eventfd"));
        let other = HandleInfo { link: "anon_inode:[other]".into(), ..Default::default() };
        let other = HandleFacts::new(&other, &|| None, &|| None, nobody);
        assert!(registry.descriptor_for(&other).unwrap().is_none());

        let uses = registry.uses([("eventfd", "eventfd")]);
        assert!(!uses[0].descriptors.is_empty());
        let header = Header { plugins: uses, ..Default::default() };
        Registry::load_needed(&choice(directory), &header).unwrap();

        let without = PluginChoice { without: vec!["eventfd".into()], ..choice(directory) };
        let registry = Registry::load(&without).unwrap();
        assert!(registry.descriptor_for(&facts).unwrap().is_none());
        assert_eq!(registry.remedy(Wanted::Handle(&facts), None), "plugin eventfd would take it: enable it");
        let error = registry.needed_for(&header).unwrap_err().to_string();
        assert!(error.contains("plugin eventfd 1.0.0, which is disabled"), "{error}");

        let unknown = PluginChoice { prefer: vec!["evntfd".into()], ..choice(directory) };
        let error = Registry::load(&unknown).err().unwrap().to_string();
        assert_eq!(error, "--prefer: there is no plugin evntfd (known: eventfd)");
    });
}

#[test]
fn needs_are_all_listed() {
    with_plugin(|directory| {
        let need = |name: &str, version: &str, kind: &str| PluginUse {
            name: name.into(),
            version: version.into(),
            kinds: vec![kind.into()],
            ..Default::default()
        };
        let header = Header {
            plugins: vec![
                need("eventfd", "1.0.0", "eventfd"),
                need("eventfd", "2.0.0", "eventfd"),
                need("eventfd", "1.0.0", "clock"),
                need("nothing", "1.0.0", "x"),
            ],
            ..Default::default()
        };
        match Registry::load_needed(&choice(directory), &header) {
            Err(PluginsError::Needed(missing)) => {
                let texts: Vec<String> = missing.iter().map(ToString::to_string).collect();
                assert_eq!(
                    texts,
                    [
                        "plugin eventfd 2.0.0, but 1.0.0 is installed",
                        "plugin eventfd 1.0.0, but the installed one knows no clock",
                        "plugin nothing 1.0.0, which is not installed",
                    ]
                );
            }
            other => panic!("{:?}", other.err()),
        }
    });
}

#[test]
fn same_plugin_twice() {
    with_plugin(|directory| {
        let file = directory.join("libstasis_plugin_eventfd.so");
        fs::copy(&file, directory.join("another.so")).unwrap();
        let error = Registry::load(&choice(directory)).err().unwrap().to_string();
        assert!(error.contains("plugin eventfd is there twice"), "{error}");
    });
}

#[test]
fn options_must_be_declared() {
    let given = [GivenOption::new("nonsense", None)];
    let error = Registry::default().set_options(&given).unwrap_err().to_string();
    assert_eq!(error, "unknown option --nonsense (no loaded plugin has options)");
}

#[test]
fn options_of_plugins_are_split_off() {
    use clap::{Arg, ArgAction, Command};
    let command = Command::new("stasis")
        .arg(Arg::new("verbosity").short('v').long("verbosity").num_args(0..=1).require_equals(true))
        .subcommand(
            Command::new("dump")
                .arg(Arg::new("dir").short('D').long("images-dir"))
                .arg(Arg::new("tree").short('t').long("tree"))
                .arg(Arg::new("running").short('R').long("leave-running").action(ArgAction::SetTrue)),
        );
    let line = "stasis dump -t 12 --switch -RD --dir --images-dir --odd --value=3 --tree=4 -v --leave-running -- --x";
    let (rest, given) = split_arguments(&command, line.split(' ').map(Into::into));
    let rest: Vec<_> = rest.iter().map(|argument| argument.to_str().unwrap()).collect();
    assert_eq!(
        rest.join(" "),
        "stasis dump -t 12 -RD --dir --images-dir --odd --tree=4 -v --leave-running -- --x"
    );
    let given: Vec<_> = given.iter().map(|option| (option.name.as_str(), option.value.as_deref())).collect();
    assert_eq!(given, [("switch", None), ("value", Some("3"))]);
}

/// A host that knows nothing.
struct NoHost;
fn no<T>() -> AbiResult<T> {
    RErr(HookError::invalid("not in this test"))
}
impl HostAbi for NoHost {
    fn hold(&self, _: bool) {}
    fn option(&self, _: RStr<'_>) -> ROption<RString> {
        RNone
    }
    fn warn(&self, _: RStr<'_>) {}
    fn progress(&self, _: u64, _: u64) {}
    fn current_task(&self) -> i32 {
        0
    }
    fn ends_tree(&self) -> bool {
        false
    }
    fn is_dry_run(&self) -> bool {
        false
    }
    fn externals(&self) -> RVec<RString> {
        RVec::new()
    }
    fn inherited(&self, _: RStr<'_>) -> AbiResult<ROption<i32>> {
        no()
    }
    fn tasks(&self) -> RVec<TaskInfo> {
        RVec::new()
    }
    fn sessions(&self) -> RVec<SessionInfo> {
        RVec::new()
    }
    fn handle(&self, _: u32) -> ROption<HandleInfo> {
        RNone
    }
    fn handle_at(&self, _: i32, _: i32) -> ROption<u32> {
        RNone
    }
    fn handle_of(&self, _: u64, _: u64) -> ROption<u32> {
        RNone
    }
    fn open_handle(&self, _: u32) -> AbiResult<i32> {
        no()
    }
    fn open_auxiliary(&self, _: u32, _: u32) -> AbiResult<i32> {
        no()
    }
    fn open_proc(&self, _: i32) -> AbiResult<i32> {
        no()
    }
    fn remote_syscall(&self, _: i32, _: i64, _: &[u64; 6]) -> AbiResult<i64> {
        no()
    }
    fn read_memory(&self, _: i32, _: u64, _: RSliceMut<'_, u8>) -> AbiResult<()> {
        no()
    }
    fn undo(&self, _: i32, _: RSlice<'_, stasis_plugin_api::UndoStep>) -> AbiResult<()> {
        unreachable!()
    }
    fn blob_append(&self, _: RStr<'_>, _: RSlice<'_, u8>) -> AbiResult<()> {
        no()
    }
    fn blob_read(&self, _: RStr<'_>, _: u64, _: RSliceMut<'_, u8>) -> AbiResult<usize> {
        no()
    }
}

#[test]
fn errors_of_hooks_say_everything() {
    with_plugin(|directory| {
        let registry = Registry::load(&choice(directory)).unwrap();
        let kind = registry.descriptor_kind("eventfd", "eventfd").unwrap();
        let watch = HookWatch::new().unwrap();
        let context = CallContext {
            watch,
            host: &NoHost,
            task: 42,
            task_name: "redis",
            resource: "descriptor 5, anon_inode:[eventfd]",
        };
        let stdin = fs::File::open("/dev/null").unwrap();
        let error = context.describe(kind, &HandleInfo::default(), stdin.as_fd()).unwrap_err();
        assert_eq!(error.source.kind, ErrorKind::Failed);
        assert_eq!(
            error.to_string(),
            "task 42 (redis), descriptor 5, anon_inode:[eventfd] cannot be dumped: fdinfo has no field \
             eventfd-id [plugin eventfd, describe]"
        );
        let error = context.create(kind, &Default::default(), 0, b"\xff\xff").unwrap_err();
        assert_eq!(error.source.kind, ErrorKind::BadRecord);
        let error = context.create(kind, &Default::default(), 0, b"").unwrap_err().to_string();
        assert!(error.contains("1 descriptors were made for 0 handles"), "{error}");
        // `dump` takes the first handle of an object that has none.
        let error = context.dump(kind, &Default::default()).unwrap_err();
        assert_eq!(error.source.kind, ErrorKind::Panicked);
        assert!(error.to_string().contains("plugin eventfd panicked in dump"), "{error}");
        assert!(watch.read().is_empty());
    });
}

#[test]
fn the_status_page_outlives_the_process_that_wrote_it() {
    let watch = HookWatch::new().unwrap();
    let outer = watch.enter("outer", "dump", 7, "a");
    // SAFETY: the child only touches the page and ends by _exit.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            std::mem::forget(watch.enter("crashing", "create", 9, &"long ".repeat(100)));
            // SAFETY: ends the process.
            unsafe { nix::libc::_exit(3) };
        }
        nix::unistd::ForkResult::Parent { child } => {
            nix::sys::wait::waitpid(child, None).unwrap();
        }
    }
    let hooks = watch.read();
    assert_eq!(hooks.len(), 2);
    assert_eq!((hooks[0].plugin.as_str(), hooks[0].task), ("outer", 7));
    assert_eq!((hooks[1].plugin.as_str(), hooks[1].hook.as_str(), hooks[1].task), ("crashing", "create", 9));
    assert!(hooks[1].object.starts_with("long long"));
    drop(outer);
    assert_eq!(watch.read().len(), 1);
}

#[test]
fn many_threads_share_the_page() {
    let watch = HookWatch::new().unwrap();
    let start = std::time::Instant::now();
    std::thread::scope(|scope| {
        for task in 0..8 {
            scope.spawn(move || {
                for _ in 0..2_000 {
                    let _running = watch.enter("plugin", "dump", task, "pipe:[4711]");
                    for hook in watch.read().iter().take(1) {
                        assert_eq!(hook.plugin, "plugin");
                    }
                }
            });
        }
    });
    println!("16,000 enters with reads in {:?}", start.elapsed());
    assert!(watch.read().is_empty());
}

/// How long 12 plugins take: copies under other names, each a library of its own to the dynamic loader.
#[test]
fn loading_is_fast() {
    let Some(file) = plugin_file() else { return };
    let directory = tempfile::tempdir().unwrap();
    let mut times = Vec::new();
    for i in 0..12 {
        let copy = directory.path().join(format!("{i}.so"));
        fs::copy(&file, &copy).unwrap();
        let start = std::time::Instant::now();
        load(&copy).unwrap();
        times.push(start.elapsed());
    }
    println!("{times:?}");
    assert!(times.iter().sum::<std::time::Duration>().as_millis() < 1_000, "{times:?}");
}

/// Every plugin that was built, in a directory of links.
fn all_plugins() -> Option<tempfile::TempDir> {
    let file = plugin_file()?;
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(file.parent()?).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with("libstasis_plugin_") && name.ends_with(".so") {
            std::os::unix::fs::symlink(entry.path(), directory.path().join(name)).unwrap();
        }
    }
    Some(directory)
}

/// What `stasis inspect` knows of a record is what its plugin tells: the names of its fields.
#[test]
fn every_record_of_every_plugin_can_be_shown() {
    let Some(directory) = all_plugins() else { return };
    let registry = Registry::load(&choice(directory.path())).unwrap();
    assert!(registry.plugins().len() > 15);
    for plugin in registry.plugins() {
        let pool = prost_reflect::DescriptorPool::decode(plugin.records.as_slice()).unwrap();
        for (sort, kind) in plugin.kinds() {
            let name = format!("{}/{}", plugin.name, kind.name);
            if ["session", "lifecycle"].contains(&sort) {
                assert_eq!(kind.message, "", "{name}");
                continue;
            }
            let message = pool.get_message_by_name(&kind.message);
            let message = message.unwrap_or_else(|| panic!("{name}: {} is not described", kind.message));
            let opaque = |field: prost_reflect::FieldDescriptor| field.kind() == prost_reflect::Kind::Bytes;
            let fields: Vec<_> = message.fields().collect();
            assert!(fields.len() != 1 || !fields.into_iter().all(opaque), "{name}: its record is opaque");
        }
    }
}
