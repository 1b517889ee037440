//! Who else could have written a plugin: code that root runs must be root's.

use super::{PluginFile, PluginsError};
use nix::unistd::geteuid;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// A library or directory that others can change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Untrusted {
    /// Where it is.
    pub path: PathBuf,
    /// How others can change it.
    pub why: Exposure,
}

/// How others can change a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exposure {
    /// It belongs to this user.
    Owner(u32),
    /// Its permissions let others write.
    Mode(u32),
}

impl fmt::Display for Untrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.why {
            Exposure::Owner(uid) => write!(f, "{path} belongs to uid {uid} (chown root {path}"),
            Exposure::Mode(mode) => {
                write!(f, "{path} is writable by others, mode {mode:04o} (chmod go-w {path}")
            }
        }?;
        f.write_str(", or --allow-unsafe-plugins if you trust them)")
    }
}

/// Fails with everything that others can change, if we are root: the libraries, the directories that they are in, also where
/// symbolic links lead, and directories above in which everybody may rename.
pub fn check(files: &[PluginFile]) -> Result<(), PluginsError> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let mut untrusted = BTreeSet::new();
    let mut seen = BTreeSet::new();
    // Most libraries are in one directory, whose true path takes a system call for each of its parts.
    let mut directories: BTreeMap<&Path, PathBuf> = BTreeMap::new();
    for file in files {
        let read = |source| PluginsError::Read { path: file.path.clone(), source };
        let (Some(parent), Some(name)) = (file.path.parent(), file.path.file_name()) else { continue };
        let beside = match directories.get(parent) {
            Some(known) => known.clone(),
            None => directories.entry(parent).or_insert(parent.canonicalize().map_err(read)?).clone(),
        };
        let is_link = fs::symlink_metadata(&file.path).map_err(read)?.is_symlink();
        let target = if is_link { file.path.canonicalize().map_err(read)? } else { beside.join(name) };
        look(&target, Strictness::Own, &mut seen, &mut untrusted).map_err(read)?;
        for directory in target.parent().into_iter().chain([&*beside]) {
            look(directory, Strictness::Own, &mut seen, &mut untrusted).map_err(read)?;
            for above in directory.ancestors().skip(1) {
                look(above, Strictness::Above, &mut seen, &mut untrusted).map_err(read)?;
            }
        }
    }
    let list = untrusted.into_iter().map(|(path, why)| Untrusted { path, why }).collect::<Vec<_>>();
    if list.is_empty() { Ok(()) } else { Err(PluginsError::Untrusted(list)) }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Strictness {
    /// A library, or the directory that it is in.
    Own,
    /// Further up: only what lets everybody replace what is below.
    Above,
}

fn look(
    path: &Path,
    strictness: Strictness,
    seen: &mut BTreeSet<(PathBuf, Strictness)>,
    untrusted: &mut BTreeSet<(PathBuf, Exposure)>,
) -> io::Result<()> {
    if !seen.insert((path.to_owned(), strictness)) {
        return Ok(());
    }
    let metadata = fs::metadata(path)?;
    if let Some(why) = exposure(metadata.uid(), metadata.gid(), metadata.mode(), strictness) {
        untrusted.insert((path.to_owned(), why));
    }
    Ok(())
}

/// How a file of this owner, group and mode can be changed by others than root. Members of group 0 are as good as root.
fn exposure(uid: u32, gid: u32, mode: u32, strictness: Strictness) -> Option<Exposure> {
    let group = if gid == 0 { 0 } else { 0o020 };
    let sticky = mode & 0o1000 != 0;
    match strictness {
        Strictness::Own if uid != 0 => Some(Exposure::Owner(uid)),
        Strictness::Own if mode & (group | 0o002) != 0 => Some(Exposure::Mode(mode & 0o7777)),
        Strictness::Above if mode & 0o002 != 0 && !sticky => Some(Exposure::Mode(mode & 0o7777)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_can_change_is_told() {
        use Strictness::{Above, Own};
        let cases = [
            (0, 0, 0o100_644, Own, None),
            (0, 0, 0o100_664, Own, None),
            (0, 50, 0o100_664, Own, Some(Exposure::Mode(0o664))),
            (0, 0, 0o100_646, Own, Some(Exposure::Mode(0o646))),
            (1000, 1000, 0o100_644, Own, Some(Exposure::Owner(1000))),
            (0, 0, 0o041_777, Own, Some(Exposure::Mode(0o1777))),
            (0, 0, 0o041_777, Above, None),
            (0, 0, 0o040_777, Above, Some(Exposure::Mode(0o777))),
            (0, 50, 0o042_775, Above, None),
            (1000, 1000, 0o040_755, Above, None),
        ];
        for (uid, gid, mode, strictness, expected) in cases {
            assert_eq!(exposure(uid, gid, mode, strictness), expected, "{uid}:{gid} {mode:o}");
        }
    }

    #[test]
    fn the_remedy_is_in_the_message() {
        let path = PathBuf::from("/x/y.so");
        let text = |why| Untrusted { path: path.clone(), why }.to_string();
        assert_eq!(
            text(Exposure::Mode(0o777)),
            "/x/y.so is writable by others, mode 0777 (chmod go-w /x/y.so, or --allow-unsafe-plugins if you trust them)"
        );
        assert!(
            text(Exposure::Owner(7)).starts_with("/x/y.so belongs to uid 7 (chown root /x/y.so, or --allow")
        );
    }
}
