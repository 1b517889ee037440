//! What a caller says: flags by the table, and an action. Read from a command line or a configuration file.

use super::flags::{Flag, Role, Takes};
use crate::cli::LogError;
use lexopt::{Arg, ValueExt};
use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

/// The command line, a configuration file or a request is wrong.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// There is no such flag.
    #[error(
        "unknown flag {0} (stasis knows the flags of CRIU 4.2; options of plugins need its own command line)"
    )]
    UnknownFlag(String),
    /// It needs something that is not there.
    #[error("--{flag}: {why}")]
    Refused {
        /// Without the dashes.
        flag: &'static str,
        /// What is not there.
        why: &'static str,
    },
    /// There is no such action.
    #[error("{action}: {why}")]
    NoSuchAction {
        /// As given.
        action: String,
        /// Why not.
        why: &'static str,
    },
    /// The socket to the caller cannot be used.
    #[error("swrk {number}: {why}")]
    Socket {
        /// As given.
        number: String,
        /// Why not.
        why: String,
    },
    /// The directories cannot be used.
    #[error("cannot {operation} {path}: {source}")]
    Directory {
        /// What was tried.
        operation: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The log cannot be opened.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Not as the table says.
    #[error(transparent)]
    Form(#[from] lexopt::Error),
    /// A value cannot be understood.
    #[error("--{flag} {value}: {why}")]
    Value {
        /// Without the dashes.
        flag: &'static str,
        /// As given.
        value: String,
        /// What is wrong.
        why: String,
    },
    /// Something is missing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A configuration file cannot be read.
    #[error("configuration file {path}: {source}")]
    Config {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line of it is wrong.
    #[error("configuration file {path}, line {line}: {source}")]
    ConfigLine {
        /// Its path.
        path: PathBuf,
        /// The first is 1.
        line: usize,
        /// What is wrong.
        source: Box<UsageError>,
    },
}

/// Flags with their values, in order, and the words between them.
#[derive(Debug, Default)]
pub struct Arguments {
    given: Vec<(&'static Flag, Option<String>)>,
    /// The action, and what belongs to it.
    pub words: Vec<String>,
}

impl Arguments {
    /// Reads a command line without the program's name.
    pub fn parse(line: impl IntoIterator<Item = OsString>) -> Result<Self, UsageError> {
        let mut parser = lexopt::Parser::from_args(line);
        let mut arguments = Self::default();
        while let Some(argument) = parser.next()? {
            let (name, flag) = match argument {
                Arg::Value(word) => {
                    arguments.words.push(word.string()?);
                    continue;
                }
                Arg::Long(name) => (format!("--{name}"), Flag::find(name)),
                Arg::Short(letter) => (format!("-{letter}"), Flag::find_short(letter)),
            };
            let flag = flag.ok_or(UsageError::UnknownFlag(name))?;
            let value = match flag.takes {
                Takes::Nothing => None,
                Takes::Value => Some(parser.value()?.string()?),
                Takes::Optional => parser.optional_value().map(ValueExt::string).transpose()?,
            };
            arguments.add(flag, value)?;
        }
        Ok(arguments)
    }

    /// Adds a flag, unless it is one that is refused.
    pub fn add(&mut self, flag: &'static Flag, value: Option<String>) -> Result<(), UsageError> {
        if let Role::Refused(why) = flag.role {
            return Err(UsageError::Refused { flag: flag.long, why });
        }
        self.given.push((flag, value));
        Ok(())
    }

    /// Adds a flag of the table by its name.
    pub fn add_named(&mut self, name: &str, value: Option<String>) -> Result<(), UsageError> {
        let flag = Flag::find(name).ok_or_else(|| UsageError::UnknownFlag(format!("--{name}")))?;
        self.add(flag, value)
    }

    /// Reads a configuration file: a flag without its dashes on each line, then its value, if any.
    pub fn read_config(path: &Path) -> Result<Self, UsageError> {
        let failed = |source| UsageError::Config { path: path.to_owned(), source };
        let text = fs::read_to_string(path).map_err(failed)?;
        let mut arguments = Self::default();
        for (line, content) in (1..).zip(text.lines()) {
            let content = content.split('#').next().unwrap_or_default().trim();
            let (name, value) = match content.split_once(|c: char| c.is_whitespace() || c == '=') {
                Some((name, value)) => (name, Some(value.trim().to_owned())),
                None => (content, None),
            };
            if name.is_empty() {
                continue;
            }
            let added = match Flag::find(name) {
                Some(flag) if flag.takes == Takes::Value && value.is_none() => {
                    Err(UsageError::Missing("a value"))
                }
                _ => arguments.add_named(name, value),
            };
            added.map_err(|source| UsageError::ConfigLine {
                path: path.to_owned(),
                line,
                source: Box::new(source),
            })?;
        }
        Ok(arguments)
    }

    /// Puts the flags of `weaker` before all others: where the last one counts, they do not.
    pub fn prepend(&mut self, weaker: Self) {
        self.given.splice(0..0, weaker.given);
    }

    /// Adds the flags of `stronger` after all others.
    pub fn append(&mut self, stronger: Self) {
        self.given.extend(stronger.given);
    }

    /// Whether a flag was given.
    pub fn has(&self, name: &str) -> bool {
        self.given.iter().any(|(flag, _)| flag.long == name)
    }

    /// The value of a flag; that of the last, if there are several.
    pub fn last(&self, name: &str) -> Option<&str> {
        self.all(name).next_back()
    }

    /// All values of a flag.
    pub fn all(&self, name: &str) -> impl DoubleEndedIterator<Item = &str> {
        self.given.iter().filter(move |(flag, _)| flag.long == name).filter_map(|(_, value)| value.as_deref())
    }

    /// All flags with their values.
    pub fn iter(&self) -> impl Iterator<Item = (&'static Flag, Option<&str>)> {
        self.given.iter().map(|(flag, value)| (*flag, value.as_deref()))
    }

    /// `-v`, `-vvv` or `-vN`: what may be logged, from 1 (errors) to 4 (everything).
    pub fn verbosity(&self) -> Result<u8, UsageError> {
        const FLAG: &str = "verbosity";
        const WARNINGS: u8 = 2;
        let mut level = None;
        for (_, value) in self.given.iter().filter(|(flag, _)| flag.long == FLAG) {
            level = Some(match value.as_deref() {
                None => level.unwrap_or(0) + 1,
                Some(letters) if letters.chars().all(|letter| letter == 'v') => {
                    u8::try_from(letters.len()).unwrap_or(u8::MAX).saturating_add(1)
                }
                Some(number) => number.parse().map_err(|_| UsageError::Value {
                    flag: FLAG,
                    value: number.to_owned(),
                    why: "not a number".into(),
                })?,
            });
        }
        Ok(level.unwrap_or(WARNINGS))
    }
}

#[cfg(test)]
#[path = "arguments_tests.rs"]
mod tests;
