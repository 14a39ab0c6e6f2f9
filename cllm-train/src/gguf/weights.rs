//! The weights under their Hugging Face names, dequantized to bfloat16 piece by piece.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use half::bf16;
use rayon::prelude::*;

use super::config::ROPE_FACTORS;
use super::file::{GgufFile, Parsed, TensorInfo};
use cllm_core::checkpoint::{STREAMING_BYTES, TensorSpec, TensorWriter};
use cllm_core::model::{Family, ModelConfig};
use cllm_core::pieces::PIECE_BYTES;
use cllm_core::progress::Progress;
use cllm_core::{Result, interrupt};
use tch::{Device, Kind};

/// A weight to write, and the tensor it comes from.
pub(super) struct WeightSource<'a> {
    name: String,
    shape: Vec<i64>,
    tensor: TensorInfo<'a>,
    /// Number of heads, if llama.cpp has reordered the rows of each head.
    reordered_heads: Option<usize>,
}

/// The source of every weight of the model. A tensor that belongs to no weight is refused.
pub(super) fn find_sources<'a>(file: &GgufFile<'a>, config: &ModelConfig) -> Parsed<Vec<WeightSource<'a>>> {
    let mut unused: BTreeSet<&str> = file.tensors.keys().map(String::as_str).collect();
    unused.remove(ROPE_FACTORS);
    let mut sources = Vec::new();
    for (name, shape) in config.parameter_shapes() {
        let stored = gguf_name(&name);
        let tensor = file.tensors.get(&stored).ok_or_else(|| format!("lacks the tensor `{stored}`"))?.clone();
        if tensor.shape != shape {
            return Err(format!(
                "has a tensor `{stored}` of shape {:?}, but its metadata require {shape:?}",
                tensor.shape
            ));
        }
        if shape.len() == 1 && tensor.format.block_size().0 > 1 {
            return Err(format!("has a quantized tensor `{stored}`, which only a matrix can be"));
        }
        unused.remove(stored.as_str());
        let heads = if config.family != Family::Llama {
            None
        } else if name.contains("q_proj") {
            Some(config.num_heads)
        } else if name.contains("k_proj") {
            Some(config.num_kv_heads)
        } else {
            None
        };
        let reordered_heads = heads.and_then(|heads| usize::try_from(heads).ok());
        sources.push(WeightSource { name, shape, tensor, reordered_heads });
    }
    match unused.first() {
        Some(name) => Err(format!("has a tensor `{name}` that is not part of any supported model")),
        None => Ok(sources),
    }
}

/// Writes the weights as one bf16 safetensors file.
pub(super) fn write(path: &Path, sources: &[WeightSource<'_>]) -> Result<()> {
    let spec = |source: &WeightSource<'_>| TensorSpec {
        name: source.name.clone(),
        kind: Kind::BFloat16,
        shape: source.shape.clone(),
    };
    let mut progress = Progress::new("convert", 0, sources.len() as u64);
    let mut writer = TensorWriter::new(Device::Cpu, STREAMING_BYTES);
    writer.begin_file(path, &[], &sources.iter().map(spec).collect::<Vec<_>>())?;
    for source in sources {
        source.write(&mut writer)?;
        progress.advance(1);
    }
    writer.finish()?;
    progress.finish();
    Ok(())
}

impl WeightSource<'_> {
    /// Writes the weight as bfloat16, some rows at a time.
    fn write(&self, writer: &mut TensorWriter) -> Result<()> {
        let num_rows = if self.shape.len() == 1 && self.reordered_heads.is_none() { 1 } else { self.shape[0] as usize };
        let width = self.shape.iter().product::<i64>() as usize / num_rows;
        let max_rows = (PIECE_BYTES / (2 * width)).max(1);
        for start in (0..num_rows).step_by(max_rows) {
            interrupt::check()?;
            writer.write_bytes(&self.to_bytes(start..num_rows.min(start + max_rows), num_rows, width))?;
        }
        Ok(())
    }

    /// Some of the weight's rows as bfloat16.
    fn to_bytes(&self, rows: Range<usize>, num_rows: usize, width: usize) -> Vec<u8> {
        let row_bytes = self.tensor.data.len() / num_rows;
        let mut out = vec![0u8; rows.len() * width * 2];
        out.par_chunks_exact_mut(width * 2).enumerate().for_each_init(Vec::new, |values, (index, out)| {
            let row = rows.start + index;
            let from = self.reordered_heads.map_or(row, |heads| stored_row(row, num_rows / heads));
            values.clear();
            self.tensor.format.dequantize(&self.tensor.data[from * row_bytes..][..row_bytes], values);
            for (value, bytes) in values.iter().zip(out.chunks_exact_mut(2)) {
                bytes.copy_from_slice(&bf16::from_f32(*value).to_le_bytes());
            }
        });
        out
    }
}

/// The row of the GGUF tensor that holds a row of a query or key projection. In a head, Hugging
/// Face rotates dimension `i` together with `i + head_dim / 2`, while llama.cpp rotates neighbours
/// in Llama models, and so interleaves the two halves of each head.
fn stored_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
    head * head_dim + 2 * pair + half
}

fn gguf_name(name: &str) -> String {
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    let Some((layer, rest)) = layer else {
        return match name {
            "model.embed_tokens.weight" => "token_embd.weight",
            "model.norm.weight" => "output_norm.weight",
            _ => "output.weight",
        }
        .to_owned();
    };
    let (module, kind) = rest.rsplit_once('.').unwrap_or((rest, "weight"));
    let stored = match module {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => other,
    };
    format!("blk.{layer}.{stored}.{kind}")
}
