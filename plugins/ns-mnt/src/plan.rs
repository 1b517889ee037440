//! How each mount of the tree is to be made again.

use crate::{
    external::External,
    mountinfo::{self, Line, below, join},
    propagation,
    record::stasis::ns_mnt::v1::{Class, Mount},
    types::{self, Treatment},
};
use stasis_plugin_api::{HookError, Result};

/// What there is.
pub(crate) struct Scene<'a> {
    /// Mounts of the tree, of one namespace after the other, parents before children.
    pub theirs: &'a [Line],
    /// Those of stasis's own namespace.
    pub ours: &'a [Line],
    /// What the user said.
    pub external: &'a External,
    /// Types of file systems that live on block devices.
    pub on_devices: &'a [String],
    /// Whether a path of ours leads to this mount of ours.
    pub visible: &'a dyn Fn(&str, &Line) -> bool,
}

impl Scene<'_> {
    /// The records of all mounts.
    pub fn plan(&self) -> Result<Vec<Mount>> {
        // Which mount of ours is the same.
        let mut same: Vec<Option<u32>> = Vec::with_capacity(self.theirs.len());
        let mut mounts: Vec<Mount> = Vec::with_capacity(self.theirs.len());
        for (index, line) in self.theirs.iter().enumerate() {
            if let Err(option) = mountinfo::flags(&line.options) {
                let why = format!("it has the option {option}");
                return Err(HookError::unsupported(line.label(), why, ""));
            }
            let parent = self.parent(index);
            let twin = self.twin(line, parent.map(|parent| same[parent]));
            same.push(twin);
            let mut mount = Mount {
                parent: parent.map_or(-1, |index| index as i32),
                namespace: line.namespace as u32,
                mountpoint: line.mountpoint.clone(),
                root: line.root.clone(),
                fstype: line.fstype.clone(),
                source: line.source.clone(),
                options: line.options.clone(),
                super_options: line.super_options.clone(),
                removed: u32::from(line.split_root().1),
                ..Mount::default()
            };
            let class = self.class(index, twin.is_some(), &mut mount)?;
            mount.set_class(class);
            mounts.push(mount);
        }
        propagation::describe(self, &mut mounts)?;
        Ok(mounts)
    }

    fn parent(&self, index: usize) -> Option<usize> {
        let line = &self.theirs[index];
        self.theirs.iter().position(|other| other.id == line.parent && other.id != line.id)
    }

    /// The same mount of our own namespace; `parent` is that of its parent.
    fn twin(&self, line: &Line, parent: Option<Option<u32>>) -> Option<u32> {
        let ours = self.ours;
        let there = match parent {
            None => ours.iter().find(|our| !ours.iter().any(|other| other.id == our.parent)),
            Some(parent) => ours.iter().find(|our| {
                Some(our.parent) == parent && our.mountpoint == line.mountpoint && our.dev == line.dev
            }),
        };
        let equal = |our: &&Line| (&our.dev, &our.root, &our.fstype) == (&line.dev, &line.root, &line.fstype);
        there.filter(equal).map(|our| our.id)
    }

    /// Another mount of the tree that shows all that this one does: the one that shows most.
    fn origin(&self, index: usize) -> Option<(usize, String)> {
        let line = &self.theirs[index];
        let (root, _) = line.split_root();
        let wider = |(other, of): &(usize, &Line)| {
            let (of_root, removed) = of.split_root();
            let more =
                (of_root.len(), *other) < (root.len(), index) || line.split_root().1 && *other != index;
            !removed && Self::same_source(of, line) && more && below(root, of_root).is_some()
        };
        let candidates = self.theirs.iter().enumerate().filter(wider);
        let (other, of) = candidates.min_by_key(|(other, of)| (of.root.len(), *other))?;
        Some((other, below(root, &of.root)?.to_owned()))
    }

    /// A bind mount has the source of its origin; with another one, it is a second mount of a file system that there is once.
    fn same_source(of: &Line, line: &Line) -> bool {
        (&of.dev, &of.fstype, &of.source) == (&line.dev, &line.fstype, &line.source)
    }

    /// Where our own namespace shows the same directory or file.
    fn host_path(&self, line: &Line) -> Option<String> {
        let (root, removed) = line.split_root();
        self.ours.iter().filter(|our| Self::same_source(our, line)).find_map(|our| {
            let path = join(&our.mountpoint, below(root, &our.root)?);
            let place = if removed { path.rsplit_once('/').map_or("/", |(parent, _)| parent) } else { &path };
            (self.visible)(if place.is_empty() { "/" } else { place }, our).then_some(path)
        })
    }

    fn class(&self, index: usize, twin: bool, mount: &mut Mount) -> Result<Class> {
        let line = &self.theirs[index];
        let refuse = |why: &str, remedy: &str| Err(HookError::unsupported(line.label(), why, remedy));
        if let Some(key) = self.external.find(&line.mountpoint) {
            mount.key = key.to_owned();
            return Ok(Class::Named);
        }
        if twin {
            return Ok(Class::Inherited);
        }
        let host_path = self.host_path(line);
        if let Some((of, within)) = self.origin(index) {
            // What the host has is found there, but what is below the root of the tree moves with that.
            let moves = self.parent(of).is_none() && !self.is_twin_of_root(of);
            if moves || host_path.is_none() {
                (mount.of, mount.within) = (of as u32, within);
                return Ok(Class::Internal);
            }
        }
        let is_root = mount.parent < 0;
        let known = types::find(&line.fstype, &self.external.enabled, self.on_devices);
        if let Some(path) = host_path {
            mount.host_path = path;
            return Ok(Class::External);
        }
        if mount.removed != 0 {
            return refuse(
                "the file or directory that it shows was removed, and the rest is mounted nowhere",
                "",
            );
        }
        match known.treatment {
            Treatment::Contents => Ok(Class::Contents),
            // Given by `--root`.
            _ if is_root => Ok(Class::External),
            Treatment::Late if line.root != "/" => {
                let why = format!("it shows {} of a file system that is mounted nowhere else", line.root);
                refuse(&why, "")
            }
            Treatment::Instance | Treatment::Empty | Treatment::Late => Ok(Class::Fresh),
            Treatment::Refused(why) => refuse(
                why,
                &format!(
                    "unmount it; or name it --external mnt[{}]:KEY, and give --external mnt[KEY]:SOURCE at the \
                     restore; or --enable-fs={} if an empty new one will do",
                    line.mountpoint, line.fstype
                ),
            ),
        }
    }

    fn is_twin_of_root(&self, index: usize) -> bool {
        self.twin(&self.theirs[index], None).is_some()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const OURS: &str = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
22 27 0:21 / /proc rw,relatime - proc proc rw
24 27 0:6 / /dev rw,relatime shared:7 - devtmpfs devtmpfs rw
31 24 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw
";

    pub(crate) fn planned(theirs: &str, external: &External) -> Result<Vec<Mount>> {
        let (theirs, ours) = (mountinfo::parse(theirs)?, mountinfo::parse(OURS)?);
        let visible = |_: &str, _: &Line| true;
        let (theirs, ours) = (&theirs, &ours);
        Scene { theirs, ours, external, on_devices: &["ext4".into()], visible: &visible }.plan()
    }

    fn classes(theirs: &str) -> Result<Vec<Class>> {
        Ok(planned(theirs, &External::default())?.iter().map(Mount::class).collect())
    }

    use Class::{Contents, External as OfHost, Fresh, Inherited, Internal, Named};

    #[test]
    fn a_copy_with_its_own_proc_is_mostly_inherited() {
        let theirs = "127 1 254:0 / / rw,relatime - ext4 /dev/vda rw
122 127 0:21 / /proc rw,relatime - proc proc rw
124 127 0:6 / /dev rw,relatime - devtmpfs devtmpfs rw
131 124 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw
140 122 0:50 / /proc rw,nosuid - proc proc rw
141 127 0:51 / /tmp rw,relatime shared:9 - tmpfs tmpfs rw
142 127 254:0 /etc /mnt ro,relatime - ext4 /dev/vda rw
143 141 0:51 /x /tmp/y rw,relatime - tmpfs tmpfs rw
";
        let expected = [Inherited, Inherited, Inherited, Inherited, Fresh, Contents, OfHost, Internal];
        assert_eq!(classes(theirs).unwrap(), expected);
    }

    #[test]
    fn a_container_is_made_from_its_root() {
        let theirs = "66 43 254:0 /c/rootfs / rw,relatime shared:1 - ext4 /dev/vda rw
67 66 0:40 / /dev rw,relatime shared:2 - tmpfs none rw,size=492k,mode=755
68 66 0:41 / /proc rw shared:8 - proc proc rw
70 68 0:41 /sys /proc/sys ro,relatime shared:9 - proc proc rw
45 70 0:40 /.boot//deleted /proc/sys/boot ro,relatime shared:2 - tmpfs none rw,size=492k,mode=755
74 66 254:0 /usr/lib /lib ro,relatime shared:13 - ext4 /dev/vda rw
75 66 254:0 /c/rootfs/data /mnt ro,relatime - ext4 /dev/vda rw
76 66 0:99 /sub /sub ro,relatime - tmpfs none rw
77 66 0:9 / /fuse ro,relatime - fuse.x none rw
";
        let external = External { pairs: vec![("/fuse".into(), "f".into())], ..External::default() };
        let mounts = planned(theirs, &external).unwrap();
        let at = |path: &str| mounts.iter().find(|mount| mount.mountpoint == path).unwrap();
        let class = |path| at(path).class();
        assert_eq!(
            ["/", "/dev", "/proc", "/proc/sys", "/proc/sys/boot", "/lib", "/mnt", "/sub", "/fuse"].map(class),
            [OfHost, Contents, Fresh, Internal, Internal, OfHost, Internal, Contents, Named]
        );
        assert_eq!((at("/").host_path.as_str(), at("/lib").host_path.as_str()), ("/c/rootfs", "/usr/lib"));
        assert_eq!((at("/proc/sys/boot").within.as_str(), at("/proc/sys/boot").removed), (".boot", 1));
        assert_eq!(at("/mnt").within, "data");
        assert_eq!(at("/fuse").key, "f");
        assert_eq!(at("/dev").group, at("/proc/sys/boot").group);
    }

    #[test]
    fn what_is_not_covered_is_refused_by_name() {
        let root = "127 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n";
        for (line, why) in [
            ("130 127 0:60 / /x rw,relatime - autofs systemd-1 rw", "automounter"),
            ("130 127 0:60 / /x rw,relatime - fuse.y y rw", "--enable-fs=fuse.y"),
            ("130 127 0:60 / /x rw,relatime master:4 - tmpfs tmpfs rw", "group 4"),
            ("130 127 0:6 / /x rw,relatime master:7 - devtmpfs devtmpfs rw", "--enable-external-masters"),
            ("130 127 0:6 / /x rw,relatime shared:7 - devtmpfs devtmpfs rw", "--enable-external-sharing"),
            ("130 127 0:60 / /x rw,idmapped - tmpfs tmpfs rw", "idmapped"),
            ("130 127 0:60 /sub /x rw - overlay overlay rw", "/sub"),
        ] {
            let error = classes(&format!("{root}{line}\n")).unwrap_err();
            let text = format!("{error}");
            assert!(text.contains(why) && text.contains("mount /x"), "{text}");
        }
    }
}
