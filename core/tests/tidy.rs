//! House rules that a compiler does not check: which way dependencies run, that core knows no resource kind by name, that
//! files stay readable at a sitting, and that every plugin folder looks alike.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Words that name a resource kind: in core they are a fault of the design.
const RESOURCE_WORDS: &[&str] = &[
    "eventfd",
    "inotify",
    "epoll",
    "signalfd",
    "timerfd",
    "fanotify",
    "pidfd_plugin",
    "sysvipc",
    "netlink",
    "tcp",
];
/// Kernel interfaces that core uses as tools of its own, and words of another tool's interface that are only passed on: (end of the
/// path, or folder in it; word).
const OWN_TOOLS: &[(&str, &str)] = &[("front.rs", "signalfd"), ("src/criu/", "tcp")];
/// A file longer than this has outgrown one sitting.
const MAX_LINES: usize = 600;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

fn sources(below: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut queue = vec![below.to_path_buf()];
    while let Some(dir) = queue.pop() {
        for entry in fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
                queue.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    found
}

#[test]
fn core_names_no_resource_kind() {
    let mut found = Vec::new();
    for (path, text) in sources(&root().join("core/src")) {
        for (number, line) in text.lines().enumerate() {
            let code = line.to_lowercase();
            // System calls that core itself rewinds or uses are named by their numbers' constants.
            let words = code.split(|c: char| !c.is_ascii_alphanumeric());
            let own = |word: &str| {
                OWN_TOOLS.iter().any(|(place, tool)| {
                    *tool == word && (path.ends_with(place) || path.to_string_lossy().contains(place))
                })
            };
            for word in words.filter(|word| RESOURCE_WORDS.contains(word) && !own(word)) {
                found.push(format!("{}:{}: {word}", path.display(), number + 1));
            }
        }
    }
    assert!(found.is_empty(), "core names resource kinds:\n{}", found.join("\n"));
}

#[test]
fn no_source_file_outgrows_one_sitting() {
    let mut long = Vec::new();
    for room in ["core", "plugin-api", "plugins", "parasite", "restorer", "tests"] {
        for (path, text) in sources(&root().join(room)) {
            let lines = text.lines().count();
            if lines > MAX_LINES {
                long.push(format!("{lines} lines: {}", path.display()));
            }
        }
    }
    assert!(long.is_empty(), "find the seam of:\n{}", long.join("\n"));
}

#[test]
fn dependencies_run_one_way() {
    let manifest = |dir: &str| fs::read_to_string(root().join(dir).join("Cargo.toml")).unwrap();
    assert!(!manifest("plugin-api").contains("stasis-plugin-api ="), "plugin-api knows nobody");
    assert!(!manifest("plugin-api").contains("\nstasis"), "plugin-api knows nobody");
    assert!(!manifest("core").contains("stasis-plugin-api-"), "core knows no plugin");
    for plugin in fs::read_dir(root().join("plugins")).unwrap() {
        let name = plugin.unwrap().file_name().into_string().unwrap();
        let text = manifest(&format!("plugins/{name}"));
        assert!(text.contains(&format!("name = \"stasis-plugin-{name}\"")), "{name}: package name");
        let known = text.lines().filter(|line| line.starts_with("stasis"));
        for line in known {
            assert!(line.starts_with("stasis-plugin-api"), "{name} may know plugin-api alone, not: {line}");
        }
        assert!(!manifest("core").contains(&format!("stasis-plugin-{name} ")), "core knows no plugin");
    }
}

#[test]
fn plugins_of_others_know_the_api_alone() {
    for (path, _) in sources(&root().join("tests/external-plugin")) {
        let Some(manifest) = path.ancestors().map(|dir| dir.join("Cargo.toml")).find(|file| file.is_file())
        else {
            continue;
        };
        for line in fs::read_to_string(&manifest).unwrap().lines().filter(|line| line.starts_with("stasis")) {
            assert!(line.starts_with("stasis-plugin-api"), "{}: {line}", manifest.display());
        }
    }
}

#[test]
fn plugin_folders_look_alike() {
    for plugin in fs::read_dir(root().join("plugins")).unwrap() {
        let dir = plugin.unwrap().path();
        for file in ["Cargo.toml", "build.rs", "record.proto", "src/lib.rs"] {
            assert!(dir.join(file).is_file(), "{} has no {file}", dir.display());
        }
    }
}
