//! Gradients of which each process keeps only its shard (ZeRO stage 2; Rajbhandari et al., arXiv
//! 1910.02054).
//!
//! The gradients of a layer exist from its backward until the processes that own its elements have
//! the sums over all processes, which happens while the backward goes on. Shards are those of the
//! optimizer: equal ranges of one buffer with all weights.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use tch::Tensor;

use super::gradients::{GradientSink, ModelPart};
use crate::Result;
use crate::cuda::libtorch;
use crate::distributed::{PendingReduce, ProcessGroup};
use crate::model::Transformer;

/// Parts whose gradients are summed while the backward goes on. Each holds its gradients in memory.
const MAX_PARTS_IN_FLIGHT: usize = 1;

/// The sums of gradients over all processes and over the batches of a step: this process's shard.
pub struct ShardedGradients {
    group: Rc<ProcessGroup>,
    parts: Vec<Part>,
    /// Gradients of all vectors over the batches of a step, which take little memory, with zeros of
    /// padding at the end.
    vectors: Tensor,
    /// Index of their first element among all weights.
    vectors_start: i64,
    /// `[elements]`, of the type of the weights.
    shard: Tensor,
    /// The parts that the backward is at, with their gradients.
    begun: RefCell<Vec<(ModelPart, Tensor)>>,
    /// The oldest first.
    in_flight: RefCell<VecDeque<Reduction>>,
}

/// The matrices of a part, which are neighbors among all weights.
struct Part {
    part: ModelPart,
    /// Their elements among all weights.
    elements: Range<i64>,
    /// The weights, each with the index of its first element in the part.
    weights: Vec<(Tensor, i64)>,
}

/// Gradients that are being summed.
struct Reduction {
    /// `[elements]`. Where this process owns an element, it becomes the sum.
    gradients: Tensor,
    start: i64,
    reduces: Vec<PendingReduce>,
}

impl ShardedGradients {
    /// Gradients of every weight of a model, which has no adapters and collects them from now on.
    ///
    /// # Errors
    /// [`crate::Error::Torch`], for instance when memory runs out.
    pub fn new(model: &Transformer, group: Rc<ProcessGroup>) -> Result<Self> {
        let weights = model.weights();
        let (vectors_start, num_elements) = (weights.num_matrix_elements(), weights.buffer().numel() as i64);
        let zeros = |size: i64| Tensor::f_zeros([size], (model.kind(), model.device()));
        let vectors = zeros(num_elements - vectors_start)?;
        let mut parts: Vec<Part> = Vec::new();
        for (weight, name, start) in model.leaves() {
            let _ = weight.set_requires_grad(true);
            let end = start + weight.numel() as i64;
            if start >= vectors_start {
                set_gradient(&weight, &vectors, start - vectors_start)?;
                continue;
            }
            let part = part_of(name);
            match parts.iter_mut().find(|other| other.part == part) {
                Some(part) => {
                    part.weights.push((weight, start - part.elements.start));
                    part.elements.end = end;
                }
                None => parts.push(Part { part, elements: start..end, weights: vec![(weight, 0)] }),
            }
        }
        Ok(ShardedGradients {
            shard: zeros(num_elements / group.world_size() as i64)?,
            group,
            parts,
            vectors,
            vectors_start,
            begun: RefCell::default(),
            in_flight: RefCell::default(),
        })
    }

    /// Takes part in the sums of a batch that other processes train on, without one of its own.
    ///
    /// # Errors
    /// As those of [`GradientSink`].
    pub fn add_nothing(&self) -> Result<()> {
        let num_layers = self.parts.iter().filter(|part| matches!(part.part, ModelPart::Layer(_))).count();
        let layers = (0..num_layers).rev().map(ModelPart::Layer);
        for part in [ModelPart::LmHead].into_iter().chain(layers).chain([ModelPart::Embedding]) {
            self.begin(part)?;
            self.complete(part)?;
        }
        Ok(())
    }

    /// This process's shard of the sums over all processes and over the batches since
    /// [`Self::clear`], `[elements]`.
    ///
    /// # Errors
    /// [`crate::Error::Peer`] if another process has ended.
    pub fn sums(&self) -> Result<&Tensor> {
        let _no_grad = tch::no_grad_guard();
        self.start(self.vectors.shallow_clone(), self.vectors_start)?;
        self.finish_all_but(0)?;
        Ok(&self.shard)
    }

    /// Forgets the sums.
    pub fn clear(&self) {
        let _no_grad = tch::no_grad_guard();
        for gradients in [&self.vectors, &self.shard] {
            let _ = gradients.shallow_clone().zero_();
        }
    }

    fn find(&self, part: ModelPart) -> Option<&Part> {
        self.parts.iter().find(|other| other.part == part)
    }

    /// Starts to sum gradients `[elements]`, the first of which is element `start` among all
    /// weights: every element at the process that owns it.
    fn start(&self, gradients: Tensor, start: i64) -> Result<()> {
        let elements = start..start + gradients.numel() as i64;
        let mut reduces = Vec::new();
        for (owner, owned) in owners(&elements, self.shard.numel() as i64) {
            let owned = gradients.narrow(0, owned.start - start, owned.end - owned.start);
            reduces.push(self.group.start_reduce(&owned, owner)?);
        }
        self.in_flight.borrow_mut().push_back(Reduction { gradients, start, reduces });
        Ok(())
    }

    /// Adds the oldest sums to the shard, until only this many are not done.
    fn finish_all_but(&self, num_in_flight: usize) -> Result<()> {
        while self.in_flight.borrow().len() > num_in_flight {
            let Some(Reduction { gradients, start, reduces }) = self.in_flight.borrow_mut().pop_front() else { break };
            for reduce in reduces {
                self.group.finish_reduce(reduce)?;
            }
            let shard_len = self.shard.numel() as i64;
            let elements = start..start + gradients.numel() as i64;
            if let Some((_, owned)) = owners(&elements, shard_len).find(|(owner, _)| *owner == self.group.rank()) {
                let length = owned.end - owned.start;
                let sums = gradients.narrow(0, owned.start - start, length);
                let shard_start = self.group.rank() as i64 * shard_len;
                let _ = self.shard.narrow(0, owned.start - shard_start, length).f_add_(&sums)?;
            }
        }
        Ok(())
    }
}

impl GradientSink for ShardedGradients {
    fn begin(&self, part: ModelPart) -> Result<()> {
        // Where the embedding is the output projection, it begins with that.
        let Some(found) = self.find(part).or_else(|| self.find(ModelPart::Embedding)) else { return Ok(()) };
        if self.begun.borrow().iter().any(|(begun, _)| *begun == found.part) {
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        let size = [found.elements.end - found.elements.start];
        let gradients = Tensor::f_zeros(size, (self.shard.kind(), self.shard.device()))?;
        for (weight, start) in &found.weights {
            set_gradient(weight, &gradients, *start)?;
        }
        self.begun.borrow_mut().push((found.part, gradients));
        Ok(())
    }

    fn complete(&self, part: ModelPart) -> Result<()> {
        let Some(found) = self.find(part) else { return Ok(()) };
        let _no_grad = tch::no_grad_guard();
        for (weight, _) in &found.weights {
            libtorch::drop_gradient(weight)?;
        }
        let index = self.begun.borrow().iter().position(|(begun, _)| *begun == part);
        let Some(index) = index else { return Ok(()) };
        let (_, gradients) = self.begun.borrow_mut().swap_remove(index);
        self.start(gradients, found.elements.start)?;
        self.finish_all_but(MAX_PARTS_IN_FLIGHT)
    }
}

/// Makes every backward add the gradient of a weight to that part of `gradients` which begins at
/// element `start`.
fn set_gradient(weight: &Tensor, gradients: &Tensor, start: i64) -> Result<()> {
    let gradient = gradients.narrow(0, start, weight.numel() as i64).view(weight.size().as_slice());
    libtorch::accumulate_grad_into(weight, &gradient)
}

/// The part of a matrix, by its Hugging Face name.
fn part_of(name: &str) -> ModelPart {
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
    match layer {
        Some(layer) => ModelPart::Layer(layer),
        None if name.starts_with("lm_head.") => ModelPart::LmHead,
        None => ModelPart::Embedding,
    }
}

/// The processes that own some of these elements, each with those that it owns. A shard has
/// `shard_len` elements.
fn owners(elements: &Range<i64>, shard_len: i64) -> impl Iterator<Item = (usize, Range<i64>)> + use<> {
    let Range { start, end } = *elements;
    (start / shard_len..=(end - 1).max(start) / shard_len).map(move |rank| {
        let owned = start.max(rank * shard_len)..end.min((rank + 1) * shard_len);
        (rank as usize, owned)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_belong_to_the_processes_whose_shards_they_are_in() {
        let found = |elements: Range<i64>| owners(&elements, 10).collect::<Vec<_>>();
        assert_eq!(found(3..7), [(0, 3..7)]);
        assert_eq!(found(10..20), [(1, 10..20)]);
        assert_eq!(found(8..31), [(0, 8..10), (1, 10..20), (2, 20..30), (3, 30..31)]);
    }

    #[test]
    fn weights_belong_to_layers_by_their_names() {
        let names = ["model.layers.11.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"];
        assert_eq!(names.map(part_of), [ModelPart::Layer(11), ModelPart::Embedding, ModelPart::LmHead]);
    }
}
