//! The losses of a batch, and their gradients: the vocabulary is met in chunks, so that the logits of a whole batch never
//! exist at once.

use cllm_core::Result;
use cllm_core::model::{DeviceStream, Stream, Transformer};
use tch::{Device, Kind, Tensor};

use crate::packing::{Batch, Chunk};
use crate::settings::{Consistency, Divergence};

/// Sums over tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Cross-entropy of the response tokens.
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
    settings: &Consistency,
    backward: Option<Backward>,
) -> Result<[Tensor; 4]> {
    let _no_grad = backward.is_none().then(tch::no_grad_guard);
    let stream = DeviceStream::new(&batch.stream, model);
    let pass = model.pass(&stream, backward.map_or(0, |backward| backward.recomputed));
    let hidden = pass.hidden.detach();
    let frozen = teacher.map(|teacher| (teacher, clean_hidden(teacher, &batch.clean)));
    let mut gathered = Gathered::new(&hidden, backward);
    for chunk in &batch.chunks {
        let places = [chunk.places.as_slice(), if settings.weight > 0.0 { &chunk.noisy } else { &[] }].concat();
        gathered.add(&hidden, &places, |rows| {
            let target = frozen.as_ref().map(|(teacher, hidden)| distributions(teacher, hidden, &chunk.clean_places));
            chunk_sums(model, rows, target.as_ref(), chunk, settings)
        });
    }
    if settings.local_weight > 0.0 {
        for chunk in &batch.local {
            gathered.add(&hidden, &chunk.places, |rows| {
                let target = tch::no_grad(|| distributions(model, &hidden, &chunk.next));
                let student = model.train_logits(rows).log_softmax(-1, Kind::Float);
                vec![(Loss::Local, divergence(&target, &student, settings.divergence))]
            });
        }
    }
    if let Some(gradient) = gathered.gradient {
        pass.backward(&gradient)?;
    }
    Ok(gathered.sums)
}

/// Sums so far, and the gradient of the hidden states.
struct Gathered {
    backward: Option<Backward>,
    gradient: Option<Tensor>,
    sums: [Tensor; 4],
}

impl Gathered {
    fn new(hidden: &Tensor, backward: Option<Backward>) -> Self {
        let sums = [0; 4].map(|_| Tensor::zeros([], (Kind::Float, hidden.device())));
        Gathered { backward, gradient: backward.map(|_| hidden.zeros_like()), sums }
    }

    /// Adds the sums over some hidden states, and what follows from them for the gradient. No place comes twice in one call.
    fn add(&mut self, hidden: &Tensor, places: &[i64], sums: impl FnOnce(&Tensor) -> Vec<(Loss, Tensor)>) {
        let places = to_device(places, hidden.device());
        let rows = hidden.index_select(0, &places).set_requires_grad(self.backward.is_some());
        let sums = sums(&rows);
        for (loss, sum) in &sums {
            self.sums[*loss as usize] += sum.detach();
        }
        if let (Some(backward), Some(gradient)) = (self.backward, &mut self.gradient) {
            let scaled = sums.iter().map(|(loss, sum)| sum * backward.scale[*loss as usize]);
            scaled.sum::<Tensor>().backward();
            let _ = gradient.index_add_(0, &places, &rows.grad());
        }
    }
}

/// The sums of a chunk from the student's hidden states: clean places first, then noisy ones.
fn chunk_sums(
    model: &Transformer,
    rows: &Tensor,
    frozen: Option<&Tensor>,
    chunk: &Chunk,
    settings: &Consistency,
) -> Vec<(Loss, Tensor)> {
    let student = model.train_logits(rows).log_softmax(-1, Kind::Float);
    let clean_rows = chunk.labels.len() as i64;
    let clean = student.narrow(0, 0, clean_rows);
    let labels = to_device(&chunk.labels, rows.device()).unsqueeze(-1);
    let mut sums = vec![(Loss::Ar, -clean.gather(1, &labels, false).sum(Kind::Float))];
    let noisy_rows = student.size()[0] - clean_rows;
    if noisy_rows > 0 {
        let target = clean.detach().index_select(0, &to_device(&chunk.targets, rows.device()));
        let noisy = student.narrow(0, clean_rows, noisy_rows);
        sums.push((Loss::Global, divergence(&target, &noisy, settings.divergence)));
    }
    sums.extend(frozen.map(|target| (Loss::Anchor, divergence(target, &clean, Divergence::Forward))));
    sums
}

fn clean_hidden(teacher: &Transformer, clean: &Stream) -> Tensor {
    tch::no_grad(|| teacher.pass(&DeviceStream::new(clean, teacher), 0).hidden)
}

/// Log-probabilities `[places, vocab]` after some hidden states, without gradients.
fn distributions(model: &Transformer, hidden: &Tensor, places: &[i64]) -> Tensor {
    let rows = hidden.index_select(0, &to_device(places, hidden.device()));
    tch::no_grad(|| model.train_logits(&rows).log_softmax(-1, Kind::Float))
}

fn to_device(numbers: &[i64], device: Device) -> Tensor {
    Tensor::from_slice(numbers).to_device(device)
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
