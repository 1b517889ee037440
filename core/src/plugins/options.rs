//! Options that plugins declare: `--NAME[=VALUE]`.

use stasis_plugin_api::OptionDeclaration;
use std::ffi::{OsStr, OsString};

/// An option as a plugin declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeclaredOption {
    /// Without the dashes.
    pub name: String,
    /// One line of help.
    pub help: String,
    /// Whether it takes a value.
    pub takes_value: bool,
    /// Whether the value may be left out.
    pub value_optional: bool,
}

impl From<&OptionDeclaration> for DeclaredOption {
    fn from(option: &OptionDeclaration) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            name: text(option.name.as_slice()),
            help: text(option.help.as_slice()),
            takes_value: option.takes_value,
            value_optional: option.value_optional,
        }
    }
}

/// An option as the user gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenOption {
    /// Without the dashes.
    pub name: String,
    /// What stood after the `=`.
    pub value: Option<String>,
    /// Whether it is left out, with a warning, if no plugin declares it. Otherwise that is an error.
    pub if_declared: bool,
}

impl GivenOption {
    /// As the user gave it.
    pub fn new(name: &str, value: Option<String>) -> Self {
        Self { name: name.to_owned(), value, if_declared: false }
    }
}

impl DeclaredOption {
    /// Whether it can be given with, or without, a value.
    pub fn takes(&self, value: bool) -> bool {
        if value { self.takes_value } else { !self.takes_value || self.value_optional }
    }
}

/// Takes out of a command line what the subcommand itself does not know: options of plugins, which are loaded only
/// later and in another process. They are of the form `--NAME` or `--NAME=VALUE`; everything after `--` is left alone.
pub fn split_arguments(
    command: &clap::Command,
    arguments: impl IntoIterator<Item = OsString>,
) -> (Vec<OsString>, Vec<GivenOption>) {
    let mut rest = Vec::new();
    let mut given = Vec::new();
    let mut current = command;
    let mut arguments = arguments.into_iter();
    rest.extend(arguments.next());
    while let Some(argument) = arguments.next() {
        if argument == "--" {
            rest.push(argument);
            break;
        }
        let long = argument.to_str().and_then(|text| text.strip_prefix("--"));
        let Some(long) = long else {
            if let Some(subcommand) = current.find_subcommand(&argument) {
                current = subcommand;
            }
            let takes = takes_next(current, command, &argument);
            rest.push(argument);
            if takes {
                rest.extend(arguments.next());
            }
            continue;
        };
        let (name, value) = match long.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (long, None),
        };
        match [current, command].iter().find_map(|command| find_long(command, name)) {
            Some(known) => {
                let takes = value.is_none() && needs_value(known);
                rest.push(argument);
                if takes {
                    rest.extend(arguments.next());
                }
            }
            None if ["help", "version"].contains(&name) || current.get_name() == command.get_name() => {
                rest.push(argument);
            }
            None => given.push(GivenOption::new(name, value)),
        }
    }
    rest.extend(arguments);
    (rest, given)
}

fn find_long<'a>(command: &'a clap::Command, name: &str) -> Option<&'a clap::Arg> {
    command.get_arguments().find(|argument| {
        argument.get_long() == Some(name)
            || argument.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
    })
}

fn needs_value(argument: &clap::Arg) -> bool {
    argument.get_action().takes_values()
        && !argument.is_require_equals_set()
        && argument.get_num_args().is_none_or(|range| range.min_values() > 0)
}

/// Whether a cluster of short options such as `-D` swallows the next argument.
fn takes_next(current: &clap::Command, root: &clap::Command, argument: &OsStr) -> bool {
    let Some(cluster) = argument.to_str().and_then(|text| text.strip_prefix('-')) else { return false };
    let mut letters = cluster.chars();
    while let Some(letter) = letters.next() {
        let known = [current, root].iter().find_map(|command| {
            command.get_arguments().find(|argument| argument.get_short() == Some(letter))
        });
        if known.is_some_and(|known| known.get_action().takes_values()) {
            return letters.as_str().is_empty() && known.is_some_and(needs_value);
        }
    }
    false
}
