//! The losses of a batch, and their gradients: the vocabulary is met in chunks, so that the logits of a whole batch never
//! exist at once.

use cllm_core::cuda::train::{Logits, TrainKernels};
use cllm_core::model::Transformer;
use cllm_core::train::{self, DeviceBatch, PackedBatch};
use cllm_core::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::data::packing::{Batch, Chunk, NO_LABEL};
use crate::settings::{ConsistencySettings, Divergence};

/// Sums over tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Cross-entropy of the labels.
    Ar,
    /// Divergence of the noisy tokens from the fixed point.
    Global,
    /// Divergence of the noisy tokens from the next state.
    Local,
    /// KL of the response tokens from the frozen teacher.
    Anchor,
}

/// How the gradients of a batch come about.
#[derive(Debug, Clone, Copy)]
pub struct Backward {
    /// What each loss is multiplied by, in the order of [`Loss`].
    pub scale: [f64; 4],
    /// Leading layers that are computed again rather than kept.
    pub recomputed: usize,
}

/// The sums of a batch, float32 scalars on the device in the order of [`Loss`], from one forward over the stream, and one of
/// the frozen teacher over its clean part where there is one. With `backward`, the gradients are added to the weights'.
///
/// # Errors
/// [`cllm_core::Error::Torch`], such as memory that ran out.
pub fn losses(
    model: &Transformer,
    teacher: Option<&Transformer>,
    batch: &Batch,
    settings: &ConsistencySettings,
    backward: Option<Backward>,
) -> Result<[Tensor; 4]> {
    let _no_grad = backward.is_none().then(tch::no_grad_guard);
    let stream = DeviceBatch::new(&batch.stream, model)?;
    let pass = backward.map(|backward| train::forward(model, &stream, backward.recomputed)).transpose()?;
    let hidden = match &pass {
        Some(pass) => pass.hidden.detach(),
        None => train::hidden_states(model, &stream)?,
    };
    let frozen = teacher.map(|teacher| Ok::<_, Error>((teacher, clean_hidden(teacher, &batch.clean)?))).transpose()?;
    let vocabulary =
        Vocabulary { model, kernels: stream.kernels(), settings, scale: backward.map(|backward| backward.scale) };
    let mut gathered = Gathered::new(&hidden, backward.is_some());
    for chunk in &batch.chunks {
        let noisy = if settings.global_weight > 0.0 { chunk.noisy.as_slice() } else { &[] };
        let rows = gathered.rows(&[chunk.places.as_slice(), noisy].concat());
        let frozen = frozen.as_ref().map(|(teacher, hidden)| logits_of(teacher, hidden, &chunk.clean_places));
        gathered.add(vocabulary.chunk(&rows.1, frozen, chunk)?, &rows.0);
    }
    if settings.local_weight > 0.0 {
        for chunk in &batch.local {
            let rows = gathered.rows(&chunk.places);
            gathered.add(vocabulary.local(&rows.1, logits_of(model, &hidden, &chunk.next))?, &rows.0);
        }
    }
    let Gathered { gradient, sums, .. } = gathered;
    if let (Some(gradient), Some(pass)) = (gradient, pass) {
        pass.backward(&gradient)?;
    }
    Ok(sums)
}

/// Sums so far, and the gradient of the hidden states.
struct Gathered<'h> {
    hidden: &'h Tensor,
    gradient: Option<Tensor>,
    sums: [Tensor; 4],
}

/// Sums over some rows, and the gradient of their hidden states where one is asked for.
type Sums = (Vec<(Loss, Tensor)>, Option<Tensor>);

impl<'h> Gathered<'h> {
    fn new(hidden: &'h Tensor, backward: bool) -> Self {
        let sums = [0; 4].map(|_| Tensor::zeros([], (Kind::Float, hidden.device())));
        Gathered { hidden, gradient: backward.then(|| hidden.zeros_like()), sums }
    }

    /// Some places on the device, and their hidden states.
    fn rows(&self, places: &[i64]) -> (Tensor, Tensor) {
        let places = to_device(places, self.hidden.device());
        let rows = self.hidden.index_select(0, &places);
        (places, rows)
    }

    /// Adds what some rows gave. No place comes twice in one call, but where a prompt is empty.
    fn add(&mut self, (sums, d_rows): Sums, places: &Tensor) {
        for (loss, sum) in sums {
            self.sums[loss as usize] += sum.detach();
        }
        if let (Some(d_rows), Some(gradient)) = (d_rows, &mut self.gradient) {
            let _ = gradient.index_add_(0, places, &d_rows);
        }
    }
}

/// Where hidden states meet the vocabulary.
struct Vocabulary<'v> {
    model: &'v Transformer,
    kernels: Option<&'v TrainKernels>,
    settings: &'v ConsistencySettings,
    /// What each loss is multiplied by in the gradient, where there is one.
    scale: Option<[f64; 4]>,
}

impl Vocabulary<'_> {
    /// The sums of a chunk from the student's hidden states, clean places first, and the logits of the frozen teacher.
    fn chunk(&self, rows: &Tensor, frozen: Option<Tensor>, chunk: &Chunk) -> Result<Sums> {
        let labels = to_device(&chunk.labels, rows.device());
        let targets = to_device(&chunk.targets, rows.device());
        let clean_rows = chunk.labels.len() as i64;
        let noisy_rows = rows.size()[0] - clean_rows;
        let Some(kernels) = self.kernels else {
            return Ok(self.autograd(rows, |logits| {
                let student = logits.log_softmax(-1, Kind::Float);
                let clean = student.narrow(0, 0, clean_rows);
                let taught = labels.ne(NO_LABEL).unsqueeze(-1);
                let of_labels = clean.gather(1, &labels.clamp_min(0).unsqueeze(-1), false);
                let mut sums = vec![(Loss::Ar, -(of_labels * taught).sum(Kind::Float))];
                if noisy_rows > 0 {
                    let noisy = student.narrow(0, clean_rows, noisy_rows);
                    let target = clean.detach().index_select(0, &targets);
                    sums.push((Loss::Global, divergence(&target, &noisy, self.settings.divergence)));
                }
                let frozen = frozen.map(|logits| logits.log_softmax(-1, Kind::Float));
                sums.extend(frozen.map(|target| (Loss::Anchor, divergence(&target, &clean, Divergence::Forward))));
                sums
            }));
        };
        let _no_grad = tch::no_grad_guard();
        let logits = kernels.logits(self.model.project(rows))?;
        let mut sums = Vec::new();
        // First, since the targets are clean rows, which become gradients afterwards.
        if noisy_rows > 0 {
            let noisy = (clean_rows, noisy_rows);
            let kind = self.settings.divergence;
            let of_rows =
                kernels.divergence(&logits, noisy, &logits, &targets, code(kind), self.scaled(Loss::Global))?;
            sums.push((Loss::Global, of_rows.sum(Kind::Float)));
        }
        let frozen = frozen.map(|values| kernels.logits(values)).transpose()?;
        let teacher = frozen.as_ref().map(|frozen| (frozen, self.scaled(Loss::Anchor)));
        let (ar, anchor) = kernels.cross_entropy(&logits, &labels, self.scaled(Loss::Ar), teacher)?;
        sums.push((Loss::Ar, ar.sum(Kind::Float)));
        sums.extend(anchor.map(|of_rows| (Loss::Anchor, of_rows.sum(Kind::Float))));
        Ok((sums, self.d_rows(rows, &logits)?))
    }

    /// The sum of a local chunk from the hidden states, and the logits of the next state.
    fn local(&self, rows: &Tensor, next: Tensor) -> Result<Sums> {
        let Some(kernels) = self.kernels else {
            return Ok(self.autograd(rows, |logits| {
                let (student, target) = (logits.log_softmax(-1, Kind::Float), next.log_softmax(-1, Kind::Float));
                vec![(Loss::Local, divergence(&target, &student, self.settings.divergence))]
            }));
        };
        let _no_grad = tch::no_grad_guard();
        let (logits, next) = (kernels.logits(self.model.project(rows))?, kernels.logits(next)?);
        let count = rows.size()[0];
        let targets = Tensor::arange(count, (Kind::Int64, rows.device()));
        let kind = self.settings.divergence;
        let of_rows = kernels.divergence(&logits, (0, count), &next, &targets, code(kind), self.scaled(Loss::Local))?;
        Ok((vec![(Loss::Local, of_rows.sum(Kind::Float))], self.d_rows(rows, &logits)?))
    }

    /// Sums of logits, and by autograd what follows from them.
    fn autograd(&self, rows: &Tensor, sums: impl FnOnce(Tensor) -> Vec<(Loss, Tensor)>) -> Sums {
        let rows = rows.detach().set_requires_grad(self.scale.is_some());
        let sums = sums(self.model.logits_with_grad(&rows));
        let Some(scale) = self.scale else { return (sums, None) };
        sums.iter().map(|(loss, sum)| sum * scale[*loss as usize]).sum::<Tensor>().backward();
        (sums, Some(rows.grad()))
    }

    fn scaled(&self, loss: Loss) -> f64 {
        self.scale.map_or(0.0, |scale| scale[loss as usize])
    }

    /// What follows from logits that have become their gradient.
    fn d_rows(&self, rows: &Tensor, logits: &Logits) -> Result<Option<Tensor>> {
        self.scale.map(|_| train::project_backward(self.model, rows, &logits.values)).transpose()
    }
}

fn clean_hidden(teacher: &Transformer, clean: &PackedBatch) -> Result<Tensor> {
    train::hidden_states(teacher, &DeviceBatch::new(clean, teacher)?)
}

/// Logits `[places, vocab]` after some hidden states, without gradients.
fn logits_of(model: &Transformer, hidden: &Tensor, places: &[i64]) -> Tensor {
    tch::no_grad(|| model.project(&hidden.index_select(0, &to_device(places, hidden.device()))))
}

fn to_device(numbers: &[i64], device: Device) -> Tensor {
    Tensor::from_slice(numbers).to_device(device)
}

/// What the kernels call a divergence.
fn code(kind: Divergence) -> i32 {
    match kind {
        Divergence::Forward => 0,
        Divergence::Reverse => 1,
        Divergence::Jsd => 2,
    }
}

/// Sum over rows of the divergence between two log-distributions `[rows, vocab]`.
pub fn divergence(target: &Tensor, student: &Tensor, kind: Divergence) -> Tensor {
    let kl = |p: &Tensor, q: &Tensor| (p.exp() * (p - q)).sum(Kind::Float);
    match kind {
        Divergence::Forward => kl(target, student),
        Divergence::Reverse => kl(student, target),
        Divergence::Jsd => {
            let middle = target.logaddexp(student) - std::f64::consts::LN_2;
            (kl(target, &middle) + kl(student, &middle)) * 0.5
        }
    }
}
