//! Changes of settings that make a run fit. Every proposal is checked by the same estimate that says
//! that the run does not fit as it is.

use cllm_core::Result;
use cllm_core::model::{BaseDtype, LoraConfig};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tch::Kind;

use crate::plan::needs::{Available, Comparison, Comparisons, Needs, RunInputs, Verdict};
use crate::plan::time;
use crate::settings::{Settings, StateDtype};

/// Lengths that proposals round to.
const BATCH_TOKENS_STEP: usize = 256;

/// Settings with which one need fits.
#[derive(Debug, Clone, Serialize)]
pub struct Proposal {
    /// The settings to change, by their full key.
    pub settings: Map<String, Value>,
    /// The need and what is there, with these settings.
    #[serde(flatten)]
    pub comparison: Comparison,
    /// Estimated duration of the run, divided by that with the settings as they are.
    pub relative_time: f64,
    /// Whether the trained model is another one than without the change.
    pub changes_training: bool,
}

/// What can be changed for each need that does not fit.
#[derive(Debug, Default, Serialize)]
pub struct Proposals {
    pub device_memory: Vec<Proposal>,
    pub host_memory: Vec<Proposal>,
    pub disk: Vec<Proposal>,
}

/// Settings with a list of what was changed in them.
#[derive(Clone)]
struct Variant {
    settings: Settings,
    changes: Map<String, Value>,
    changes_training: bool,
}

/// Finds proposals for one need.
struct Search<'s> {
    inputs: &'s RunInputs<'s>,
    available: &'s Available,
    select: fn(&Comparisons) -> Option<Comparison>,
    /// Of the settings as they are.
    seconds: f64,
}

impl Proposals {
    /// # Errors
    /// Settings that leave no example, which were refused before.
    pub fn find(
        inputs: &RunInputs<'_>,
        settings: &Settings,
        comparisons: &Comparisons,
        available: &Available,
    ) -> Result<Self> {
        let own = Variant { settings: settings.clone(), changes: Map::new(), changes_training: false };
        let seconds = epoch_seconds(inputs, settings, &inputs.needs(settings)?);
        let search = |select| Search { inputs, available, select, seconds };
        let fits = |comparison: Option<Comparison>| comparison.is_none_or(|comparison| comparison.fits());
        let mut proposals = Proposals::default();
        if !fits(comparisons.device_memory) {
            proposals.device_memory = search(|comparisons| comparisons.device_memory).for_memory(&own)?;
        }
        // The memory of the host holds the tensors of the CPU.
        if inputs.device.is_cpu() && !comparisons.host_memory.fits() {
            proposals.host_memory = search(|comparisons| Some(comparisons.host_memory)).for_memory(&own)?;
        }
        if comparisons.are_here && !comparisons.disk.fits() {
            proposals.disk = search(|comparisons| Some(comparisons.disk)).for_disk(&own)?;
        }
        Ok(proposals)
    }
}

impl Variant {
    fn with(&self, changes: &[(&str, Value)], change: impl FnOnce(&mut Settings)) -> Self {
        let mut variant = self.clone();
        change(&mut variant.settings);
        variant.changes.extend(changes.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        variant
    }

    fn with_checkpointed(&self, layers: usize) -> Self {
        self.with(&[("checkpointed_layers", json!(layers))], |settings| settings.checkpointed_layers = layers)
    }

    /// Batches of another size, and as many of them in a step as keep its tokens. A batch holds at
    /// least one example.
    fn with_batch_tokens(&self, max_batch_tokens: usize, world_size: usize) -> Self {
        let Settings { max_batch_tokens: old, accumulation, max_example_tokens, .. } = self.settings;
        let more = (accumulation * old).div_ceil(max_batch_tokens).next_multiple_of(world_size);
        let changes = [("max_batch_tokens", json!(max_batch_tokens)), ("accumulation", json!(more))];
        let variant = self.with(&changes, |settings| {
            settings.max_batch_tokens = max_batch_tokens;
            settings.accumulation = more;
        });
        if max_example_tokens <= max_batch_tokens {
            return variant;
        }
        let change = [("max_example_tokens", json!(max_batch_tokens))];
        variant.with(&change, |settings| settings.max_example_tokens = max_batch_tokens)
    }

    /// Notes that the change gives another trained model.
    fn with_changed_training(self) -> Self {
        Variant { changes_training: true, ..self }
    }

    fn with_bf16_state(&self) -> Self {
        let change = [("optimizer.state_dtype", json!("bfloat16"))];
        self.with(&change, |settings| settings.optimizer.state_dtype = StateDtype::Bfloat16).with_changed_training()
    }

    fn with_adapters(&self) -> Self {
        let change = [("lora.rank", json!(16))];
        let variant =
            self.with(&change, |settings| settings.lora = Some(LoraConfig::default())).with_changed_training();
        if variant.settings.optimizer.state_dtype == StateDtype::Float32 {
            return variant;
        }
        let change = [("optimizer.state_dtype", json!("float32"))];
        variant.with(&change, |settings| settings.optimizer.state_dtype = StateDtype::Float32)
    }

    fn with_int8_base(&self) -> Self {
        let change = [("lora.base_dtype", json!("int8"))];
        let change_base = |settings: &mut Settings| {
            settings.lora.iter_mut().for_each(|lora| lora.base_dtype = BaseDtype::Int8);
        };
        self.with(&change, change_base).with_changed_training()
    }

    /// Without the anchor's own model: adapters are anchored to the model below them, and other
    /// students to nothing. Without an anchor, these need the autoregressive loss.
    fn without_second_model(&self) -> Self {
        if self.settings.lora.is_some() {
            let change = [("consistency.anchor", Value::Null)];
            return self.with(&change, |settings| settings.consistency.anchor = None).with_changed_training();
        }
        let change = [("consistency.anchor_weight", json!(0))];
        let variant = self.with(&change, |settings| settings.consistency.anchor_weight = 0.0).with_changed_training();
        if self.settings.consistency.ar_weight > 0.0 {
            return variant;
        }
        variant.with(&[("consistency.ar_weight", json!(10))], |settings| settings.consistency.ar_weight = 10.0)
    }
}

impl Search<'_> {
    /// First what leaves the trained model as it is, the fastest first; then what does not, in the
    /// order of how much it changes.
    fn for_memory(&self, own: &Variant) -> Result<Vec<Proposal>> {
        // The batches of one epoch are enough to look at.
        let one_epoch = Settings { epochs: 1, max_steps: None, ..own.settings.clone() };
        let own = &Variant { settings: one_epoch, ..own.clone() };
        let mut proposals = Vec::new();
        proposals.extend(self.with_fewer_prompts(own)?);
        proposals.extend(self.with_checkpointing(own)?);
        proposals.extend(self.with_smaller_batches(own)?);
        if proposals.is_empty() {
            proposals.extend(self.with_both(own)?);
        }
        proposals.extend(self.with_sharded_gradients(own)?);
        let settings = &own.settings;
        if self.can_round(settings) {
            proposals.extend(self.fastest(&own.with_bf16_state())?);
        }
        if settings.lora.as_ref().is_some_and(|lora| lora.base_dtype == BaseDtype::Model) {
            proposals.extend(self.fastest(&own.with_int8_base())?);
        }
        if settings.has_second_model() {
            proposals.extend(self.fastest(&own.without_second_model())?);
        }
        if settings.lora.is_none() && settings.init.is_none() {
            let adapters = own.with_adapters();
            let proposal = self.fastest(&adapters)?;
            proposals.extend(if proposal.is_some() { proposal } else { self.fastest(&adapters.with_int8_base())? });
        }
        let (mut same, different): (Vec<_>, Vec<_>) =
            proposals.into_iter().partition(|proposal| !proposal.changes_training);
        same.sort_by(|a, b| a.relative_time.total_cmp(&b.relative_time));
        Ok([same, different].concat())
    }

    fn for_disk(&self, own: &Variant) -> Result<Vec<Proposal>> {
        let fewer = own.with(&[("max_checkpoints", json!(1))], |settings| settings.max_checkpoints = 1);
        let last_only = own.with(&[("save_every", json!(0))], |settings| settings.save_every = Some(0));
        let mut variants = vec![fewer, last_only];
        if self.can_round(&own.settings) {
            variants.extend(variants.clone().iter().map(Variant::with_bf16_state));
        }
        if own.settings.lora.is_none() && own.settings.init.is_none() {
            variants.push(own.with_adapters());
        }
        let mut proposals: Vec<Proposal> = Vec::new();
        for variant in &variants {
            proposals.extend(self.check(variant)?);
        }
        Ok(proposals)
    }

    /// Whether the state of the optimizer could be bfloat16 and is not.
    fn can_round(&self, settings: &Settings) -> bool {
        let is_float32 = settings.optimizer.state_dtype == StateDtype::Float32;
        is_float32 && settings.lora.is_none() && self.inputs.device.kind == Kind::BFloat16
    }

    /// The variant as a proposal, if it fits.
    fn check(&self, variant: &Variant) -> Result<Option<Proposal>> {
        let needs = self.inputs.needs(&variant.settings)?;
        let comparison = (self.select)(&Comparisons::new(&needs, self.available));
        let Some(comparison) = comparison.filter(|comparison| comparison.verdict == Verdict::Fits) else {
            return Ok(None);
        };
        Ok(Some(Proposal {
            settings: variant.changes.clone(),
            comparison,
            relative_time: epoch_seconds(self.inputs, &variant.settings, &needs) / self.seconds,
            changes_training: variant.changes_training,
        }))
    }

    /// The variant as it is, or the faster of more checkpointing and smaller batches, or both.
    fn fastest(&self, variant: &Variant) -> Result<Option<Proposal>> {
        if let Some(proposal) = self.check(variant)? {
            return Ok(Some(proposal));
        }
        let ways = [self.with_checkpointing(variant)?, self.with_smaller_batches(variant)?, self.with_both(variant)?];
        Ok(ways.into_iter().flatten().min_by(|a, b| a.relative_time.total_cmp(&b.relative_time)))
    }

    /// The fewest checkpointed layers that fit. Each further layer saves memory, except that the
    /// first brings the memory of one that is recomputed.
    fn with_checkpointing(&self, variant: &Variant) -> Result<Option<Proposal>> {
        let num_layers = self.inputs.config.num_layers as usize;
        let num_unadapted = variant.settings.lora.as_ref().map_or(0, |lora| lora.first_layer);
        let lowest = variant.settings.checkpointed_layers.max(num_unadapted) + 1;
        self.smallest(lowest, num_layers, |layers| variant.with_checkpointed(layers))
    }

    /// The largest batches that fit, in multiples of 256 tokens.
    fn with_smaller_batches(&self, variant: &Variant) -> Result<Option<Proposal>> {
        let settings = &variant.settings;
        let lengths = self.inputs.examples.iter().map(|example| example.max_packed_tokens(&settings.consistency));
        let longest = lengths.filter(|tokens| *tokens <= settings.max_example_tokens).max().unwrap_or(1);
        let multiple = |number: usize| number * BATCH_TOKENS_STEP;
        let (lowest, highest) =
            (longest.div_ceil(BATCH_TOKENS_STEP), (settings.max_batch_tokens - 1) / BATCH_TOKENS_STEP);
        let world_size = self.inputs.device.world_size;
        // Counted down, so that the smallest number is the largest batch.
        let variant = |less: usize| variant.with_batch_tokens(multiple(highest - less), world_size);
        if highest < lowest { Ok(None) } else { self.smallest(0, highest - lowest, variant) }
    }

    /// All layers checkpointed, and the largest batches that fit then.
    fn with_both(&self, variant: &Variant) -> Result<Option<Proposal>> {
        let num_layers = self.inputs.config.num_layers as usize;
        if variant.settings.checkpointed_layers >= num_layers {
            return Ok(None);
        }
        self.with_smaller_batches(&variant.with_checkpointed(num_layers))
    }

    /// As many batches in a step as there are processes, with which each holds only its shard of the
    /// gradients: larger ones that keep the tokens of a step, or else fewer tokens in a step.
    fn with_sharded_gradients(&self, own: &Variant) -> Result<Option<Proposal>> {
        let Settings { accumulation, max_batch_tokens, .. } = own.settings;
        let world_size = self.inputs.device.world_size;
        let few_batches = Settings { accumulation: world_size, ..own.settings.clone() };
        if accumulation <= world_size || !few_batches.shards_gradients(world_size) {
            return Ok(None);
        }
        let larger = own.with_batch_tokens((accumulation * max_batch_tokens).div_ceil(world_size), world_size);
        let change = [("accumulation", json!(world_size))];
        let fewer = own.with(&change, |settings| *settings = few_batches).with_changed_training();
        for variant in [larger, fewer] {
            let proposal = self.check(&variant)?;
            let proposal = if proposal.is_some() { proposal } else { self.with_checkpointing(&variant)? };
            if proposal.is_some() {
                return Ok(proposal);
            }
        }
        Ok(None)
    }

    /// The most validation prompts that fit, for a run whose training alone does.
    fn with_fewer_prompts(&self, variant: &Variant) -> Result<Option<Proposal>> {
        let Some(probe) = self.inputs.probe else { return Ok(None) };
        self.smallest(1, probe.num_prompts - 1, |fewer| {
            let num_examples = probe.num_prompts - fewer;
            let change = [("validation.num_examples", json!(num_examples))];
            variant.with(&change, |settings| settings.validation.num_examples = num_examples)
        })
    }

    /// The proposal with the smallest number from `low` to `high` that fits; any larger number fits
    /// if it does.
    fn smallest(&self, low: usize, high: usize, variant: impl Fn(usize) -> Variant) -> Result<Option<Proposal>> {
        if low > high {
            return Ok(None);
        }
        let Some(mut found) = self.check(&variant(high))? else { return Ok(None) };
        let (mut low, mut high) = (low, high);
        while low < high {
            let middle = (low + high) / 2;
            match self.check(&variant(middle))? {
                Some(proposal) => (found, high) = (proposal, middle),
                None => low = middle + 1,
            }
        }
        Ok(Some(found))
    }
}

/// Estimated seconds of the first epoch. Those of a device that is not known are compared with each
/// other only.
fn epoch_seconds(inputs: &RunInputs<'_>, settings: &Settings, needs: &Needs) -> f64 {
    let num_steps = needs.batches.len().div_ceil(settings.accumulation) as f64;
    num_steps * inputs.step_work(settings, needs).seconds(inputs.device.gpu.unwrap_or(time::typical_gpu()))
}

#[cfg(test)]
mod tests {
    use cllm_core::model::{ModelConfig, ModelShape};

    use super::*;
    use crate::data::dataset::{Block, Example};

    /// Proposals for the memory of GPUs of so many gigabytes, one for each process, with an 8B model
    /// whose layers are all checkpointed.
    fn proposals(settings: &Settings, world_size: usize, gigabytes: u64) -> Vec<Proposal> {
        let config = ModelConfig::from_json(&ModelShape::Qwen3_8B.json()).unwrap();
        let settings = &Settings { checkpointed_layers: config.num_layers as usize, ..settings.clone() };
        let example = |index: usize| Example {
            id: index.to_string(),
            prompt_ids: vec![1; 224],
            response_ids: vec![2; 16],
            blocks: vec![Block { start: 0, states: vec![vec![3; 16], vec![2; 16]], augmented: Vec::new() }],
            labelled: vec![true; 16],
        };
        let examples: Vec<_> = (0..128).map(example).collect();
        let inputs = RunInputs::of_unknown_device(Kind::BFloat16, world_size, &config, &examples);
        let available =
            Available { device: Some(gigabytes * 1_000_000_000), host: None, disk: u64::MAX, is_here: false };
        let comparisons = Comparisons::new(&inputs.needs(settings).unwrap(), &available);
        Proposals::find(&inputs, settings, &comparisons, &available).unwrap().device_memory
    }

    fn settings() -> Settings {
        Settings { max_batch_tokens: 4096, max_example_tokens: 4096, ..Settings::plain() }
    }

    fn changes(proposals: &[Proposal]) -> Vec<(Value, bool)> {
        let change = |proposal: &Proposal| (Value::Object(proposal.settings.clone()), proposal.changes_training);
        proposals.iter().map(change).collect()
    }

    /// Weights and a shard of the float32 state are 66 GB of either GPU, and whole gradients with
    /// their sums 25 GB more.
    #[test]
    fn shards_of_gradients_are_proposed_with_the_tokens_of_a_step_where_they_fit() {
        let first = |accumulation: usize, gigabytes: u64| {
            let settings = Settings { accumulation, ..settings() };
            changes(&proposals(&settings, 2, gigabytes)).into_iter().next()
        };
        let larger = json!({"accumulation": 2, "max_batch_tokens": 8192});
        assert_eq!(first(4, 87), Some((larger, false)));
        assert_eq!(first(16, 85), Some((json!({"accumulation": 2}), true)), "32,768 tokens at a time do not fit");
        let has_shards = |change: (Value, bool)| change.0.get("accumulation") == Some(&json!(2));
        assert!(!first(2, 76).is_some_and(has_shards), "they are sharded already");
    }

    #[test]
    fn models_that_training_can_do_without_are_proposed() {
        let mut anchored = settings();
        anchored.consistency.anchor_weight = 0.5;
        anchored.optimizer.state_dtype = StateDtype::Bfloat16;
        let without = (json!({"consistency.anchor_weight": 0}), true);
        assert_eq!(changes(&proposals(&anchored, 1, 80))[0], without);
        anchored.consistency.ar_weight = 0.0;
        let labels = (json!({"consistency.anchor_weight": 0, "consistency.ar_weight": 10}), true);
        assert_eq!(changes(&proposals(&anchored, 1, 80))[0], labels);
        anchored.optimizer.state_dtype = StateDtype::Float32;
        anchored.lora = Some(LoraConfig::default());
        anchored.consistency.anchor = Some("another".to_owned());
        let int8 = (json!({"lora.base_dtype": "int8"}), true);
        assert_eq!(changes(&proposals(&anchored, 1, 35)), [int8, (json!({"consistency.anchor": null}), true)]);
    }
}
