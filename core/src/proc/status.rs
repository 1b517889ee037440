//! `/proc/PID/status` and `/proc/PID/stat`, by field name and number (proc_pid_status(5), proc_pid_stat(5)).

use super::{ProcDir, ProcError};
use std::{collections::HashMap, str::FromStr};

/// The fields of a status file.
#[derive(Debug)]
pub struct Status {
    pid: i32,
    fields: HashMap<String, String>,
}

impl Status {
    /// Reads `/proc/PID/status`.
    pub fn read(proc: &ProcDir) -> Result<Self, ProcError> {
        Self::read_file(proc, "status")
    }

    /// Reads a status file elsewhere below, e.g. `task/TID/status`.
    pub fn read_file(proc: &ProcDir, file: &str) -> Result<Self, ProcError> {
        let text = proc.read_text(file)?;
        let fields = text.lines().filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_string(), value.trim().to_string()))
        });
        Ok(Self { pid: proc.pid(), fields: fields.collect() })
    }

    fn missing(&self, what: String) -> ProcError {
        ProcError::Format { pid: self.pid, file: "status", what }
    }

    /// The text of a field.
    pub fn text(&self, name: &str) -> Result<&str, ProcError> {
        self.fields.get(name).map(String::as_str).ok_or_else(|| self.missing(format!("no field {name}")))
    }

    /// The numbers of a field.
    pub fn numbers<T: FromStr>(&self, name: &str) -> Result<Vec<T>, ProcError> {
        let numbers = self.text(name)?.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>();
        numbers.map_err(|_| self.missing(format!("field {name} is not made of numbers")))
    }

    /// The last number of a field, e.g. the innermost pid of `NSpid`.
    pub fn last_number<T: FromStr + Copy>(&self, name: &str) -> Result<T, ProcError> {
        self.numbers(name)?.last().copied().ok_or_else(|| self.missing(format!("field {name} is empty")))
    }

    /// A field in hexadecimal (masks, capabilities).
    pub fn hexadecimal(&self, name: &str) -> Result<u64, ProcError> {
        u64::from_str_radix(self.text(name)?, 16)
            .map_err(|_| self.missing(format!("field {name} is no mask")))
    }

    /// A field in octal (`Umask`).
    pub fn octal(&self, name: &str) -> Result<u32, ProcError> {
        u32::from_str_radix(self.text(name)?, 8)
            .map_err(|_| self.missing(format!("field {name} is not octal")))
    }
}

/// Fields of `/proc/PID/stat` by their number in proc_pid_stat(5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum StatField {
    Ppid = 4,
    Pgrp = 5,
    Session = 6,
    TtyNr = 7,
    Tpgid = 8,
    Flags = 9,
    Nice = 19,
    StartCode = 26,
    EndCode = 27,
    StartStack = 28,
    ExitSignal = 38,
    StartData = 45,
    EndData = 46,
    StartBrk = 47,
    ArgStart = 48,
    ArgEnd = 49,
    EnvStart = 50,
    EnvEnd = 51,
    ExitCode = 52,
}

/// The numbers of a stat file.
#[derive(Debug)]
pub struct Stat {
    pid: i32,
    state: u8,
    /// From field 4 on.
    fields: Vec<i64>,
}

impl Stat {
    /// Reads `/proc/PID/stat`.
    pub fn read(proc: &ProcDir) -> Result<Self, ProcError> {
        Self::read_file(proc, "stat")
    }

    /// Reads another file of this form, `task/TID/stat`.
    pub fn read_file(proc: &ProcDir, file: &str) -> Result<Self, ProcError> {
        let text = proc.read_text(file)?;
        let format = |what: &str| ProcError::Format { pid: proc.pid(), file: "stat", what: what.into() };
        // The name stands in parentheses and may hold any character, parentheses and blanks included.
        let (_, rest) = text.rsplit_once(") ").ok_or_else(|| format("no name"))?;
        let mut words = rest.split_ascii_whitespace();
        let state = words.next().and_then(|word| word.bytes().next()).ok_or_else(|| format("no state"))?;
        // Some fields are unsigned and use all 64 bits.
        let number = |word: &str| word.parse::<i64>().or_else(|_| word.parse::<u64>().map(|n| n as i64));
        let fields = words.map(number).collect::<Result<_, _>>().map_err(|_| format("not a number"))?;
        Ok(Self { pid: proc.pid(), state, fields })
    }

    /// State letter, e.g. `Z`.
    pub fn state(&self) -> u8 {
        self.state
    }

    /// A field.
    pub fn get(&self, field: StatField) -> Result<i64, ProcError> {
        let missing =
            || ProcError::Format { pid: self.pid, file: "stat", what: format!("no field {field:?}") };
        self.fields.get(field as usize - 4).copied().ok_or_else(missing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_ourselves() {
        let proc = ProcDir::open(std::process::id() as i32).unwrap();
        let status = Status::read(&proc).unwrap();
        let stat = Stat::read(&proc).unwrap();
        assert_eq!(status.last_number::<i32>("NSpid").unwrap(), std::process::id() as i32);
        // SAFETY: getppid and getsid take no pointers.
        let (parent, session) = unsafe { (libc::getppid(), libc::getsid(0)) };
        assert_eq!(stat.get(StatField::Ppid).unwrap(), i64::from(parent));
        assert_eq!(stat.get(StatField::Session).unwrap(), i64::from(session));
        assert!(stat.get(StatField::StartStack).unwrap() > 0);
        assert!(status.text("NoSuchField").is_err());
    }
}
