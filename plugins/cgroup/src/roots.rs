//! Paths of groups, and what `--cgroup-root` makes of them.

use crate::hierarchy::Mounted;

/// The rest of `path` below `root`, beginning with a slash or empty; none if it is not below it.
pub fn below<'a>(path: &'a str, root: &str) -> Option<&'a str> {
    let root = root.trim_end_matches('/');
    let rest = path.strip_prefix(root)?;
    match rest {
        "" | "/" => Some(""),
        _ if rest.starts_with('/') => Some(rest),
        _ => None,
    }
}

/// The longest path that all are at or below.
pub fn common<'a>(paths: impl IntoIterator<Item = &'a str>) -> String {
    let mut paths = paths.into_iter();
    let first = paths.next().unwrap_or("/");
    let mut common: Vec<&str> = parts(first).collect();
    for path in paths {
        let same = common.iter().zip(parts(path)).take_while(|(a, b)| **a == *b).count();
        common.truncate(same);
    }
    format!("/{}", common.join("/"))
}

fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty())
}

/// All groups above a path, from the top, without the root of the hierarchy and itself.
pub fn ancestors(path: &str) -> Vec<String> {
    let parts: Vec<&str> = parts(path).collect();
    (1..parts.len()).map(|n| format!("/{}", parts[..n].join("/"))).collect()
}

/// The new roots that the user gave.
#[derive(Debug, Default)]
pub struct NewRoots {
    /// (controller or controllers, path)
    named: Vec<(String, String)>,
    /// For all others.
    all: Option<String>,
}

impl NewRoots {
    /// From `[CONTROLLER:]PATH`s.
    pub fn parse<'a>(values: impl IntoIterator<Item = &'a str>) -> Self {
        let mut roots = Self::default();
        for value in values {
            match value.split_once(':') {
                // A path may hold a colon.
                Some((name, path)) if !name.is_empty() && !name.starts_with('/') => {
                    roots.named.push((name.to_owned(), absolute(path)));
                }
                Some(("", path)) => roots.all = Some(absolute(path)),
                _ => roots.all = Some(absolute(value)),
            }
        }
        roots
    }

    /// That of a hierarchy. Names that belong to none are nobody's.
    pub fn of(&self, mounted: &Mounted) -> Option<&str> {
        if self.named.is_empty() {
            return self.all.as_deref();
        }
        let known = mounted.names();
        let names = |given: &str| given.split(',').any(|name| known.iter().any(|other| other == name));
        let named = self.named.iter().rev().find(|(given, _)| names(given));
        named.map(|(_, path)| path.as_str()).or(self.all.as_deref())
    }
}

fn absolute(path: &str) -> String {
    format!("/{}", parts(path).collect::<Vec<_>>().join("/"))
}

/// Where a path leads when `root` has moved to `new`.
pub fn moved(path: &str, root: &str, new: Option<&str>) -> String {
    match (below(path, root), new) {
        (Some(rest), Some(new)) => match format!("{}{rest}", new.trim_end_matches('/')) {
            path if path.is_empty() => "/".into(),
            path => path,
        },
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_below_a_root() {
        for (path, root, rest) in [
            ("/a/b", "/a", Some("/b")),
            ("/a", "/a", Some("")),
            ("/ab", "/a", None),
            ("/x", "/a", None),
            ("/x", "/", Some("/x")),
            ("/", "/", Some("")),
        ] {
            assert_eq!(below(path, root), rest, "{path} {root}");
        }
    }

    #[test]
    fn common_paths_and_ancestors() {
        assert_eq!(common(["/a/b/c", "/a/b/d", "/a/b"]), "/a/b");
        assert_eq!(common(["/a", "/b"]), "/");
        assert_eq!(common(["/a/b"]), "/a/b");
        assert_eq!(common([]), "/");
        assert_eq!(ancestors("/a/b/c"), ["/a", "/a/b"]);
        assert_eq!(ancestors("/a"), [""; 0]);
        assert_eq!(ancestors("/"), [""; 0]);
    }

    #[test]
    fn roots_move() {
        for (path, root, new, to) in [
            ("/a/b", "/a", Some("/n"), "/n/b"),
            ("/a", "/a", Some("/n/m"), "/n/m"),
            ("/", "/", Some("/n"), "/n"),
            ("/b", "/", Some("/n"), "/n/b"),
            ("/a/b", "/a", Some("/"), "/b"),
            ("/a", "/a", Some("/"), "/"),
            ("/other", "/a", Some("/n"), "/other"),
            ("/a/b", "/a", None, "/a/b"),
        ] {
            assert_eq!(moved(path, root, new), to, "{path} {root} {new:?}");
        }
    }

    #[test]
    fn new_roots_by_controller() {
        let mounted = |names: &[&str]| Mounted {
            directory: "/nowhere".into(),
            controllers: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        let roots = NewRoots::parse(["cpu,cpuacct:/c", "name=systemd:s/", ":/all", "foreign:/x"]);
        assert_eq!(roots.of(&mounted(&["rw", "cpu", "cpuacct"])), Some("/c"));
        assert_eq!(roots.of(&mounted(&["name=systemd"])), Some("/s"));
        assert_eq!(roots.of(&mounted(&["memory"])), Some("/all"));
        assert_eq!(roots.of(&mounted(&[])), Some("/all"));
        assert_eq!(NewRoots::parse(["/a:b"]).of(&mounted(&["cpu"])), Some("/a:b"));
        assert_eq!(NewRoots::parse([]).of(&mounted(&["cpu"])), None);
    }
}
