//! TensorBoard's event files: protocol-buffer messages in TFRecord framing, both small enough to be written by hand.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cllm_core::{Error, Result};

const VERSION: &str = "brain.Event:2";

/// An event file.
pub struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// Starts the only event file of `folder`: those of earlier runs are removed, because the caller repeats them.
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
        let mut events = Events { path, file };
        let mut event = time();
        bytes(&mut event, 3, VERSION.as_bytes());
        events.record(&event)?;
        Ok(events)
    }

    /// Writes named numbers of a step.
    ///
    /// # Errors
    /// File-system errors.
    pub fn write(&mut self, step: i64, values: &[(&str, f32)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut message = Vec::new();
            bytes(&mut message, 1, tag.as_bytes());
            message.push(2 << 3 | 5);
            message.extend(value.to_le_bytes());
            bytes(&mut summary, 1, &message);
        }
        let mut event = time();
        event.push(2 << 3);
        varint(&mut event, step as u64);
        bytes(&mut event, 5, &summary);
        self.record(&event)
    }

    /// Length, its checksum, the message, its checksum.
    fn record(&mut self, message: &[u8]) -> Result<()> {
        let length = (message.len() as u64).to_le_bytes();
        let parts = [&length[..], &checksum(&length), message, &checksum(message)];
        self.file.write_all(&parts.concat()).map_err(Error::write(&self.path))
    }
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// An event that holds only its time.
fn time() -> Vec<u8> {
    let mut event = vec![1 << 3 | 1];
    event.extend(now().as_secs_f64().to_le_bytes());
    event
}

/// A length-delimited field.
fn bytes(message: &mut Vec<u8>, field: u8, content: &[u8]) {
    message.push(field << 3 | 2);
    varint(message, content.len() as u64);
    message.extend(content);
}

fn varint(message: &mut Vec<u8>, mut value: u64) {
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
    fn records_are_framed_as_tensorboard_reads_them() {
        let dir = std::env::temp_dir().join(format!("cllm-events-{}", std::process::id()));
        let mut events = Events::create(&dir).unwrap();
        events.write(300, &[("loss", 1.5)]).unwrap();
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
        // Time (9 bytes), then file_version = 3; time, step = 2 as a varint, summary = 5 { value = 1 { tag, simple_value } }.
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
