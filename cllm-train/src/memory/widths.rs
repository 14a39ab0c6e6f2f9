//! Widths of a layer, in elements per token.

use cllm_core::model::{Family, LoraTarget, ModelConfig};

use crate::settings::Settings;

/// Widths of a layer's activations.
pub struct LayerWidths {
    pub hidden: f64,
    pub queries: f64,
    pub qkv: f64,
    pub heads: f64,
    pub ffn: f64,
    /// Queries and keys, if they have norms.
    pub normed: f64,
}

impl LayerWidths {
    pub fn new(config: &ModelConfig) -> Self {
        let width = |size: i64| size as f64;
        let normed_heads = match config.family {
            Family::Qwen3 => config.num_heads + config.num_kv_heads,
            Family::Llama | Family::Mistral | Family::Qwen2 => 0,
        };
        LayerWidths {
            hidden: width(config.hidden_size),
            queries: width(config.num_heads * config.head_dim),
            qkv: width((config.num_heads + 2 * config.num_kv_heads) * config.head_dim),
            heads: width(config.num_heads),
            ffn: width(config.intermediate_size),
            normed: width(normed_heads * config.head_dim),
        }
    }
}

/// A product of a layer that is trained.
pub struct TrainedProduct {
    pub inputs: f64,
    pub outputs: f64,
    /// Rank of all its adapters together; 0 if its weight is trained.
    pub rank: f64,
}

/// The products of a layer that are trained: all, or those with adapters.
pub fn trained_products(config: &ModelConfig, settings: &Settings) -> Vec<TrainedProduct> {
    use LoraTarget::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
    let LayerWidths { hidden, queries, qkv, ffn, .. } = LayerWidths::new(config);
    let products: [(&[LoraTarget], f64, f64); 4] = [
        (&[QProj, KProj, VProj], hidden, qkv),
        (&[OProj], queries, hidden),
        (&[GateProj, UpProj], hidden, 2.0 * ffn),
        (&[DownProj], ffn, hidden),
    ];
    let trained = products.into_iter().filter_map(|(targets, inputs, outputs)| {
        let Some(lora) = &settings.lora else { return Some(TrainedProduct { inputs, outputs, rank: 0.0 }) };
        let num_adapters = targets.iter().filter(|target| lora.targets.contains(target)).count();
        let rank = num_adapters as f64 * lora.rank as f64;
        (num_adapters > 0).then_some(TrainedProduct { inputs, outputs, rank })
    });
    trained.collect()
}
