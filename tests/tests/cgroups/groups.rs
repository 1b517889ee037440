//! Groups of a test in every hierarchy of this machine, made, looked at and taken away from outside.

use stasis_tests::scenario::{Doing, Failure, base_dir};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The groups of one test.
pub struct Groups {
    /// Path of the top one, the same in every hierarchy.
    pub top: String,
    /// Controllers, as /proc/PID/cgroup writes them, and the root's directory.
    pub roots: Vec<(String, PathBuf)>,
}

/// Where each thread is: (pid, tid) and the text of /proc.
pub type Places = BTreeMap<(i32, i32), String>;

impl Groups {
    /// Names of its own; nothing is made yet.
    pub fn of(test: &str) -> Result<Self, Failure> {
        let build =
            base_dir().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let top = format!("/{build}-{}", test.replace("::", "."));
        let text = fs::read_to_string("/proc/self/cgroup").doing("reading our cgroups")?;
        let root = |line: &str| {
            let controllers = line.split(':').nth(1)?.to_owned();
            let name = controllers.strip_prefix("name=").unwrap_or(&controllers);
            let base = Path::new("/sys/fs/cgroup");
            let candidates = match name {
                "" => [base.join("unified"), base.to_owned()],
                name => [base.join(name), base.join(name)],
            };
            let found = candidates.into_iter().find(|path| path.join("cgroup.procs").exists())?;
            Some((controllers, found))
        };
        let roots: Vec<_> = text.lines().filter_map(root).collect();
        if roots.is_empty() {
            return Err(Failure::Skipped("no hierarchy of cgroups is mounted".into()));
        }
        let groups = Self { top, roots };
        groups.remove(&groups.top)?;
        Ok(groups)
    }

    /// The directory of a group below the top in one hierarchy, if there is such a hierarchy.
    pub fn directory(&self, controllers: &str, below: &str) -> Option<PathBuf> {
        let (_, root) = self.roots.iter().find(|(name, _)| name.split(',').any(|one| one == controllers))?;
        Some(root.join(format!("{}{below}", &self.top[1..])))
    }

    /// Makes a group in every hierarchy.
    pub fn make(&self, below: &str) -> Result<(), Failure> {
        for (controllers, root) in &self.roots {
            let directory = root.join(format!("{}{below}", &self.top[1..]));
            fs::create_dir_all(&directory).doing("making a cgroup")?;
            if controllers.split(',').any(|name| name == "cpuset") {
                for file in ["cpuset.mems", "cpuset.cpus"] {
                    fs::write(directory.join(file), "0").doing("setting a cpuset")?;
                }
            }
        }
        Ok(())
    }

    /// Puts a process into a group of every hierarchy.
    pub fn put(&self, pid: i32, below: &str) -> Result<(), Failure> {
        self.roots.iter().try_for_each(|(_, root)| {
            let file = root.join(format!("{}{below}/cgroup.procs", &self.top[1..]));
            fs::write(file, pid.to_string()).doing("moving a process into a cgroup")
        })
    }

    /// Writes a setting, if this machine has it.
    pub fn set(&self, controllers: &str, below: &str, file: &str, value: &str) -> Result<(), Failure> {
        match self.directory(controllers, below) {
            Some(directory) => fs::write(directory.join(file), value).doing("setting a property"),
            None => Ok(()),
        }
    }

    /// A setting, if this machine has it.
    pub fn get(&self, controllers: &str, below: &str, file: &str) -> Option<String> {
        let text = fs::read_to_string(self.directory(controllers, below)?.join(file)).ok()?;
        Some(text.trim().to_owned())
    }

    /// Paths of all groups at or below `top`, in all hierarchies.
    pub fn existing(&self, top: &str) -> Vec<PathBuf> {
        let mut found: Vec<PathBuf> =
            self.roots.iter().map(|(_, root)| root.join(&top[1..])).filter(|path| path.is_dir()).collect();
        let mut next = 0;
        while let Some(path) = found.get(next) {
            let below = fs::read_dir(path).into_iter().flatten().flatten();
            let below: Vec<_> = below.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
            found.extend(below);
            next += 1;
        }
        found
    }

    /// Takes all groups at or below `top` away. Their last processes may still be on their way out.
    pub fn remove(&self, top: &str) -> Result<(), Failure> {
        for path in self.existing(top).iter().rev() {
            let began = Instant::now();
            while let Err(error) = fs::remove_dir(path) {
                if error.kind() == io::ErrorKind::NotFound {
                    break;
                }
                if began.elapsed() > Duration::from_secs(5) {
                    return Err(error).doing("removing a cgroup");
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        // Frozen tasks cannot be killed (version 1), and nobody could clear them away.
        for group in self.existing(&self.top) {
            for (file, text) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
                if group.join(file).exists() {
                    let _ = fs::write(group.join(file), text);
                }
            }
        }
        let _ = self.remove(&self.top);
    }
}

/// Where all threads of these processes are.
pub fn places(pids: &[i32]) -> Result<Places, Failure> {
    let mut places = Places::new();
    for &pid in pids {
        for thread in fs::read_dir(format!("/proc/{pid}/task")).doing("reading the threads")?.flatten() {
            let text =
                fs::read_to_string(thread.path().join("cgroup")).doing("reading the cgroups of a thread")?;
            let tid = thread.file_name().to_string_lossy().parse().unwrap_or(0);
            places.insert((pid, tid), text);
        }
    }
    Ok(places)
}
