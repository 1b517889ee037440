//! Compiles the plugin's records.
fn main() {
    stasis_plugin_api::build::records(&["record.proto"]);
}
