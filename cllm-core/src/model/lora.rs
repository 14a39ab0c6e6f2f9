//! Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685). The weights stay as they are; beside a projection W stand two thin
//! matrices, A `[rank, in]` and B `[out, rank]`, and its output becomes x Wᵀ + alpha / rank · (x Aᵀ) Bᵀ.
//!
//! A model with adapters is used like any other: every forward includes them, what is saved has them merged in. They cost two
//! small products a projection, and the joined weights and fused kernels that make decoding fast know nothing of them. So
//! whoever decodes much takes [`Transformer::merged`] first: a model of its own whose changed weights are computed, in float32,
//! into a fresh buffer. That takes a second copy of the weights while it lives, and in return there is nothing to undo:
//! the frozen weights are never written, so the training that goes on finds them as they were, bit for bit.

use std::collections::BTreeSet;

use garde::Validate;
use rand_chacha::rand_core::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::transformer::{Layer, Linear};
use super::{ModelConfig, ParamBuffer, Transformer};
use crate::{Result, fingerprint};

/// Which projections get adapters, and of what size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of the change of a weight.
    #[garde(range(min = 1, max = 65536))]
    pub rank: i64,
    /// The change is scaled by alpha / rank.
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
    /// What the gate lets through.
    UpProj,
    /// Output of the feed-forward layer.
    DownProj,
}

impl LoraTarget {
    /// All of them.
    pub const ALL: [LoraTarget; 7] = [
        LoraTarget::QProj,
        LoraTarget::KProj,
        LoraTarget::VProj,
        LoraTarget::OProj,
        LoraTarget::GateProj,
        LoraTarget::UpProj,
        LoraTarget::DownProj,
    ];

    /// Its name within a layer.
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

    /// The product that computes it, and where its outputs begin in that.
    fn of<'l>(self, layer: &'l mut Layer, config: &ModelConfig) -> (&'l mut Linear, i64) {
        let (queries, keys) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        match self {
            LoraTarget::QProj => (&mut layer.query_key_value, 0),
            LoraTarget::KProj => (&mut layer.query_key_value, queries),
            LoraTarget::VProj => (&mut layer.query_key_value, queries + keys),
            LoraTarget::OProj => (&mut layer.output, 0),
            LoraTarget::GateProj => (&mut layer.gate_up, 0),
            LoraTarget::UpProj => (&mut layer.gate_up, config.intermediate_size),
            LoraTarget::DownProj => (&mut layer.down, 0),
        }
    }
}

impl LoraConfig {
    /// Numbers of all adapters on a model of this shape.
    pub fn num_parameters(&self, config: &ModelConfig) -> i64 {
        self.places(config).iter().map(|place| self.rank * (place.inputs + place.outputs)).sum()
    }

    /// Every projection that gets an adapter, layer by layer.
    pub(crate) fn places(&self, config: &ModelConfig) -> Vec<Place> {
        let shapes = config.parameter_shapes();
        let size = |weight: &str| shapes.iter().find(|(name, _)| name == weight).map(|(_, shape)| (shape[0], shape[1]));
        let each = (0..config.num_layers).flat_map(|layer| self.targets.iter().map(move |&target| (layer, target)));
        each.filter_map(|(layer, target)| {
            let module = format!("model.layers.{layer}.{}", target.path());
            let (outputs, inputs) = size(&format!("{module}.weight"))?;
            Some(Place { layer: layer as usize, target, module, outputs, inputs })
        })
        .collect()
    }
}

/// A projection of a model.
pub(crate) struct Place {
    layer: usize,
    target: LoraTarget,
    /// Its name, such as `model.layers.0.self_attn.q_proj`.
    pub(crate) module: String,
    pub(crate) outputs: i64,
    pub(crate) inputs: i64,
}

/// The adapter of one projection.
pub(crate) struct Adapter {
    /// A `[rank, in]`.
    pub(crate) down: Tensor,
    /// B `[out, rank]`.
    pub(crate) up: Tensor,
    /// alpha / rank.
    pub(crate) scale: f64,
    /// Where its outputs begin in those of the product that it belongs to.
    pub(crate) first: i64,
}

impl Adapter {
    /// A is drawn uniformly between ±1/√in (Kaiming with a = √5, as PEFT), B is zero: it changes nothing yet.
    fn fresh(place: &Place, lora: &LoraConfig, seed: u64) -> Self {
        let bound = 1.0 / (place.inputs as f64).sqrt();
        // Not libtorch's generator: it is shared by all threads of the process.
        let mut random = fingerprint::derive_rng(seed, &place.module, 0);
        let mut draw = || (((f64::from(random.next_u32()) + 0.5) / 2f64.powi(31) - 1.0) * bound) as f32;
        let numbers: Vec<f32> = (0..lora.rank * place.inputs).map(|_| draw()).collect();
        Adapter {
            down: Tensor::from_slice(&numbers).view([lora.rank, place.inputs]),
            up: Tensor::zeros([place.outputs, lora.rank], (Kind::Float, Device::Cpu)),
            scale: lora.alpha / lora.rank as f64,
            first: 0,
        }
    }

    /// Its part of what the product gives, along a dimension.
    pub(crate) fn of(&self, product: &Tensor, dimension: i64) -> Tensor {
        product.narrow(dimension, self.first, self.up.size()[0])
    }

    /// What it adds to the projection of `x` `[.., in]`: `[.., out]`.
    pub(crate) fn apply(&self, x: &Tensor) -> Tensor {
        (x.linear::<&Tensor>(&self.down, None) * self.scale).linear::<&Tensor>(&self.up, None)
    }

    /// The weight with the adapter in it, a new tensor: computed in float32, then rounded to `kind`.
    pub(crate) fn merge(&self, weight: &Tensor, kind: Kind) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let change = self.up.f_to_kind(Kind::Float)?.f_matmul(&self.down.f_to_kind(Kind::Float)?)? * self.scale;
        Ok(weight.f_to_kind(Kind::Float)?.f_add(&change)?.f_to_kind(kind)?)
    }
}

/// The adapters of a model.
pub(crate) struct Adapters {
    pub(crate) lora: LoraConfig,
    pub(crate) each: Vec<(Place, Adapter)>,
    /// Every A and B under the name of its projection, in the order of the layers; those of `each` are views of it.
    pub(crate) numbers: ParamBuffer,
}

impl Adapters {
    /// Copies adapters into one buffer.
    pub(crate) fn new(lora: LoraConfig, mut each: Vec<(Place, Adapter)>, device: Device, kind: Kind) -> Self {
        let _no_grad = tch::no_grad_guard();
        let names = |place: &Place| ["lora_A", "lora_B"].map(|part| format!("{}.{part}.weight", place.module));
        let shapes = each
            .iter()
            .flat_map(|(place, adapter)| names(place).into_iter().zip([adapter.down.size(), adapter.up.size()]));
        let numbers = ParamBuffer::zeros(shapes.collect(), device, kind);
        for (place, adapter) in &mut each {
            for (name, tensor) in names(place).iter().zip([&mut adapter.down, &mut adapter.up]) {
                let mut view = numbers.get(name).unwrap_or_else(|| unreachable!("it was laid out just now"));
                view.copy_(tensor);
                *tensor = view;
            }
        }
        Adapters { lora, each, numbers }
    }

    /// What collects gradients, with the names in `numbers`.
    pub(crate) fn leaves(&self) -> Vec<(Tensor, Vec<String>)> {
        let tensors = self.each.iter().flat_map(|(_, adapter)| [&adapter.down, &adapter.up]);
        let names = self.numbers.tensors().into_iter().map(|(name, _)| vec![name]);
        tensors.map(Tensor::shallow_clone).zip(names).collect()
    }

    /// The adapter of the weight of this name.
    pub(crate) fn find(&self, weight: &str) -> Option<&Adapter> {
        let module = weight.strip_suffix(".weight")?;
        self.each.iter().find(|(place, _)| place.module == module).map(|(_, adapter)| adapter)
    }
}

impl Transformer {
    /// Puts fresh adapters, drawn from `seed`, beside the weights, in place of any that are there; the weights no longer collect
    /// gradients. Until the adapters are trained, the model computes what its weights do.
    pub fn add_adapters(&mut self, lora: &LoraConfig, seed: u64) {
        self.freeze();
        let fresh = |place| {
            let adapter = Adapter::fresh(&place, lora, seed);
            (place, adapter)
        };
        let each = lora.places(self.config()).into_iter().map(fresh).collect();
        let mut adapters = Adapters::new(lora.clone(), each, self.device(), self.kind());
        let config = self.config().clone();
        for (place, adapter) in &mut adapters.each {
            let (product, first) = place.target.of(&mut self.layers[place.layer], &config);
            adapter.first = first;
            let Adapter { down, up, scale, .. } = &*adapter;
            product.adapters.push(Adapter { down: down.shallow_clone(), up: up.shallow_clone(), scale: *scale, first });
        }
        self.adapters = Some(adapters);
    }

    /// The model with its adapters merged into weights of its own, to decode with. `None` where there are no adapters. It does not follow what training changes later.
    ///
    /// # Errors
    /// [`crate::Error::Torch`], such as memory that ran out.
    pub fn to_merged(&self) -> Result<Option<Self>> {
        let Some(adapters) = &self.adapters else { return Ok(None) };
        let _no_grad = tch::no_grad_guard();
        let weights = self.weights().copy();
        for (name, mut weight) in weights.tensors() {
            if let Some(adapter) = adapters.find(&name) {
                weight.f_copy_(&adapter.merge(&weight, self.kind())?)?;
            }
        }
        Ok(Some(Self::assemble(self.config().clone(), weights)))
    }
}
