//! Records as JSON, by descriptors that the image or this program brings: no plugin is needed.

use crate::image::{Image, RECORD_DESCRIPTORS, records::PluginUse};
use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, MapKey, ReflectMessage, Value as Field};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Decodes records of core and of the plugins of one image.
pub struct Decoder {
    core: Option<DescriptorPool>,
    plugins: BTreeMap<String, Plugin>,
}

struct Plugin {
    pool: Option<DescriptorPool>,
    /// Protobuf name of the record of each kind.
    messages: BTreeMap<String, String>,
}

impl Decoder {
    /// For the records of this image.
    pub fn new(image: &Image) -> Self {
        let plugin = |used: &PluginUse| {
            // Descriptors that cannot be read make the records plain bytes; everything else can still be shown.
            let pool = DescriptorPool::decode(used.descriptors.as_slice()).ok();
            let messages = used.kinds.iter().cloned().zip(used.messages.iter().cloned()).collect();
            (used.name.clone(), Plugin { pool, messages })
        };
        Self {
            core: DescriptorPool::decode(RECORD_DESCRIPTORS).ok(),
            plugins: image.header.plugins.iter().map(plugin).collect(),
        }
    }

    /// A record of core.
    pub fn core<M: Message + Name>(&self, message: &M) -> Value {
        self.core
            .as_ref()
            .and_then(|pool| decode(pool, &M::full_name(), &message.encode_to_vec()))
            .unwrap_or(Value::Null)
    }

    /// A record of a plugin; as hexadecimal digits if its descriptors do not fit it.
    pub fn plugin(&self, plugin: &str, kind: &str, message: &str, record: &[u8]) -> Value {
        let decoded = self.plugins.get(plugin).and_then(|plugin| {
            let known = plugin.messages.get(kind).map_or("", String::as_str);
            let message = if message.is_empty() { known } else { message };
            decode(plugin.pool.as_ref()?, message, record)
        });
        decoded.unwrap_or_else(|| json!({ "undecoded": hex(record) }))
    }
}

fn decode(pool: &DescriptorPool, message: &str, record: &[u8]) -> Option<Value> {
    let descriptor = pool.get_message_by_name(message)?;
    DynamicMessage::decode(descriptor, record).ok().map(|message| object(&message))
}

/// All fields, those without a value as their defaults; unset messages and optional fields are left out.
fn object(message: &DynamicMessage) -> Value {
    let mut map = Map::new();
    for field in message.descriptor().fields() {
        if !message.has_field(&field) && field.supports_presence() {
            continue;
        }
        let value = message.get_field(&field);
        let value = match (&*value, field.kind().as_enum()) {
            (Field::EnumNumber(number), Some(kind)) => {
                kind.get_value(*number).map_or_else(|| json!(number), |value| json!(value.name()))
            }
            (value, _) => json_value(value),
        };
        map.insert(field.name().into(), value);
    }
    Value::Object(map)
}

fn json_value(value: &Field) -> Value {
    match value {
        Field::Bool(value) => json!(value),
        Field::I32(value) | Field::EnumNumber(value) => json!(value),
        Field::I64(value) => json!(value),
        Field::U32(value) => json!(value),
        Field::U64(value) => json!(value),
        Field::F32(value) => json!(value),
        Field::F64(value) => json!(value),
        Field::String(value) => json!(value),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) if !text.chars().any(char::is_control) => json!(text),
            _ => json!({ "hex": hex(bytes) }),
        },
        Field::Message(message) => object(message),
        Field::List(values) => values.iter().map(json_value).collect(),
        Field::Map(map) => {
            Value::Object(map.iter().map(|(key, value)| (map_key(key), json_value(value))).collect())
        }
    }
}

fn map_key(key: &MapKey) -> String {
    match key {
        MapKey::Bool(key) => key.to_string(),
        MapKey::I32(key) => key.to_string(),
        MapKey::I64(key) => key.to_string(),
        MapKey::U32(key) => key.to_string(),
        MapKey::U64(key) => key.to_string(),
        MapKey::String(key) => key.clone(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
