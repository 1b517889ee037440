//! Where the events of plugins go: into our own log, under the plugin's target.

use stasis_plugin_api::{
    abi_stable::std_types::RStr,
    forward_log::{LogSink, level_number},
};
use tracing_log::AsTrace;

/// The sink that is given to a plugin right after loading; of the level that is in force then.
pub(super) fn sink() -> LogSink {
    LogSink { max_level: max_level(), enabled, emit }
}

/// The level in force, as [`LogSink`] numbers it.
pub fn max_level() -> u8 {
    tracing::level_filters::LevelFilter::current().into_level().map_or(0, |level| level_number(&level))
}

const LEVELS: [log::Level; 6] = [
    log::Level::Error,
    log::Level::Error,
    log::Level::Warn,
    log::Level::Info,
    log::Level::Debug,
    log::Level::Trace,
];

fn level(number: u8) -> log::Level {
    LEVELS.get(usize::from(number)).copied().unwrap_or(log::Level::Trace)
}

extern "C" fn enabled(number: u8, target: RStr<'_>) -> bool {
    let metadata = log::Metadata::builder().level(level(number)).target(target.as_str()).build();
    tracing::dispatcher::get_default(|dispatch| dispatch.enabled(&metadata.as_trace()))
}

/// Puts a message into the log.
pub extern "C" fn emit(number: u8, target: RStr<'_>, message: RStr<'_>) {
    // The only error is that no subscriber is set, and then there is nobody to tell.
    let _ = tracing_log::format_trace(
        &log::Record::builder()
            .level(level(number))
            .target(target.as_str())
            .args(format_args!("{message}"))
            .build(),
    );
}
