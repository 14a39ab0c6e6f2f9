//! Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685). Beside the frozen weight W of a
//! projection there are two small matrices, A `[rank, in]` and B `[out, rank]`, and the output
//! becomes x Wᵀ + alpha / rank · (x Aᵀ) Bᵀ.
//!
//! A model with adapters for all tokens is used like any other: every forward includes them, and
//! `checkpoint::save` writes the merged weights. They cost two small products for each projection,
//! and the CUDA kernels of decoding do not know them. For decoding, a merged copy is therefore made
//! first (`Transformer::to_merged`): its changed weights are computed in float32 into a buffer of
//! their own. The copy takes memory while it lives, but nothing has to be undone afterwards: the
//! frozen weights are never written, and training continues from exactly the same bits.
//!
//! Adapters for draft tokens (`AdaptedTokens::Drafts`) are the exception: a forward includes them for
//! the tokens that it names as drafts alone, and they are neither merged nor saved with the weights.
//! The CUDA kernels of decoding multiply with them.

use std::collections::BTreeSet;

use garde::Validate;
use rand_chacha::rand_core::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::config::ModelConfig;
use super::params::ParamBuffer;
use super::quantized::BaseDtype;
use crate::{Error, Result, fingerprint};

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
    /// The projections that get an adapter in each layer from `first_layer` on.
    #[garde(length(min = 1))]
    pub targets: BTreeSet<LoraTarget>,
    /// The first layer that gets adapters, counted from 0. With `on: drafts`, the layers before it
    /// read a draft token only once, as the model reads it.
    #[garde(skip)]
    pub first_layer: usize,
    /// The tokens that the adapters act on.
    #[garde(skip)]
    pub on: AdaptedTokens,
    /// Type of the frozen weights.
    #[garde(skip)]
    pub base_dtype: BaseDtype,
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig {
            rank: 16,
            alpha: 32.0,
            targets: BTreeSet::from(LoraTarget::ALL),
            first_layer: 0,
            on: AdaptedTokens::All,
            base_dtype: BaseDtype::Model,
        }
    }
}

impl LoraConfig {
    /// Checks that a model of this configuration has layers for the adapters.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the key.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        if self.first_layer < config.num_layers as usize {
            return Ok(());
        }
        let (first, last) = (self.first_layer, config.num_layers - 1);
        Err(Error::usage(format!("first_layer={first}: the last layer of the model is {last} (the first is 0)")))
    }

    /// Number of trained parameters on a model of this configuration.
    pub fn num_parameters(&self, config: &ModelConfig) -> i64 {
        let modules = self.target_modules(config);
        modules.iter().map(|module| self.rank * (module.in_features + module.out_features)).sum()
    }

    /// The factor of an adapter's output.
    fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Every projection that gets an adapter, layer by layer.
    pub(crate) fn target_modules(&self, config: &ModelConfig) -> Vec<TargetModule> {
        let shapes = config.parameter_shapes();
        let shape_of = |weight: &str| shapes.iter().find(|(name, _)| name == weight).map(|(_, shape)| shape);
        let layers = self.first_layer as i64..config.num_layers;
        let targets = layers.flat_map(|layer| self.targets.iter().map(move |&target| (layer, target)));
        targets
            .map(|(layer, target)| {
                let name = format!("model.layers.{layer}.{}", target.path());
                let shape = shape_of(&format!("{name}.weight")).expect("every layer has all projections");
                TargetModule { layer: layer as usize, target, name, out_features: shape[0], in_features: shape[1] }
            })
            .collect()
    }
}

/// The tokens that adapters act on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AdaptedTokens {
    /// All tokens.
    #[default]
    All,
    /// Draft tokens alone: all others are computed by the frozen model, whose answers therefore
    /// cannot change (gated LoRA; Samragh et al., arXiv 2507.11851).
    Drafts,
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

    /// Name of the module within its part of a layer.
    fn name(self) -> &'static str {
        let path = self.path();
        path.rsplit_once('.').map_or(path, |(_, name)| name)
    }

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
    layer: usize,
    target: LoraTarget,
    /// Such as `model.layers.0.self_attn.q_proj`.
    pub(crate) name: String,
    pub(crate) out_features: i64,
    pub(crate) in_features: i64,
}

impl TargetModule {
    fn lora_a_name(&self) -> String {
        format!("{}.lora_A.weight", self.name)
    }

    fn lora_b_name(&self) -> String {
        format!("{}.lora_B.weight", self.name)
    }
}

/// The adapter of one projection.
pub(crate) struct LoraAdapter {
    /// A `[rank, in]`.
    pub(crate) lora_a: Tensor,
    /// B `[out, rank]`.
    pub(crate) lora_b: Tensor,
    /// alpha / rank.
    scale: f64,
}

impl LoraAdapter {
    pub(crate) fn new(lora_a: Tensor, lora_b: Tensor, config: &LoraConfig) -> Self {
        LoraAdapter { lora_a, lora_b, scale: config.scale() }
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

    /// A new weight with the adapter in it, computed in float32 and rounded to `kind`.
    pub(crate) fn merge(&self, weight: &Tensor, kind: Kind) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let change = self.lora_b.f_matmul(&self.lora_a)? * self.scale;
        Ok(weight.f_to_kind(Kind::Float)?.f_add(&change)?.f_to_kind(kind)?)
    }
}

/// The adapters of the projections that one product computes, such as those of queries, keys and
/// values.
pub(crate) struct JoinedAdapters {
    /// A of each, one after the other: `[adapters x rank, in]`, in the type of [`LoraAdapters::params`];
    /// here and below.
    pub(crate) lora_a: Tensor,
    /// B of each, `[out, rank]`.
    pub(crate) lora_b: Vec<Tensor>,
    /// The first output of each among those of the product.
    output_offsets: Vec<i64>,
    /// alpha / rank.
    pub(crate) scale: f64,
    /// The tokens that they act on.
    on: AdaptedTokens,
    /// Copies for products in the model's type, if that is another one.
    rounded: Option<RoundedAdapters>,
}

/// Copies of [`JoinedAdapters`] in the model's type.
pub(crate) struct RoundedAdapters {
    /// A, times the scale.
    pub(crate) scaled_a: Tensor,
    pub(crate) lora_b: Vec<Tensor>,
}

impl JoinedAdapters {
    /// The product of `x [.., in]` with what the adapters change; gradients flow. `draft_rows`: the
    /// indices of the draft tokens among all tokens of `x`, int64 `[drafts]`, if there are any.
    pub(super) fn add_to(&self, product: Tensor, x: &Tensor, draft_rows: Option<&Tensor>) -> Tensor {
        match (self.on, draft_rows) {
            (AdaptedTokens::All, _) => {
                self.add_to_all(&product, x);
                product
            }
            (AdaptedTokens::Drafts, None) => product,
            (AdaptedTokens::Drafts, Some(rows)) => {
                let last = |x: &Tensor| *x.size().last().expect("activations have a last dimension");
                let select = |x: &Tensor| x.reshape([-1, last(x)]).index_select(0, rows);
                let drafts = select(&product);
                self.add_to_all(&drafts, &select(x));
                product.reshape([-1, last(&product)]).index_copy(0, rows, &drafts).view_as(&product)
            }
        }
    }

    /// Adds to the product of `x [.., in]`, in place, what the adapters change.
    fn add_to_all(&self, product: &Tensor, x: &Tensor) {
        let low_rank = x.linear::<&Tensor>(&self.lora_a.to_kind(x.kind()), None) * self.scale;
        for (index, lora_b) in self.lora_b.iter().enumerate() {
            let change = self.low_rank_of(&low_rank, index).linear::<&Tensor>(&lora_b.to_kind(x.kind()), None);
            let _ = self.outputs_of(product, index).g_add_(&change);
        }
    }

    /// All of them as one adapter of a product with so many outputs, in type `kind`: A `[rank, in]`,
    /// times the scale, and B `[out, rank]`, whose rows are zero outside of the columns of their own A.
    /// The joined rank is padded with zeros to a multiple. What is like this already is shared.
    ///
    /// # Errors
    /// [`Error::Torch`], for instance when memory runs out.
    pub(crate) fn as_one(&self, num_outputs: i64, kind: Kind, rank_multiple: usize) -> Result<(Tensor, Tensor)> {
        let [num_rows, num_inputs] = self.lora_a.size()[..] else {
            return Err(Error::internal("adapters are matrices"));
        };
        let joined_rank = (num_rows as usize).next_multiple_of(rank_multiple) as i64;
        let options = (kind, self.lora_a.device());
        let is_whole = joined_rank == num_rows && self.lora_a.kind() == kind;
        let lora_a = if is_whole && self.scale == 1.0 {
            self.lora_a.shallow_clone()
        } else {
            let lora_a = Tensor::f_zeros([joined_rank, num_inputs], options)?;
            lora_a.f_narrow(0, 0, num_rows)?.f_copy_(&(&self.lora_a * self.scale))?;
            lora_a
        };
        if let [lora_b] = &self.lora_b[..]
            && is_whole
            && lora_b.size()[0] == num_outputs
        {
            return Ok((lora_a, lora_b.shallow_clone()));
        }
        let lora_b = Tensor::f_zeros([num_outputs, joined_rank], options)?;
        for (index, own_b) in self.lora_b.iter().enumerate() {
            let rank = own_b.size()[1];
            let rows = lora_b.f_narrow(0, self.output_offsets[index], own_b.size()[0])?;
            rows.f_narrow(1, index as i64 * rank, rank)?.f_copy_(own_b)?;
        }
        Ok((lora_a, lora_b))
    }

    /// The copies in the model's type, as of the last [`LoraAdapters::round`].
    ///
    /// # Errors
    /// [`Error::Internal`] for adapters in the model's type.
    pub(crate) fn rounded(&self) -> Result<&RoundedAdapters> {
        self.rounded.as_ref().ok_or_else(|| Error::internal("adapters in the model's type have no rounded copy"))
    }

    /// The columns of `low_rank [.., adapters x rank]` that belong to an adapter.
    pub(crate) fn low_rank_of(&self, low_rank: &Tensor, index: usize) -> Tensor {
        let rank = self.lora_b[index].size()[1];
        low_rank.narrow(-1, index as i64 * rank, rank)
    }

    /// The columns of `product [.., out]` that belong to the projection of an adapter.
    pub(crate) fn outputs_of(&self, product: &Tensor, index: usize) -> Tensor {
        product.narrow(-1, self.output_offsets[index], self.lora_b[index].size()[0])
    }

    /// Whether every one of a product's outputs has an adapter.
    pub(crate) fn cover(&self, num_outputs: i64) -> bool {
        self.lora_b.iter().map(|lora_b| lora_b.size()[0]).sum::<i64>() == num_outputs
    }
}

/// All adapters of a model.
pub(crate) struct LoraAdapters {
    pub(crate) config: LoraConfig,
    modules: Vec<(TargetModule, LoraAdapter)>,
    /// Every A, layer by layer, and then every B, under the name of its projection: in float32 for
    /// training, else in the model's type. The tensors of `modules` are views of it.
    pub(crate) params: ParamBuffer,
    /// A copy of `params` in the model's type, with every A scaled, if that is another one.
    rounded: Option<ParamBuffer>,
}

impl LoraAdapters {
    /// Copies adapters into one buffer of type `params_kind`, for products in type `kind`.
    pub(crate) fn new(
        config: LoraConfig,
        mut modules: Vec<(TargetModule, LoraAdapter)>,
        device: Device,
        params_kind: Kind,
        kind: Kind,
    ) -> Self {
        let _no_grad = tch::no_grad_guard();
        let all_a = modules.iter().map(|(module, adapter)| (module.lora_a_name(), adapter.lora_a.size()));
        let all_b = modules.iter().map(|(module, adapter)| (module.lora_b_name(), adapter.lora_b.size()));
        let params = ParamBuffer::zeros(all_a.chain(all_b).collect(), device, params_kind);
        for (module, adapter) in &mut modules {
            for (name, tensor) in
                [(module.lora_a_name(), &mut adapter.lora_a), (module.lora_b_name(), &mut adapter.lora_b)]
            {
                let mut view = params.get(&name).expect("the buffer was laid out with this name");
                view.copy_(tensor);
                *tensor = view;
            }
        }
        let rounded = (kind != params_kind).then(|| params.zeros_like(kind));
        LoraAdapters { config, modules, params, rounded }
    }

    /// The first layer with adapters, or in which layers their projections differ from there on.
    pub(crate) fn first_layer(
        modules: &[(TargetModule, LoraAdapter)],
        model: &ModelConfig,
    ) -> std::result::Result<usize, String> {
        let num_layers = model.num_layers as usize;
        let mut targets = vec![BTreeSet::new(); num_layers];
        for (module, _) in modules {
            targets[module.layer].insert(module.target);
        }
        let first = targets.iter().position(|targets| !targets.is_empty()).unwrap_or(0);
        let Some(other) = (first..num_layers).find(|&layer| targets[layer] != targets[first]) else { return Ok(first) };
        let names = |layer: usize| match targets[layer].iter().map(|target| target.name()).collect::<Vec<_>>() {
            names if names.is_empty() => "no projection".to_owned(),
            names => names.join(", "),
        };
        let (names, first_names) = (names(other), names(first));
        Err(format!("layer {other} has adapters for {names}, but layer {first} for {first_names}"))
    }

    /// Fresh adapters for every target of a model, as in [`Self::new`].
    pub(super) fn random(
        lora: &LoraConfig,
        seed: u64,
        model: &ModelConfig,
        device: Device,
        params_kind: Kind,
        kind: Kind,
    ) -> Self {
        let with_adapter = |module| {
            let adapter = LoraAdapter::random(&module, lora, seed);
            (module, adapter)
        };
        let modules = lora.target_modules(model).into_iter().map(with_adapter).collect();
        Self::new(lora.clone(), modules, device, params_kind, kind)
    }

    /// The adapters of a layer's projections that one product computes: `projections` with the
    /// first output of each. `None` if none of them has an adapter. Their tensors, with the names
    /// in `params` that each joins, are added to `leaves`.
    pub(super) fn joined(
        &self,
        layer: usize,
        projections: &[(LoraTarget, i64)],
        leaves: &mut Vec<(Tensor, Vec<String>)>,
    ) -> Option<JoinedAdapters> {
        let find = |&(target, output_offset): &(LoraTarget, i64)| {
            let mut modules = self.modules.iter().map(|(module, _)| module);
            Some((modules.find(|module| module.layer == layer && module.target == target)?, output_offset))
        };
        let (modules, output_offsets): (Vec<&TargetModule>, Vec<i64>) = projections.iter().filter_map(find).unzip();
        if modules.is_empty() {
            return None;
        }
        let a_names: Vec<String> = modules.iter().map(|module| module.lora_a_name()).collect();
        let b_names: Vec<String> = modules.iter().map(|module| module.lora_b_name()).collect();
        let matrices = |params: &ParamBuffer| {
            let lora_b: Option<Vec<Tensor>> = b_names.iter().map(|name| params.get(name)).collect();
            params.get_joined(&a_names).zip(lora_b).expect("the buffer holds every adapter")
        };
        let (lora_a, lora_b) = matrices(&self.params);
        let rounded = self.rounded.as_ref().map(matrices);
        let rounded = rounded.map(|(scaled_a, lora_b)| RoundedAdapters { scaled_a, lora_b });
        leaves.push((lora_a.shallow_clone(), a_names));
        leaves.extend(lora_b.iter().map(Tensor::shallow_clone).zip(b_names.into_iter().map(|name| vec![name])));
        let (scale, on) = (self.config.scale(), self.config.on);
        Some(JoinedAdapters { lora_a, lora_b, output_offsets, scale, on, rounded })
    }

    /// Updates the copies in the model's type, which a pass by hand multiplies with.
    pub(crate) fn round(&self) -> Result<()> {
        let Some(rounded) = &self.rounded else { return Ok(()) };
        let _no_grad = tch::no_grad_guard();
        let num_all = self.params.buffer().size()[0];
        let num_in_a = self.modules.iter().map(|(_, adapter)| adapter.lora_a.numel() as i64).sum();
        let narrow = |params: &ParamBuffer, start, length| params.buffer().narrow(0, start, length);
        let every_a = narrow(rounded, 0, num_in_a);
        let _ = narrow(&self.params, 0, num_in_a).f_mul_out(&every_a, &Tensor::from(self.config.scale()))?;
        let mut every_b = narrow(rounded, num_in_a, num_all - num_in_a);
        every_b.f_copy_(&narrow(&self.params, num_in_a, num_all - num_in_a))?;
        Ok(())
    }

    /// A and B of every adapter, layer by layer.
    pub(crate) fn named_tensors(&self) -> Vec<(String, Tensor)> {
        let named = |(module, adapter): &(TargetModule, LoraAdapter)| {
            [
                (module.lora_a_name(), adapter.lora_a.shallow_clone()),
                (module.lora_b_name(), adapter.lora_b.shallow_clone()),
            ]
        };
        self.modules.iter().flat_map(named).collect()
    }

    /// The adapter of the weight of this name.
    pub(crate) fn find(&self, weight: &str) -> Option<&LoraAdapter> {
        let name = weight.strip_suffix(".weight")?;
        self.modules.iter().find(|(module, _)| module.name == name).map(|(_, adapter)| adapter)
    }
}
