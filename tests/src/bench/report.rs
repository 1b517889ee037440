//! Medians and the table.

use super::{Limits, Sample};

/// The samples of one case.
#[derive(Debug, serde::Serialize)]
pub struct Row {
    /// The case's name.
    pub case: &'static str,
    /// What it holds.
    pub about: &'static str,
    /// Of the tool under test.
    pub tool: Vec<Sample>,
    /// Of the other tool, if there is one.
    pub peer: Vec<Sample>,
    /// The first error of each, if any.
    pub errors: Vec<String>,
}

/// A figure: its name, its unit, and how to get it from a sample.
type Figure = (&'static str, &'static str, fn(&Sample) -> f64);

/// The figures of the table.
const FIGURES: [Figure; 5] = [
    ("frozen", "ms", |sample| sample.frozen * 1e3),
    ("snapshot", "ms", |sample| sample.snapshot * 1e3),
    ("dump", "ms", |sample| sample.dump * 1e3),
    ("restore", "ms", |sample| sample.restore * 1e3),
    ("image", "MiB", |sample| sample.image),
];

/// (median, min, max), if there is anything.
fn spread(samples: &[Sample], figure: fn(&Sample) -> f64) -> Option<(f64, f64, f64)> {
    let mut values: Vec<f64> = samples.iter().map(figure).collect();
    values.sort_by(f64::total_cmp);
    Some((*values.get(values.len() / 2)?, *values.first()?, *values.last()?))
}

/// Prints one case.
pub fn print_row(row: &Row) {
    println!("{} ({})", row.about, row.case);
    for (name, unit, figure) in FIGURES {
        let mut line = format!("    {name:9}");
        for (who, samples) in [("", &row.tool), ("peer", &row.peer)] {
            if let Some((median, min, max)) = spread(samples, figure) {
                line += &format!(" {who:4} {median:9.1} {unit} [{min:.1} .. {max:.1}]");
            }
        }
        if let (Some(own), Some(peer)) = (spread(&row.tool, figure), spread(&row.peer, figure)) {
            line += &format!("  peer/own {:.2}", peer.0 / own.0);
        }
        println!("{line}");
    }
    for error in &row.errors {
        println!("    {error}");
    }
}

/// Prints what the machine can do.
pub fn print_limits(limits: &Limits) {
    println!(
        "this machine: memcpy {:.1} GiB/s, write {:.1} GiB/s ({:.1} with fdatasync), fork {:.2} ms",
        limits.memcpy, limits.write, limits.write_sync, limits.fork
    );
}
