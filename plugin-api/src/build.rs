//! For a plugin's build script: compiles `record.proto` into Rust types and a descriptor set.
//!
//! ```ignore
//! fn main() {
//!     stasis_plugin_api::build::records(&["record.proto"]);
//! }
//! ```
//! `include!(concat!(env!("OUT_DIR"), "/records.rs"))` gives the types, `records.bin` goes into `export_plugin!`.

use prost::Message;
use std::{env, fs, path::PathBuf};

/// Compiles the given protobuf files (paths relative to the crate). Ends the build with the compiler's message if they
/// are wrong: a build script has no better way to speak.
pub fn records(files: &[&str]) {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    // `{:?}` has file and line, `{}` has not (protox 0.10).
    let set = protox::compile(files, ["."]).unwrap_or_else(|error| panic!("{error:?}"));
    fs::write(out.join("records.bin"), set.encode_to_vec()).expect("writing to OUT_DIR");
    let mut config = prost_build::Config::new();
    config.enable_type_names().include_file("records.rs");
    config.compile_fds(set).unwrap_or_else(|error| panic!("{error}"));
}
