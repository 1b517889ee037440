//! A plugin whose author forgot `register!`: it has a name, and nothing else.

stasis_plugin_api::export_plugin! { name: "empty", records: &[] }
