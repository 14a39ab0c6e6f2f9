//! Writes TensorBoard's event files: protocol buffer messages in TFRecord framing. Both are simple
//! enough to write by hand, which saves a dependency on TensorFlow's formats.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cllm_core::settings::written;
use cllm_core::{Error, Result};
use serde_json::Value;

const VERSION: &str = "brain.Event:2";

/// An event file.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Creates the only event file of a folder. Those of earlier parts of a run are removed,
    /// because the caller writes their events again.
    ///
    /// # Errors
    /// File-system errors.
    pub fn create(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::write(folder))?;
        for entry in std::fs::read_dir(folder).map_err(Error::write(folder))? {
            let path = entry.map_err(Error::write(folder))?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("events.out.tfevents.")) {
                std::fs::remove_file(&path).map_err(Error::write(&path))?;
            }
        }
        let path = folder.join(format!("events.out.tfevents.{}.cllm", now().as_secs()));
        let file = File::create(&path).map_err(Error::write(&path))?;
        let mut events = EventFile { path, file };
        let mut event = new_event();
        push_bytes(&mut event, 3, VERSION.as_bytes());
        events.write_record(&event)?;
        Ok(events)
    }

    /// Writes the values of a step.
    ///
    /// # Errors
    /// File-system errors.
    pub fn write(&mut self, step: i64, values: &[(String, f32)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut message = Vec::new();
            push_bytes(&mut message, 1, tag.as_bytes());
            message.push(2 << 3 | 5);
            message.extend(value.to_le_bytes());
            push_bytes(&mut summary, 1, &message);
        }
        let mut event = new_event();
        event.push(2 << 3);
        push_varint(&mut event, step as u64);
        push_bytes(&mut event, 5, &summary);
        self.write_record(&event)
    }

    /// Writes a text, which TensorBoard shows as preformatted Markdown in its tab of texts.
    ///
    /// # Errors
    /// File-system errors.
    pub fn write_text(&mut self, tag: &str, text: &str) -> Result<()> {
        // Lines that are indented by four blanks are code in Markdown.
        let text: String = text.lines().map(|line| format!("    {line}\n")).collect();
        let (mut plugin, mut metadata, mut tensor, mut value) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        push_bytes(&mut plugin, 1, b"text");
        push_bytes(&mut metadata, 1, &plugin);
        // The type is that of strings, the shape is empty.
        tensor.extend([1 << 3, 7]);
        push_bytes(&mut tensor, 2, &[]);
        push_bytes(&mut tensor, 8, text.as_bytes());
        push_bytes(&mut value, 1, tag.as_bytes());
        push_bytes(&mut value, 8, &tensor);
        push_bytes(&mut value, 9, &metadata);
        self.write_value(&value)
    }

    /// Writes settings, which TensorBoard lists in its tab of hyper-parameters. Those in sections have
    /// their full keys.
    ///
    /// # Errors
    /// File-system errors.
    pub fn write_hyper_parameters(&mut self, settings: &Value) -> Result<()> {
        let (mut start, mut content, mut plugin) = (Vec::new(), Vec::new(), Vec::new());
        push_hyper_parameters(&mut start, "", settings);
        push_bytes(&mut content, 3, &start);
        push_bytes(&mut plugin, 1, b"hparams");
        push_bytes(&mut plugin, 2, &content);
        let (mut metadata, mut value) = (Vec::new(), Vec::new());
        push_bytes(&mut metadata, 1, &plugin);
        push_bytes(&mut value, 1, b"_hparams_/session_start_info");
        push_bytes(&mut value, 9, &metadata);
        self.write_value(&value)
    }

    /// Writes the only value of a summary without a step.
    fn write_value(&mut self, value: &[u8]) -> Result<()> {
        let mut summary = Vec::new();
        push_bytes(&mut summary, 1, value);
        let mut event = new_event();
        push_bytes(&mut event, 5, &summary);
        self.write_record(&event)
    }

    /// A record is a length, its checksum, a message of that length, and its checksum.
    fn write_record(&mut self, message: &[u8]) -> Result<()> {
        let length = (message.len() as u64).to_le_bytes();
        let record = [&length[..], &checksum(&length), message, &checksum(message)].concat();
        self.file.write_all(&record).map_err(Error::write(&self.path))
    }
}

/// Appends the entries of a map from keys to google.protobuf.Value.
fn push_hyper_parameters(map: &mut Vec<u8>, key: &str, setting: &Value) {
    let mut value = Vec::new();
    match setting {
        Value::Object(section) => {
            for (inner, setting) in section {
                let key = if key.is_empty() { inner.clone() } else { format!("{key}.{inner}") };
                push_hyper_parameters(map, &key, setting);
            }
            return;
        }
        Value::Number(number) => {
            value.push(2 << 3 | 1);
            value.extend(number.as_f64().unwrap_or(f64::NAN).to_le_bytes());
        }
        Value::Bool(is_set) => value.extend([4 << 3, u8::from(*is_set)]),
        other => push_bytes(&mut value, 3, written(other).as_bytes()),
    }
    let mut entry = Vec::new();
    push_bytes(&mut entry, 1, key.as_bytes());
    push_bytes(&mut entry, 2, &value);
    push_bytes(map, 1, &entry);
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// An event with only its time.
fn new_event() -> Vec<u8> {
    let mut event = vec![1 << 3 | 1];
    event.extend(now().as_secs_f64().to_le_bytes());
    event
}

/// Appends a length-delimited field.
fn push_bytes(message: &mut Vec<u8>, field: u8, content: &[u8]) {
    message.push(field << 3 | 2);
    push_varint(message, content.len() as u64);
    message.extend(content);
}

fn push_varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

/// The masked CRC-32C of TFRecord.
fn checksum(data: &[u8]) -> [u8; 4] {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hyper_parameters_are_a_map_of_full_keys() {
        let mut map = Vec::new();
        push_hyper_parameters(&mut map, "", &serde_json::json!({ "a": { "b": 1.5 }, "c": true, "d": ["x"] }));
        let number =
            [&[1 << 3 | 2, 16, 1 << 3 | 2, 3][..], b"a.b", &[2 << 3 | 2, 9, 17], &1.5f64.to_le_bytes()].concat();
        let is_set = [&[1 << 3 | 2, 7, 1 << 3 | 2, 1][..], b"c", &[2 << 3 | 2, 2, 4 << 3, 1]].concat();
        let text = [&[1 << 3 | 2, 10, 1 << 3 | 2, 1][..], b"d", &[2 << 3 | 2, 5, 3 << 3 | 2, 3], b"[x]"].concat();
        assert_eq!(map, [number, is_set, text].concat());
    }

    #[test]
    fn records_are_framed_as_tensorboard_expects() {
        let dir = std::env::temp_dir().join(format!("cllm-events-{}", std::process::id()));
        let mut events = EventFile::create(&dir).unwrap();
        events.write(300, &[("loss".to_owned(), 1.5)]).unwrap();
        let data = std::fs::read(&events.path).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        let mut rest = data.as_slice();
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], checksum(&rest[..8]));
            messages.push(&rest[12..12 + length]);
            assert_eq!(rest[12 + length..16 + length], checksum(&rest[12..12 + length]));
            rest = &rest[16 + length..];
        }
        // Time (9 bytes), then file_version = 3; time, step = 2 as a varint, summary = 5 { value =
        // 1 { tag, simple_value } }.
        assert_eq!(messages[0][9..], [&[3 << 3 | 2, 13], VERSION.as_bytes()].concat());
        let value = [&[1 << 3 | 2, 4][..], b"loss", &[2 << 3 | 5], &1.5f32.to_le_bytes()].concat();
        let expected = [&[2 << 3, 0xac, 0x02, 5 << 3 | 2, 13, 1 << 3 | 2, 11], value.as_slice()].concat();
        assert_eq!(messages[1][9..], expected);
        // The check value of CRC-32C, masked.
        assert_eq!(
            u32::from_le_bytes(checksum(b"123456789")),
            0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8)
        );
    }
}
