//! A dynamic library has a `tracing` dispatcher of its own, so a plugin's events would be lost: this subscriber hands
//! them to the host, which emits them again under the plugin's target.

use abi_stable::{StableAbi, std_types::RStr};
use std::fmt::Write;
use tracing_core::{
    Event, Level, LevelFilter, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

/// Where a plugin's events go.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct LogSink {
    /// 0 off, 1 error ... 5 trace.
    pub max_level: u8,
    /// Whether the host wants an event of this level and target.
    pub enabled: extern "C" fn(level: u8, target: RStr<'_>) -> bool,
    /// Takes an event.
    pub emit: extern "C" fn(level: u8, target: RStr<'_>, message: RStr<'_>),
}

/// The number of a level in [`LogSink`].
pub fn level_number(level: &Level) -> u8 {
    match *level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        Level::DEBUG => 4,
        Level::TRACE => 5,
    }
}

const FILTERS: [LevelFilter; 6] = [
    LevelFilter::OFF,
    LevelFilter::ERROR,
    LevelFilter::WARN,
    LevelFilter::INFO,
    LevelFilter::DEBUG,
    LevelFilter::TRACE,
];

/// Hands all events to a sink, each as one line of text.
pub struct Forward(LogSink);

impl Forward {
    /// One for `sink`.
    pub fn new(sink: LogSink) -> Self {
        Self(sink)
    }
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

impl Subscriber for Forward {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let level = level_number(metadata.level());
        level <= self.0.max_level && (self.0.enabled)(level, metadata.target().into())
    }
    fn max_level_hint(&self) -> Option<LevelFilter> {
        FILTERS.get(usize::from(self.0.max_level)).copied()
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        text.message.push_str(&text.fields);
        let metadata = event.metadata();
        (self.0.emit)(level_number(metadata.level()), metadata.target().into(), text.message.as_str().into());
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// Installs the forwarder in the library that this code is linked into.
pub extern "C" fn install(sink: LogSink) {
    // An error means that a dispatcher is already set, as when a plugin is loaded twice: its events are forwarded then.
    let _ = tracing::dispatcher::set_global_default(tracing::Dispatch::new(Forward(sink)));
    // A library has a panic hook of its own as well; the error that a panic becomes has the message, the log the place.
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
}
