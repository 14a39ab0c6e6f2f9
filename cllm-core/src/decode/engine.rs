//! The engine: a model, a KV cache for a number of sequences, and the three ways to ask it for
//! answers.

use std::collections::BTreeMap;

use super::backend::Backend;
use super::backend::cuda_graph::CudaGraphBackend;
use super::backend::eager::EagerBackend;
use super::backend::gated::GatedBackend;
use super::backend::speculative::SpeculativeBackend;
use super::live::{LiveBatch, LiveRows};
use super::request::{
    Answer, DecodeOptions, Job, OnTokens, Request, StopConditions, Timing, check_fits_context, required_slots,
};
use super::scheduler::{Events, PrefillPolicy, Scheduler};
use super::strategy::{NO_DRAFT_ADAPTERS, Strategy};
use super::window_chooser::WindowChooser;
use crate::model::Transformer;
use crate::{Error, Result};

/// A model with a KV cache, ready to decode.
pub struct Decoder<'m> {
    model: Box<dyn Backend + 'm>,
    draft_model: Option<Box<dyn Backend + 'm>>,
    /// By the name of the strategy. Drafts of another strategy are accepted at other rates, and forwards
    /// of as many tokens take another time.
    choosers: BTreeMap<&'static str, WindowChooser>,
    limits: CacheLimits,
    vocab_size: i64,
    adapts_drafts: bool,
}

/// The limits that the requests of a decoder must fit.
pub(super) struct CacheLimits {
    max_sequences: usize,
    /// Slots of the KV cache for each sequence.
    pub(super) capacity: usize,
    /// Length of the model's context.
    max_positions: usize,
}

impl<'m> Decoder<'m> {
    /// Allocates a cache for up to `max_sequences` sequences at once, each of up to `capacity`
    /// slots ([`required_slots`]).
    ///
    /// # Errors
    /// [`Error::Torch`], for example if the cache does not fit the device's memory.
    pub fn new(model: &'m Transformer, max_sequences: usize, capacity: usize) -> Result<Self> {
        let config = model.config();
        Ok(Decoder {
            model: new_backend(model, max_sequences, capacity, true)?,
            draft_model: None,
            choosers: BTreeMap::new(),
            limits: CacheLimits { max_sequences, capacity, max_positions: config.max_positions },
            vocab_size: config.vocab_size,
            adapts_drafts: model.adapts_drafts(),
        })
    }

    /// Adds the draft model that [`Strategy::Drafted`] needs. It must have the vocabulary of the
    /// target model.
    ///
    /// # Errors
    /// [`Error::Usage`] if the vocabularies differ in size; otherwise as [`Decoder::new`].
    pub fn with_draft_model(self, draft_model: &'m Transformer) -> Result<Self> {
        let (target_size, draft_size) = (self.vocab_size, draft_model.config().vocab_size);
        if target_size != draft_size {
            return Err(Error::usage(format!(
                "the draft model has a vocabulary of {draft_size} tokens and the target model one of {target_size}; \
                 both must use the same tokenizer"
            )));
        }
        let draft_model = Some(new_backend(draft_model, self.limits.max_sequences, self.limits.capacity, false)?);
        Ok(Decoder { draft_model, ..self })
    }

    /// Answers all requests. If there are more than the cache has rows, the next request takes the
    /// row of each sequence that finishes. Prompts are cached in forwards of their own, while other
    /// sequences wait, so prefill and decoding can be timed separately.
    ///
    /// # Errors
    /// [`Error::Usage`] if a prompt and its answer do not fit the context or the cache, or the
    /// strategy is invalid ([`Strategy::check`]); libtorch's errors; interruption.
    pub fn answer(
        &mut self,
        requests: &[Request],
        stop: &StopConditions,
        options: DecodeOptions,
        on_tokens: Option<OnTokens<'_>>,
    ) -> Result<(Vec<Answer>, Timing)> {
        let mut ignore = |_: usize, _: &[i32]| ();
        let mut answers: Vec<Option<Answer>> = requests.iter().map(|_| None).collect();
        let mut keep = |index: usize, answer: Answer| {
            answers[index] = Some(answer);
            Ok(())
        };
        let mut events = Events { on_tokens: on_tokens.unwrap_or(&mut ignore), on_finished: &mut keep };
        let timing = self.run(&mut requests.iter().cloned(), stop, options, PrefillPolicy::First, &mut events)?;
        let answers =
            answers.into_iter().map(|answer| answer.expect("the scheduler runs until every request is answered"));
        Ok((answers.collect(), timing))
    }

    /// Answers requests as they come, like [`Decoder::answer`], but caches prompts in chunks, in the
    /// same forwards that decode other sequences. `on_finished` gets the index of a request and its
    /// answer, in the order in which the answers finish.
    ///
    /// # Errors
    /// As [`Decoder::answer`], and any error of `on_finished`.
    pub fn stream(
        &mut self,
        requests: &mut dyn Iterator<Item = Request>,
        stop: &StopConditions,
        options: DecodeOptions,
        on_finished: &mut dyn FnMut(usize, Answer) -> Result<()>,
    ) -> Result<()> {
        let mut events = Events { on_tokens: &mut |_, _| (), on_finished };
        self.run(requests, stop, options, PrefillPolicy::Chunked, &mut events).map(drop)
    }

    /// Begins to answer one request; the caller asks for each forward, so it can do something else
    /// in between.
    ///
    /// # Errors
    /// As [`Decoder::answer`].
    pub fn start<'d>(
        &'d mut self,
        request: Request,
        stop: &'d StopConditions,
        options: DecodeOptions,
    ) -> Result<RunningAnswer<'d>>
    where
        'm: 'd,
    {
        options.strategy.check()?;
        self.limits.check(&request, stop, options.strategy)?;
        let (backend, chooser, _) = self.parts(options.strategy)?;
        let waiting = std::iter::once(Ok(Job { request, stop: stop.clone(), options }));
        let scheduler = Scheduler::new(waiting, 1, options.strategy, PrefillPolicy::First, chooser);
        Ok(RunningAnswer { backend, scheduler })
    }

    /// Starts a batch that requests join and leave. The decoder has [`LiveRows::num_rows`].
    ///
    /// # Errors
    /// As [`Decoder::answer`], of the strategy.
    pub fn go_live(&mut self, strategy: Strategy, rows: LiveRows) -> Result<LiveBatch<'_>> {
        strategy.check()?;
        if rows.num_rows() > self.limits.max_sequences {
            return Err(Error::internal("the decoder has too few rows for a live batch"));
        }
        let (backend, chooser, limits) = self.parts(strategy)?;
        Ok(LiveBatch::new(backend, chooser, limits, strategy, rows))
    }

    fn run(
        &mut self,
        requests: &mut dyn Iterator<Item = Request>,
        stop: &StopConditions,
        options: DecodeOptions,
        prefill: PrefillPolicy,
        events: &mut Events<'_>,
    ) -> Result<Timing> {
        options.strategy.check()?;
        let _no_grad = tch::no_grad_guard();
        let (mut backend, chooser, limits) = self.parts(options.strategy)?;
        let waiting = requests.map(|request| {
            limits.check(&request, stop, options.strategy)?;
            Ok(Job { request, stop: stop.clone(), options })
        });
        let scheduler = Scheduler::new(waiting, limits.max_sequences, options.strategy, prefill, chooser);
        scheduler.run(backend.as_mut(), events)
    }

    /// The backend for a strategy, and what else a scheduler needs.
    fn parts(&mut self, strategy: Strategy) -> Result<(Box<dyn Backend + '_>, &mut WindowChooser, &CacheLimits)> {
        let Decoder { model, draft_model, choosers, limits, adapts_drafts, .. } = self;
        let model = model.as_mut();
        let backend: Box<dyn Backend + '_> = match (strategy, draft_model) {
            (Strategy::Drafted { .. }, Some(draft_model)) => {
                Box::new(SpeculativeBackend::new(model, draft_model.as_mut()))
            }
            (Strategy::Drafted { .. }, None) => {
                return Err(Error::usage("strategy `drafted` needs a draft model in addition to the target model"));
            }
            (Strategy::Gated { .. }, _) if *adapts_drafts => Box::new(GatedBackend::new(model)),
            (Strategy::Gated { .. }, _) => {
                return Err(Error::usage(format!("the model {NO_DRAFT_ADAPTERS}")));
            }
            _ => Box::new(model),
        };
        Ok((backend, choosers.entry(strategy.name()).or_default(), limits))
    }
}

/// The backend for a model: CUDA graphs if our kernels support it, otherwise libtorch's operations.
/// Of the backends whose forwards overlap, one may have `whole_device`.
fn new_backend<'m>(
    model: &'m Transformer,
    max_sequences: usize,
    capacity: usize,
    whole_device: bool,
) -> Result<Box<dyn Backend + 'm>> {
    let _no_grad = tch::no_grad_guard();
    Ok(match CudaGraphBackend::new(model, max_sequences, capacity, whole_device)? {
        Some(backend) => Box::new(backend),
        None => Box::new(EagerBackend::new(model, max_sequences, capacity)?),
    })
}

impl CacheLimits {
    pub(super) fn check(&self, request: &Request, stop: &StopConditions, strategy: Strategy) -> Result<()> {
        check_fits_context(request, stop, self.max_positions)?;
        let required = required_slots(request.prompt_ids.len(), stop, strategy);
        if required > self.capacity {
            return Err(Error::usage(format!(
                "sample `{}` needs {required} slots of the KV cache, which has {} for each sequence",
                request.sample_id, self.capacity
            )));
        }
        Ok(())
    }
}

/// An answer that is decoded one forward at a time ([`Decoder::start`]).
pub struct RunningAnswer<'d> {
    backend: Box<dyn Backend + 'd>,
    scheduler: Scheduler<'d>,
}

impl RunningAnswer<'_> {
    /// Runs the next forward and returns the tokens that it added to the answer: none while the
    /// prompt is being cached. Returns `None` once the answer has ended.
    ///
    /// # Errors
    /// libtorch's errors; interruption.
    pub fn step(&mut self) -> Result<Option<Vec<i32>>> {
        let _no_grad = tch::no_grad_guard();
        let mut new_tokens = Vec::new();
        let mut on_tokens = |_: usize, tokens: &[i32]| new_tokens.extend_from_slice(tokens);
        let mut events = Events { on_tokens: &mut on_tokens, on_finished: &mut |_, _| Ok(()) };
        let is_running = self.scheduler.step(self.backend.as_mut(), &mut events)?;
        Ok(is_running.then_some(new_tokens))
    }

    /// Time spent so far.
    pub fn timing(&self) -> Timing {
        self.scheduler.timing()
    }
}

/// Answers all requests as one batch with a decoder made for them; see [`Decoder::answer`].
///
/// # Errors
/// As [`Decoder::new`] and [`Decoder::answer`].
pub fn decode(
    model: &Transformer,
    requests: &[Request],
    stop: &StopConditions,
    options: DecodeOptions,
) -> Result<(Vec<Answer>, Timing)> {
    for request in requests {
        check_fits_context(request, stop, model.config().max_positions)?;
    }
    let longest = requests.iter().map(|request| request.prompt_ids.len()).max().unwrap_or(0);
    let capacity = required_slots(longest, stop, options.strategy);
    Decoder::new(model, requests.len(), capacity)?.answer(requests, stop, options, None)
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tch::{Device, Kind};

    use super::*;
    use crate::decode::Width;
    use crate::model::{AdaptedTokens, LoraConfig, ModelConfig};

    #[test]
    fn a_strategy_does_not_learn_from_the_forwards_of_another() {
        let config = ModelConfig::from_json(&json!({
            "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        }));
        let mut model = Transformer::random(config.unwrap(), 7, Device::Cpu, Kind::Float);
        model.add_adapters(&LoraConfig { on: AdaptedTokens::Drafts, ..LoraConfig::default() }, 7);
        let stop = StopConditions::new(100, Vec::new());
        let mut decoder = Decoder::new(&model, 1, required_slots(3, &stop, Strategy::auto(0))).unwrap();
        let decode = |decoder: &mut Decoder<'_>, strategy| {
            let request = Request { sample_id: "a".to_owned(), prompt_ids: vec![3, 1, 4] };
            decoder.answer(&[request], &stop, DecodeOptions::greedy(strategy, 0), None).unwrap();
        };
        let rates =
            |decoder: &mut Decoder<'_>, strategy: Strategy| decoder.parts(strategy).unwrap().1.history.survival(3, 0.0);
        let (rolling, gated) = (Strategy::auto(0), Strategy::Gated { n: Width::Auto, tree: 0 });
        let before = rates(&mut decoder, rolling);
        decode(&mut decoder, rolling);
        let of_rolling = rates(&mut decoder, rolling);
        assert_ne!(of_rolling, before);
        assert_eq!(rates(&mut decoder, Strategy::auto(16)), of_rolling, "windows of the same kind");
        assert_eq!(rates(&mut decoder, gated), before);
        decode(&mut decoder, gated);
        assert_ne!(rates(&mut decoder, gated), before);
        assert_eq!(rates(&mut decoder, rolling), of_rolling);
    }
}
