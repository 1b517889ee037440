//! Mounts that the user says are outside: `--external mnt[MOUNTPOINT]:KEY` at the dump, `--external mnt[KEY]:SOURCE` at the
//! restore; `--ext-mount-map` with the same two pairs; `mnt[]` and `auto` for whatever the host has at the same place.

use stasis_plugin_api::{Host, OptionDeclaration};

pub(crate) const MAP: OptionDeclaration = OptionDeclaration::value(
    "ext-mount-map",
    "External mounts: MOUNTPOINT:KEY at the dump, KEY:SOURCE at the restore; may be repeated",
);
pub(crate) const SHARING: OptionDeclaration = OptionDeclaration::switch(
    "enable-external-sharing",
    "Keep mounts that exchange their changes with mounts of the host",
);
pub(crate) const MASTERS: OptionDeclaration = OptionDeclaration::switch(
    "enable-external-masters",
    "Keep mounts that receive changes from mounts of the host",
);
pub(crate) const ENABLE: OptionDeclaration = OptionDeclaration::value(
    "enable-fs",
    "A type of file system of which an empty new instance will do; may be repeated",
);
pub(crate) const ROOT: OptionDeclaration =
    OptionDeclaration::value("root", "Directory of the host that is to be the root of the tree's mounts");

/// What the user said about mounts.
#[derive(Debug, Clone, Default)]
pub(crate) struct External {
    /// MOUNTPOINT and KEY, or KEY and SOURCE.
    pub pairs: Vec<(String, String)>,
    pub sharing: bool,
    pub masters: bool,
    pub enabled: Vec<String>,
}

fn values(host: &Host<'_>, option: OptionDeclaration) -> Vec<String> {
    host.option_values(&String::from_utf8_lossy(option.name.as_slice()))
}

impl External {
    /// Reads all options and keys.
    pub fn of(host: &Host<'_>) -> Self {
        let has =
            |option: OptionDeclaration| host.has_option(&String::from_utf8_lossy(option.name.as_slice()));
        let enabled = values(host, ENABLE);
        let enabled = enabled.iter().flat_map(|line| line.split(',')).map(str::to_owned).collect();
        let mut this = Self { sharing: has(SHARING), masters: has(MASTERS), enabled, ..Self::default() };
        host.externals().iter().for_each(|text| this.add_external(text));
        values(host, MAP).iter().for_each(|text| this.add_pair(text));
        this
    }

    fn add_external(&mut self, text: &str) {
        let Some((name, rest)) = text.strip_prefix("mnt[").and_then(|text| text.split_once(']')) else {
            return;
        };
        let value = rest.strip_prefix(':').unwrap_or_default();
        if name.is_empty() {
            self.sharing |= value.contains('s');
            self.masters |= value.contains('m');
        } else if value.is_empty() {
            self.pairs.push((name.to_owned(), name.to_owned()));
        } else {
            self.pairs.push((name.to_owned(), value.to_owned()));
        }
    }

    fn add_pair(&mut self, text: &str) {
        // "auto" is what happens anyway.
        if let Some((name, value)) = text.split_once(':').filter(|(name, _)| !name.is_empty()) {
            self.pairs.push((name.to_owned(), value.to_owned()));
        }
    }

    /// What stands second beside this one.
    pub fn find(&self, name: &str) -> Option<&str> {
        // The last one wins, as with other options.
        self.pairs.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// The directory that `--root` names.
pub(crate) fn root(host: &Host<'_>) -> Option<String> {
    values(host, ROOT).pop().filter(|root| !root.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_both_forms() {
        let mut external = External::default();
        for text in ["mnt[/lib]:lib", "mnt[data]", "mnt[]:ms", "tty[1:2]", "mnt[x"] {
            external.add_external(text);
        }
        for text in ["/usr:usr", "console:", "auto", ":x"] {
            external.add_pair(text);
        }
        assert!(external.sharing && external.masters);
        assert_eq!(external.find("/lib"), Some("lib"));
        assert_eq!(external.find("data"), Some("data"));
        assert_eq!((external.find("/usr"), external.find("console")), (Some("usr"), Some("")));
        assert_eq!(external.pairs.len(), 4);
    }
}
