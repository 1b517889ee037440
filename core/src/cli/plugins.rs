//! `stasis plugins`: which plugins there are, and who claims what; `stasis plugins new`: a new one.

use super::{ExitStatus, report};
use crate::plugins::{LoadedPlugin, PluginChoice, Registry, describe_selector, scaffold};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

/// Lists the plugins: versions, files, what they claim, their options
#[derive(Debug, Args)]
pub struct PluginsArgs {
    #[command(subcommand)]
    command: Option<PluginsCommand>,
}

#[derive(Debug, Subcommand)]
enum PluginsCommand {
    New(NewArgs),
}

/// Writes a crate for a plugin of your own, with tests, which builds as it is
#[derive(Debug, Args)]
struct NewArgs {
    /// Name of the plugin
    name: String,
    /// Directory for it (default: NAME)
    directory: Option<PathBuf>,
    /// Directory of the crate stasis-plugin-api to build against (default: the one that this stasis was built with, if it is
    /// there, else the published one)
    #[arg(long, value_name = "DIR")]
    api_path: Option<PathBuf>,
}

/// Runs it. With `json`, everything is one object on stdout.
pub fn run(args: &PluginsArgs, choice: &PluginChoice, json: bool) -> ExitCode {
    match &args.command {
        Some(PluginsCommand::New(args)) => new(args, json),
        None => list(choice, json),
    }
}

fn new(args: &NewArgs, json: bool) -> ExitCode {
    let directory = args.directory.clone().unwrap_or_else(|| args.name.as_str().into());
    match scaffold(&args.name, &directory, args.api_path.as_deref()) {
        Err(error) => ExitCode::from(report::error(json, "plugins new", &error, ExitStatus::Failure as u8)),
        Ok(()) if json => {
            println!("{}", json!({ "ok": true, "directory": directory }));
            ExitCode::SUCCESS
        }
        Ok(()) => {
            let directory = directory.display();
            println!("{directory} is a plugin. To test it, and to see that it loads:");
            println!("    cd {directory} && cargo test && cargo build");
            println!("    stasis plugins --plugin-dir target/debug");
            ExitCode::SUCCESS
        }
    }
}

fn list(choice: &PluginChoice, json: bool) -> ExitCode {
    let registry = match Registry::load(choice) {
        Ok(registry) => registry,
        Err(error) => {
            match json {
                true => {
                    println!("{}", json!({ "ok": false, "operation": "plugins", "error": error.to_string() }))
                }
                false => eprintln!("stasis plugins: {error}"),
            }
            return ExitCode::FAILURE;
        }
    };
    let mut out = io::stdout().lock();
    let written = if json { writeln!(out, "{:#}", as_json(&registry)) } else { print(&mut out, &registry) };
    // A reader that closed the pipe has seen enough.
    if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn as_json(registry: &Registry) -> Value {
    let plugin = |plugin: &LoadedPlugin| {
        let kinds: Vec<Value> = plugin
            .kinds()
            .into_iter()
            .map(|(sort, kind)| {
                json!({
                    "hook": sort,
                    "kind": kind.name.as_str(),
                    "selectors": kind.selectors.iter().map(describe_selector).collect::<Vec<_>>(),
                    "after": kind.after.iter().map(|name| name.as_str()).collect::<Vec<_>>(),
                    "message": kind.message.as_str(),
                })
            })
            .collect();
        let options: Vec<Value> = plugin
            .options
            .iter()
            .map(|o| json!({ "name": o.name, "help": o.help, "takes_value": o.takes_value }))
            .collect();
        json!({
            "name": &*plugin.name,
            "version": plugin.version,
            "api_version": plugin.api_version,
            "file": plugin.file,
            "kinds": kinds,
            "options": options,
        })
    };
    json!({
        "ok": true,
        "plugins": registry.plugins().iter().map(plugin).collect::<Vec<_>>(),
        "disabled": registry.disabled().iter().map(|file| &file.path).collect::<Vec<_>>(),
    })
}

fn print(out: &mut impl Write, registry: &Registry) -> io::Result<()> {
    if registry.plugins().is_empty() {
        writeln!(out, "no plugins (see --plugin-dir)")?;
    }
    for plugin in registry.plugins() {
        writeln!(out, "{} {}  {}", plugin.name, plugin.version, plugin.file.display())?;
        for (sort, kind) in plugin.kinds() {
            let selectors: Vec<String> = kind.selectors.iter().map(describe_selector).collect();
            writeln!(out, "    {sort:<10} {:<16} {}", kind.name.as_str(), selectors.join(", "))?;
        }
        for option in &plugin.options {
            let value = match (option.takes_value, option.value_optional) {
                (true, false) => "=VALUE",
                (true, true) => "[=VALUE]",
                _ => "",
            };
            writeln!(out, "    option     --{}{value}: {}", option.name, option.help)?;
        }
    }
    for file in registry.disabled() {
        writeln!(out, "(not enabled: {})", file.path.display())?;
    }
    Ok(())
}
