//! protobuf to Rust, without protoc.

use prost::Message;
use std::{env, fs, path::PathBuf};

/// Compiles `file` to `$OUT_DIR/<package>.rs`, and its descriptors to `$OUT_DIR/<descriptors>`.
pub fn compile(file: &str, descriptors: Option<&str>) {
    println!("cargo::rerun-if-changed={file}");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    // `{:?}` has file and line, `{}` has not (protox 0.10).
    let set = protox::compile([file], ["."]).unwrap_or_else(|error| panic!("{error:?}"));
    if let Some(name) = descriptors {
        fs::write(out.join(name), set.encode_to_vec()).expect("writing to OUT_DIR");
    }
    let mut config = prost_build::Config::new();
    config.enable_type_names();
    config.compile_fds(set).unwrap_or_else(|error| panic!("{error}"));
}
