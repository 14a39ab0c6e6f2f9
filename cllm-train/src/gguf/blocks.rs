//! The number formats of GGUF tensors. A block of a quantized format holds 32 or 256 small integers
//! and their scales.

use half::{bf16, f16};

/// A supported number format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types)] // These are llama.cpp's own names.
pub(super) enum Format {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl Format {
    pub const NAMES: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K";

    /// The format with this type code, or the name of one that is not supported.
    pub fn from_code(code: u32) -> Result<Self, String> {
        let unsupported = match code {
            0 => return Ok(Format::F32),
            1 => return Ok(Format::F16),
            2 => return Ok(Format::Q4_0),
            3 => return Ok(Format::Q4_1),
            6 => return Ok(Format::Q5_0),
            7 => return Ok(Format::Q5_1),
            8 => return Ok(Format::Q8_0),
            12 => return Ok(Format::Q4_K),
            13 => return Ok(Format::Q5_K),
            14 => return Ok(Format::Q6_K),
            30 => return Ok(Format::BF16),
            9 => "Q8_1",
            10 => "Q2_K",
            11 => "Q3_K",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            20 => "IQ4_NL",
            21 => "IQ3_S",
            22 => "IQ2_S",
            23 => "IQ4_XS",
            29 => "IQ1_M",
            34 => "TQ1_0",
            35 => "TQ2_0",
            39 => "MXFP4",
            other => return Err(format!("type {other}")),
        };
        Err(unsupported.to_owned())
    }

    /// Values per block and bytes per block.
    pub fn block_size(self) -> (usize, usize) {
        match self {
            Format::F32 => (1, 4),
            Format::F16 | Format::BF16 => (1, 2),
            Format::Q4_0 => (32, 18),
            Format::Q4_1 => (32, 20),
            Format::Q5_0 => (32, 22),
            Format::Q5_1 => (32, 24),
            Format::Q8_0 => (32, 34),
            Format::Q4_K => (256, 144),
            Format::Q5_K => (256, 176),
            Format::Q6_K => (256, 210),
        }
    }

    /// Bytes of a row of `width` values; `None` if the row does not consist of whole blocks.
    pub fn row_bytes(self, width: i64) -> Option<usize> {
        let (values, bytes) = self.block_size();
        let width = usize::try_from(width).ok()?;
        if width.is_multiple_of(values) { (width / values).checked_mul(bytes) } else { None }
    }

    /// Appends the values of whole blocks to `out`.
    pub fn dequantize(self, bytes: &[u8], out: &mut Vec<f32>) {
        for block in bytes.chunks_exact(self.block_size().1) {
            match self {
                Format::F32 => out.push(f32::from_le_bytes([block[0], block[1], block[2], block[3]])),
                Format::F16 => out.push(half_at(block, 0)),
                Format::BF16 => out.push(bf16::from_le_bytes([block[0], block[1]]).to_f32()),
                Format::Q8_0 => out.extend(block[2..].iter().map(|&q| half_at(block, 0) * f32::from(q as i8))),
                Format::Q4_0 => nibbles(&block[2..], 0, half_at(block, 0), -8.0 * half_at(block, 0), out),
                Format::Q4_1 => nibbles(&block[4..], 0, half_at(block, 0), half_at(block, 2), out),
                Format::Q5_0 => {
                    nibbles(&block[6..], word_at(block, 2), half_at(block, 0), -16.0 * half_at(block, 0), out);
                }
                Format::Q5_1 => nibbles(&block[8..], word_at(block, 4), half_at(block, 0), half_at(block, 2), out),
                Format::Q4_K => super_block(block, &[], &block[16..], out),
                Format::Q5_K => super_block(block, &block[16..48], &block[48..], out),
                Format::Q6_K => six_bits(block, out),
            }
        }
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn word_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Unpacks 32 values: the low nibbles, then the high ones. Bit `i` of `fifth` is the fifth bit of
/// value `i`.
fn nibbles(packed: &[u8], fifth: u32, scale: f32, offset: f32, out: &mut Vec<f32>) {
    let quants = packed.iter().map(|byte| byte & 15).chain(packed.iter().map(|byte| byte >> 4));
    out.extend(quants.enumerate().map(|(index, low)| {
        let quant = u32::from(low) | ((fifth >> index) & 1) << 4;
        scale * quant as f32 + offset
    }));
}

/// Unpacks Q4_K and Q5_K: eight groups of 32 values, each with a 6-bit scale and minimum.
fn super_block(block: &[u8], fifth: &[u8], packed: &[u8], out: &mut Vec<f32>) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for group in 0..8 {
        let (group_scale, group_minimum) = scale_and_minimum(&block[4..16], group);
        let (step, offset) = (scale * f32::from(group_scale), minimum * f32::from(group_minimum));
        let bytes = &packed[group / 2 * 32..][..32];
        out.extend(bytes.iter().enumerate().map(|(index, byte)| {
            let low = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
            let high = fifth.get(index).map_or(0, |bits| (bits >> group & 1) << 4);
            step * f32::from(low | high) - offset
        }));
    }
}

/// The 6-bit scale and minimum of a group. The 12 bytes hold eight of each; the upper two bits of
/// the last four are in the bytes of the first four.
fn scale_and_minimum(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        return (packed[group] & 63, packed[group + 4] & 63);
    }
    let low = packed[group + 4];
    ((low & 15) | (packed[group - 4] >> 6) << 4, (low >> 4) | (packed[group] >> 6) << 4)
}

/// Unpacks Q6_K: 128 bytes of low nibbles, 64 bytes of upper bits, a signed scale for each 16
/// values, and the block's scale.
fn six_bits(block: &[u8], out: &mut Vec<f32>) {
    let (low, rest) = block.split_at(128);
    let (high, scales) = rest.split_at(64);
    let scale = half_at(block, 208);
    for index in 0..256 {
        let (half, quarter, lane) = (index / 128, index % 128 / 32, index % 32);
        let byte = low[half * 64 + quarter % 2 * 32 + lane];
        let nibble = if quarter < 2 { byte & 15 } else { byte >> 4 };
        let upper = high[half * 32 + lane] >> (2 * quarter) & 3;
        let step = scale * f32::from(scales[index / 16] as i8);
        out.push(step * (f32::from(nibble | upper << 4) - 32.0));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// The recorded values are those of the Python package `gguf`.
    #[test]
    fn every_format_gives_the_recorded_values() {
        let recorded = include_str!("../../tests/fixtures/gguf/blocks.json");
        let recorded: Vec<Value> = serde_json::from_str(recorded).unwrap();
        assert_eq!(recorded.len(), 11);
        for case in recorded {
            let format = Format::from_code(case["type"].as_u64().unwrap() as u32).unwrap();
            let hex = case["bytes"].as_str().unwrap();
            let bytes: Vec<u8> =
                (0..hex.len() / 2).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap()).collect();
            let expected: Vec<f32> =
                case["values"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect();
            let mut values = Vec::new();
            format.dequantize(&bytes, &mut values);
            assert_eq!(values.len(), expected.len(), "{format:?}");
            for (index, (value, expected)) in values.iter().zip(&expected).enumerate() {
                assert!((value - expected).abs() <= 1e-5, "{format:?} value {index}: {value}, recorded {expected}");
            }
        }
    }

    #[test]
    fn unsupported_formats_are_named_and_rows_must_be_whole_blocks() {
        assert_eq!(Format::from_code(10).unwrap_err(), "Q2_K");
        assert_eq!(Format::from_code(99).unwrap_err(), "type 99");
        assert_eq!(Format::Q4_K.row_bytes(512), Some(288));
        assert_eq!(Format::Q4_K.row_bytes(320), None);
    }
}
