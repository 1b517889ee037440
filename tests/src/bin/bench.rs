//! `stasis-bench`: the cases of the speed table with one tool, or with two in turn (`--peer PATH`).

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use stasis_tests::bench::{self, cases, report};
use stasis_tests::scenario::base_dir;
use stasis_tests::tool::Tool;
use stasis_tests::{ctl, sandbox};

/// Measures frozen time, dump, restore and image size.
#[derive(Debug, Parser)]
struct Args {
    /// The tool to measure [default: $STASIS_BIN, or the stasis next to this binary]
    #[arg(long)]
    tool: Option<PathBuf>,
    /// Another tool with CRIU's flags, run in turn with the first
    #[arg(long)]
    peer: Option<PathBuf>,
    /// How often each case runs
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Only these cases, by name
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// Print the samples as JSON
    #[arg(long)]
    json: bool,
    /// Be the workload of a case (used by the benchmark itself)
    #[arg(long, hide = true, requires = "dir")]
    workload: Option<String>,
    /// The workload's directory
    #[arg(long, hide = true)]
    dir: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let (Some(case), Some(dir)) = (&args.workload, &args.dir) {
        return match cases::play(case, dir) {
            Ok(()) => ExitCode::SUCCESS,
            Err(fail) => {
                let _ = ctl::Ctl::new(dir).announce("result", format!("FAIL: {fail}").as_bytes());
                ExitCode::FAILURE
            }
        };
    }
    sandbox::enter(|| match measure(&args) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{error}");
            1
        }
    })
}

fn measure(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    let tool = match &args.tool {
        Some(bin) => Tool { bin: bin.clone(), peer: false },
        None => Tool::discover()?,
    };
    let peer = args.peer.as_ref().map(|bin| Tool { bin: bin.clone(), peer: true });
    std::fs::create_dir_all(base_dir())?;
    let limits = bench::limits(&base_dir())?;
    if !args.json {
        report::print_limits(&limits);
    }
    let mut rows = Vec::new();
    for case in &cases::CASES {
        if !args.cases.is_empty() && !args.cases.iter().any(|name| name == case.name) {
            continue;
        }
        let mut row =
            report::Row { case: case.name, about: case.about, tool: vec![], peer: vec![], errors: vec![] };
        for _ in 0..args.runs {
            for (label, tool) in [("own", Some(&tool)), ("peer", peer.as_ref())] {
                let Some(tool) = tool else { continue };
                match bench::run(case, tool, label) {
                    Ok(sample) if label == "own" => row.tool.push(sample),
                    Ok(sample) => row.peer.push(sample),
                    Err(failure) => row.errors.push(format!("{label}: {failure}")),
                }
            }
        }
        if !args.json {
            report::print_row(&row);
        }
        rows.push(row);
    }
    if args.json {
        let all = serde_json::json!({ "limits": limits, "cases": rows });
        println!("{}", serde_json::to_string_pretty(&all)?);
    }
    Ok(())
}
