//! Plugins from outside the workspace: built by a cargo of their own, found by `--plugin-dir` only.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::scenario::{Doing, Failure};
use crate::tool::target_dir;

/// The top of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Runs `cargo ARGS` in a crate outside the workspace; gives the directory with what was built, which is called `products`.
/// Without the network: the dependencies are those that the workspace has locked and built, and are shared with it.
pub fn cargo(products: &str, manifest_dir: &Path, args: &[&str]) -> Result<PathBuf, Failure> {
    let target = target_dir().doing("finding the target directory")?;
    let all = target.parent().unwrap_or(&target);
    let products = all.join("external").join(products);
    let lock = manifest_dir.join("Cargo.lock");
    let same_versions = || fs::copy(workspace().join("Cargo.lock"), &lock).doing("copying the lock file");
    let run = || {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(args).arg("--offline").arg("--target-dir").arg(&products).current_dir(manifest_dir);
        command.env("CARGO_BUILD_BUILD_DIR", all);
        // Those of the workspace's own profile, or its dependencies would be built a second time.
        command.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1").env("CARGO_PROFILE_DEV_DEBUG", "line-tables-only");
        command.output().doing("starting cargo")
    };
    if !lock.exists() {
        same_versions()?;
    }
    let mut output = run()?;
    if !output.status.success() {
        // The workspace may have moved on to other versions since.
        same_versions()?;
        output = run()?;
    }
    match output.status.success() {
        true => Ok(products.join("debug")),
        false => Err(Failure::Changed(
            "cargo",
            format!(
                "cargo {} in {}: {}{}",
                args.join(" "),
                manifest_dir.display(),
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            ),
        )),
    }
}

/// A directory with the plugins of the workspace, and `more` of them: (library, its name there).
pub fn plugin_dir(dir: &Path, more: &[(&Path, &str)]) -> Result<PathBuf, Failure> {
    let plugins = dir.join("plugins");
    fs::create_dir_all(&plugins).doing("making the plugin directory")?;
    let target = target_dir().doing("finding the plugins")?;
    for entry in fs::read_dir(&target).doing("finding the plugins")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("libstasis_plugin_") && name.ends_with(".so") {
            symlink(entry.path(), plugins.join(name)).doing("linking a plugin")?;
        }
    }
    for (library, name) in more {
        fs::copy(library, plugins.join(name)).doing("copying a plugin")?;
    }
    Ok(plugins)
}
