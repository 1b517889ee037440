//! The program's file: a line for each step of each counter, chained, so that a lost or repeated step shows.

use std::{collections::BTreeMap, fmt, fs, io, path::PathBuf};

/// How the chain is broken, or why it cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Break {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// The errno.
        source: io::Error,
    },
    /// A line is none that the program writes.
    #[error("line {0} of the journal is not a step: {1:?}")]
    Garbled(usize, String),
    /// A count is not one more than that before.
    #[error("{name} counted {is} after {was}")]
    Count {
        /// The counter.
        name: String,
        /// The count before.
        was: u64,
        /// The count after.
        is: u64,
    },
    /// A step did not begin where the one before had ended.
    #[error("step {count} of {name} did not go on from the result of the step before")]
    State {
        /// The counter.
        name: String,
        /// The count.
        count: u64,
    },
}

/// The last count of each counter.
#[derive(Debug, Clone, Default)]
pub struct Counters(BTreeMap<String, u64>);

/// How many counters the program has.
const COUNTERS: usize = 5;

impl Counters {
    /// Whether all counters are at least at `count`.
    pub fn all_reached(&self, count: u64) -> bool {
        self.0.len() == COUNTERS && self.0.values().all(|&now| now >= count)
    }

    /// Whether all counters are at least `steps` further than `then`.
    pub fn all_beyond(&self, then: &Counters, steps: u64) -> bool {
        self.0.len() == COUNTERS
            && self.0.iter().all(|(name, &now)| now >= then.0.get(name).copied().unwrap_or(0) + steps)
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(|(name, count)| format!("{name} {count}")).collect();
        out.write_str(&parts.join(", "))
    }
}

/// The file.
pub struct Journal {
    path: PathBuf,
}

impl Journal {
    /// A journal, which need not exist yet.
    pub fn new(path: PathBuf) -> Journal {
        Journal { path }
    }

    /// Reads all of it, checks the chain of every counter, and returns where they are.
    pub fn read(&self) -> Result<Counters, Break> {
        let text = fs::read_to_string(&self.path)
            .map_err(|source| Break::Read { path: self.path.display().to_string(), source })?;
        check(&text)
    }
}

fn check(text: &str) -> Result<Counters, Break> {
    let mut last: BTreeMap<&str, (u64, &str)> = BTreeMap::new();
    // A line without its end is one that is just being written.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    for (number, line) in whole.lines().enumerate() {
        let words: Vec<&str> = line.split(' ').collect();
        let [name, count, before, after] = words[..] else {
            return Err(Break::Garbled(number + 1, line.to_owned()));
        };
        let count: u64 = count.parse().map_err(|_| Break::Garbled(number + 1, line.to_owned()))?;
        let (was, state) = last.get(name).copied().unwrap_or((0, before));
        if count != was + 1 {
            return Err(Break::Count { name: name.to_owned(), was, is: count });
        }
        if state != before {
            return Err(Break::State { name: name.to_owned(), count });
        }
        last.insert(name, (count, after));
    }
    Ok(Counters(last.into_iter().map(|(name, (count, _))| (name.to_owned(), count)).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_chain_is_read_up_to_the_last_full_line() {
        let counters = check("a 1 x y\nb 1 p q\na 2 y z\na 3 z").unwrap();
        assert_eq!(counters.to_string(), "a 2, b 1");
    }

    #[test]
    fn gaps_repeats_and_forgotten_state_show() {
        assert!(matches!(check("a 1 x y\na 3 y z\n"), Err(Break::Count { was: 1, is: 3, .. })));
        assert!(matches!(check("a 1 x y\na 1 x y\n"), Err(Break::Count { was: 1, is: 1, .. })));
        assert!(matches!(check("a 1 x y\na 2 x y\n"), Err(Break::State { count: 2, .. })));
        assert!(matches!(check("a 1 x\n"), Err(Break::Garbled(1, _))));
    }
}
