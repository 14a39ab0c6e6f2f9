//! Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685). Beside the frozen weight W of a
//! projection there are two small matrices, A `[rank, in]` and B `[out, rank]`, and the output
//! becomes x Wᵀ + alpha / rank · (x Aᵀ) Bᵀ.
//!
//! A model with adapters is used like any other: every forward includes them, and
//! `checkpoint::save` writes the merged weights. They cost two small products for each projection,
//! and the CUDA kernels of decoding do not know them. For decoding, a merged copy is therefore made
//! first (`Transformer::to_merged`): its changed weights are computed in float32 into a buffer of
//! their own. The copy takes memory while it lives, but nothing has to be undone afterwards: the
//! frozen weights are never written, and training continues from exactly the same bits.

use std::collections::BTreeSet;

use garde::Validate;
use rand_chacha::rand_core::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::config::ModelConfig;
use super::params::ParamBuffer;
use crate::{Result, fingerprint};

/// Low-rank adapters: their size, and the projections that get one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of the adapters.
    #[garde(range(min = 1, max = 65536))]
    pub rank: i64,
    /// The output of an adapter is scaled by alpha / rank.
    #[garde(range(min = 0.001))]
    pub alpha: f64,
    /// The projections of every layer that get an adapter.
    #[garde(length(min = 1))]
    pub targets: BTreeSet<LoraTarget>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig { rank: 16, alpha: 32.0, targets: BTreeSet::from(LoraTarget::ALL) }
    }
}

impl LoraConfig {
    /// Number of trained parameters on a model of this configuration.
    pub fn num_parameters(&self, config: &ModelConfig) -> i64 {
        let modules = self.target_modules(config);
        modules.iter().map(|module| self.rank * (module.in_features + module.out_features)).sum()
    }

    /// Every projection that gets an adapter, layer by layer.
    pub(crate) fn target_modules(&self, config: &ModelConfig) -> Vec<TargetModule> {
        let shapes = config.parameter_shapes();
        let shape_of = |weight: &str| shapes.iter().find(|(name, _)| name == weight).map(|(_, shape)| shape);
        let targets = (0..config.num_layers).flat_map(|layer| self.targets.iter().map(move |&target| (layer, target)));
        targets
            .map(|(layer, target)| {
                let name = format!("model.layers.{layer}.{}", target.path());
                let shape = shape_of(&format!("{name}.weight")).expect("every layer has all projections");
                TargetModule { layer: layer as usize, target, name, out_features: shape[0], in_features: shape[1] }
            })
            .collect()
    }
}

/// A projection of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoraTarget {
    /// Queries.
    QProj,
    /// Keys.
    KProj,
    /// Values.
    VProj,
    /// Output of the attention.
    OProj,
    /// Gate of the feed-forward layer.
    GateProj,
    /// Values of the feed-forward layer that the gate scales.
    UpProj,
    /// Output of the feed-forward layer.
    DownProj,
}

impl LoraTarget {
    pub const ALL: [LoraTarget; 7] = [
        LoraTarget::QProj,
        LoraTarget::KProj,
        LoraTarget::VProj,
        LoraTarget::OProj,
        LoraTarget::GateProj,
        LoraTarget::UpProj,
        LoraTarget::DownProj,
    ];

    /// Name of the module within its layer.
    fn path(self) -> &'static str {
        match self {
            LoraTarget::QProj => "self_attn.q_proj",
            LoraTarget::KProj => "self_attn.k_proj",
            LoraTarget::VProj => "self_attn.v_proj",
            LoraTarget::OProj => "self_attn.o_proj",
            LoraTarget::GateProj => "mlp.gate_proj",
            LoraTarget::UpProj => "mlp.up_proj",
            LoraTarget::DownProj => "mlp.down_proj",
        }
    }
}

/// A projection of a model.
pub(crate) struct TargetModule {
    pub(super) layer: usize,
    pub(super) target: LoraTarget,
    /// Such as `model.layers.0.self_attn.q_proj`.
    pub(crate) name: String,
    pub(crate) out_features: i64,
    pub(crate) in_features: i64,
}

/// The adapter of one projection.
pub(crate) struct LoraAdapter {
    /// A `[rank, in]`.
    pub(crate) lora_a: Tensor,
    /// B `[out, rank]`.
    pub(crate) lora_b: Tensor,
    /// alpha / rank.
    pub(crate) scale: f64,
    /// Its first output among those of the joined product that computes the projection, such as
    /// that of Q, K and V.
    pub(super) output_offset: i64,
}

impl LoraAdapter {
    pub(crate) fn new(lora_a: Tensor, lora_b: Tensor, config: &LoraConfig) -> Self {
        LoraAdapter { lora_a, lora_b, scale: config.alpha / config.rank as f64, output_offset: 0 }
    }

    /// A is drawn uniformly between ±1/√in (Kaiming with a = √5, as in PEFT), B is zero: the
    /// adapter changes nothing yet.
    fn random(module: &TargetModule, config: &LoraConfig, seed: u64) -> Self {
        let bound = 1.0 / (module.in_features as f64).sqrt();
        // Not libtorch's generator, which all threads of the process share.
        let mut rng = fingerprint::derive_rng(seed, &module.name, 0);
        let mut draw = || (((f64::from(rng.next_u32()) + 0.5) / 2f64.powi(31) - 1.0) * bound) as f32;
        let values: Vec<f32> = (0..config.rank * module.in_features).map(|_| draw()).collect();
        let lora_a = Tensor::from_slice(&values).view([config.rank, module.in_features]);
        let lora_b = Tensor::zeros([module.out_features, config.rank], (Kind::Float, Device::Cpu));
        Self::new(lora_a, lora_b, config)
    }

    /// The same adapter, in the same memory, of a projection whose outputs begin at `output_offset`
    /// of a joined product.
    pub(super) fn with_output_offset(&self, output_offset: i64) -> Self {
        let (lora_a, lora_b) = (self.lora_a.shallow_clone(), self.lora_b.shallow_clone());
        LoraAdapter { lora_a, lora_b, scale: self.scale, output_offset }
    }

    /// The outputs of its projection among those of the joined product, along `dimension`.
    pub(crate) fn narrow(&self, product: &Tensor, dimension: i64) -> Tensor {
        product.narrow(dimension, self.output_offset, self.lora_b.size()[0])
    }

    /// The term that the adapter adds to the projection of `x [.., in]`: `[.., out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        (x.linear::<&Tensor>(&self.lora_a, None) * self.scale).linear::<&Tensor>(&self.lora_b, None)
    }

    /// A new weight with the adapter in it, computed in float32 and rounded to `kind`.
    pub(crate) fn merge(&self, weight: &Tensor, kind: Kind) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let (a, b) = (self.lora_a.f_to_kind(Kind::Float)?, self.lora_b.f_to_kind(Kind::Float)?);
        let change = b.f_matmul(&a)? * self.scale;
        Ok(weight.f_to_kind(Kind::Float)?.f_add(&change)?.f_to_kind(kind)?)
    }
}

/// All adapters of a model.
pub(crate) struct LoraAdapters {
    pub(crate) config: LoraConfig,
    pub(super) modules: Vec<(TargetModule, LoraAdapter)>,
    /// Every A and B under the name of its projection, layer by layer. The tensors of `modules` are
    /// views of it.
    pub(crate) params: ParamBuffer,
}

impl LoraAdapters {
    /// Copies adapters into one buffer.
    pub(crate) fn new(
        config: LoraConfig,
        mut modules: Vec<(TargetModule, LoraAdapter)>,
        device: Device,
        kind: Kind,
    ) -> Self {
        let _no_grad = tch::no_grad_guard();
        let names =
            |module: &TargetModule| ["lora_A", "lora_B"].map(|matrix| format!("{}.{matrix}.weight", module.name));
        let shapes = modules.iter().flat_map(|(module, adapter)| {
            names(module).into_iter().zip([adapter.lora_a.size(), adapter.lora_b.size()])
        });
        let params = ParamBuffer::zeros(shapes.collect(), device, kind);
        for (module, adapter) in &mut modules {
            for (name, tensor) in names(module).iter().zip([&mut adapter.lora_a, &mut adapter.lora_b]) {
                let mut view = params.get(name).expect("the buffer was laid out with this name");
                view.copy_(tensor);
                *tensor = view;
            }
        }
        LoraAdapters { config, modules, params }
    }

    /// Fresh adapters for every target of a model.
    pub(super) fn random(lora: &LoraConfig, seed: u64, model: &ModelConfig, device: Device, kind: Kind) -> Self {
        let with_adapter = |module| {
            let adapter = LoraAdapter::random(&module, lora, seed);
            (module, adapter)
        };
        let modules = lora.target_modules(model).into_iter().map(with_adapter).collect();
        Self::new(lora.clone(), modules, device, kind)
    }

    /// The tensors that collect gradients, each with the one name that it has in `params`.
    pub(super) fn leaves(&self) -> Vec<(Tensor, Vec<String>)> {
        let tensors = self.modules.iter().flat_map(|(_, adapter)| [&adapter.lora_a, &adapter.lora_b]);
        let names = self.params.tensors().into_iter().map(|(name, _)| vec![name]);
        tensors.map(Tensor::shallow_clone).zip(names).collect()
    }

    /// The adapter of the weight of this name.
    pub(crate) fn find(&self, weight: &str) -> Option<&LoraAdapter> {
        let name = weight.strip_suffix(".weight")?;
        self.modules.iter().find(|(module, _)| module.name == name).map(|(_, adapter)| adapter)
    }
}
