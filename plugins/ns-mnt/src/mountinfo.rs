//! proc_pid_mountinfo(5).

use stasis_plugin_api::{HookError, Result};

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    /// Position of its namespace among those of the tree.
    pub namespace: usize,
    pub id: u32,
    pub parent: u32,
    pub dev: String,
    pub root: String,
    pub mountpoint: String,
    pub options: String,
    /// `shared:N`, `master:N`, ...
    pub propagation: Vec<String>,
    pub fstype: String,
    pub source: String,
    pub super_options: String,
}

/// Space, tab, newline and backslash stand there as `\ooo`.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = (*first == b'\\').then(|| tail.get(..3)).flatten();
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn line(text: &str) -> Option<Line> {
    let (left, right) = text.split_once(" - ")?;
    let mut left = left.split(' ');
    let mut right = right.split(' ');
    Some(Line {
        namespace: 0,
        id: left.next()?.parse().ok()?,
        parent: left.next()?.parse().ok()?,
        dev: left.next()?.to_owned(),
        root: unescape(left.next()?),
        mountpoint: unescape(left.next()?),
        options: left.next()?.to_owned(),
        propagation: left.map(str::to_owned).collect(),
        fstype: right.next()?.to_owned(),
        source: unescape(right.next()?),
        super_options: right.next().unwrap_or_default().to_owned(),
    })
}

/// All lines, parents before children, otherwise in the order of their making.
pub(crate) fn parse(text: &str) -> Result<Vec<Line>> {
    let mut rest = text
        .lines()
        .map(|text| line(text).ok_or_else(|| HookError::invalid(format!("mountinfo has the line {text:?}"))))
        .collect::<Result<Vec<_>>>()?;
    rest.sort_by_key(|line| line.id);
    let ids: std::collections::HashSet<u32> = rest.iter().map(|line| line.id).collect();
    let mut done = std::collections::HashSet::new();
    let mut ordered: Vec<Line> = Vec::with_capacity(rest.len());
    while !rest.is_empty() {
        let ready = rest.iter().position(|line| !ids.contains(&line.parent) || done.contains(&line.parent));
        // A cycle cannot be; if it were, the rest goes as it stands.
        let next = rest.remove(ready.unwrap_or(0));
        done.insert(next.id);
        ordered.push(next);
    }
    Ok(ordered)
}

/// What the kernel appends to the root of a mount whose directory or file was removed (show_mountinfo, fs/proc_namespace.c).
const REMOVED: &str = "//deleted";

impl Line {
    /// The root, and whether it was removed.
    pub fn split_root(&self) -> (&str, bool) {
        self.root.strip_suffix(REMOVED).map_or((self.root.as_str(), false), |root| (root, true))
    }

    /// The number of a tag such as `shared:N`, if there is one.
    pub fn tag(&self, name: &str) -> Option<u32> {
        self.propagation.iter().find_map(|tag| tag.strip_prefix(name)?.strip_prefix(':')?.parse().ok())
    }

    /// What a mount is called in messages.
    pub fn label(&self) -> String {
        format!("mount {} ({})", self.mountpoint, self.fstype)
    }
}

/// Options of a mount and their flags (mount_setattr(2)); what is missing here is refused.
#[rustfmt::skip]
const FLAGS: &[(&str, u64)] = &[
    ("rw", 0),
    ("ro", libc::MOUNT_ATTR_RDONLY),
    ("nosuid", libc::MOUNT_ATTR_NOSUID),
    ("nodev", libc::MOUNT_ATTR_NODEV),
    ("noexec", libc::MOUNT_ATTR_NOEXEC),
    ("noatime", libc::MOUNT_ATTR_NOATIME),
    ("nodiratime", libc::MOUNT_ATTR_NODIRATIME),
    ("relatime", libc::MOUNT_ATTR_RELATIME),
    ("nosymfollow", libc::MOUNT_ATTR_NOSYMFOLLOW),
];

/// The flags for the options of a mount, or the option that is not known.
pub(crate) fn flags(options: &str) -> std::result::Result<u64, &str> {
    let mut flags = 0;
    for option in options.split(',') {
        flags |= FLAGS.iter().find(|(name, _)| *name == option).map(|(_, flag)| *flag).ok_or(option)?;
    }
    // Neither noatime nor relatime: every access counts.
    let atime = |option: &str| ["noatime", "relatime"].contains(&option);
    if !options.split(',').any(atime) {
        flags |= libc::MOUNT_ATTR_STRICTATIME;
    }
    Ok(flags)
}

/// `path` below `base`, without a leading slash.
pub(crate) fn below<'a>(path: &'a str, base: &str) -> Option<&'a str> {
    let rest = path.strip_prefix(base.trim_end_matches('/'))?;
    if rest.is_empty() { Some("") } else { rest.strip_prefix('/') }
}

/// Two paths, the second relative.
pub(crate) fn join(base: &str, relative: &str) -> String {
    let relative = relative.trim_start_matches('/');
    match (base.trim_end_matches('/'), relative) {
        ("", "") => "/".to_owned(),
        (base, "") => base.to_owned(),
        (base, relative) => format!("{base}/{relative}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
40 27 0:44 / /proc rw,nosuid - proc proc rw
22 27 0:21 / /a\\040b rw,relatime shared:3 master:1 - tmpfs my\\040tmp rw,size=4k
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
39 40 0:21 / /proc ro,noatime - proc proc rw
";

    #[test]
    fn lines_are_parsed_and_ordered() {
        let lines = parse(TEXT).unwrap();
        assert_eq!(lines.iter().map(|line| line.id).collect::<Vec<_>>(), [27, 22, 40, 39]);
        assert_eq!(lines[1].mountpoint, "/a b");
        assert_eq!(lines[1].source, "my tmp");
        assert_eq!((lines[1].tag("shared"), lines[1].tag("master")), (Some(3), Some(1)));
        let removed = parse("1 0 0:1 /a//deleted / rw - tmpfs tmpfs rw").unwrap();
        assert_eq!((removed[0].split_root(), lines[1].split_root()), (("/a", true), ("/", false)));
        assert!(parse("garbage").is_err());
        assert_eq!(unescape("a\\9b\\"), "a\\9b\\");
        assert!(!parse(&std::fs::read_to_string("/proc/self/mountinfo").unwrap()).unwrap().is_empty());
    }

    #[test]
    fn options_are_flags() {
        assert_eq!(flags("rw,nosuid,relatime"), Ok(libc::MOUNT_ATTR_NOSUID));
        assert_eq!(flags("ro"), Ok(libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_STRICTATIME));
        assert_eq!(flags("rw,idmapped"), Err("idmapped"));
    }

    #[test]
    fn paths() {
        assert_eq!(below("/a/b", "/a"), Some("b"));
        assert_eq!(below("/a", "/a"), Some(""));
        assert_eq!(below("/ab", "/a"), None);
        assert_eq!(below("/ab", "/"), Some("ab"));
        assert_eq!(join("/", "proc"), "/proc");
        assert_eq!(join("/srv/c", "/proc"), "/srv/c/proc");
        assert_eq!(join("/", ""), "/");
    }
}
