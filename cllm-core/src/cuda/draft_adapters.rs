//! Low-rank adapters of draft tokens, as the kernels of a decoding step multiply with them.

use tch::{Kind, Tensor};

use super::forward_input::ForwardInput;
use super::nvrtc::Macros;
use crate::Result;

/// Ranks are padded with zeros to a multiple of this: the values of a row that a fused kernel
/// multiplies at a time.
pub const RANK_MULTIPLE: usize = 32;

/// The adapters of all projections that a product computes, as one: y += B (A x).
#[derive(Debug)]
pub struct DraftAdapters {
    /// A of each adapter, times its scale, one after the other: `[rank, in]`.
    pub lora_a: Tensor,
    /// B of each, in the rows of its projection and the columns of its A, else 0: `[out, rank]`.
    pub lora_b: Tensor,
}

/// The adapters of a layer.
#[derive(Debug)]
pub struct LayerAdapters {
    pub qkv: Option<DraftAdapters>,
    pub output: Option<DraftAdapters>,
    pub gate_up: Option<DraftAdapters>,
    pub down: Option<DraftAdapters>,
}

/// The rank of all adapters of a product together, for each product of a layer; 0 without adapters.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct AdapterRanks {
    pub qkv: usize,
    pub output: usize,
    pub gate_up: usize,
    pub down: usize,
}

impl DraftAdapters {
    fn rank(&self) -> usize {
        self.lora_a.size()[0] as usize
    }

    /// A x of `x [T, in]`, with zeros for tokens that are not drafts: `[T, rank]`. `is_draft`: 1 or
    /// 0 for each token, bfloat16 `[T, 1]`.
    ///
    /// # Errors
    /// [`crate::Error::Torch`]; here and below.
    pub(crate) fn low_rank(&self, x: &Tensor, is_draft: &Tensor) -> Result<Tensor> {
        Ok(x.f_linear::<&Tensor>(&self.lora_a, None)?.f_mul(is_draft)?)
    }

    /// Adds what the adapters change to the product `[T, out]` of `x [T, in]`. Rows of tokens that
    /// are not drafts keep their bits.
    pub(crate) fn add_to(&self, product: &Tensor, x: &Tensor, is_draft: &Tensor) -> Result<()> {
        let low_rank = self.low_rank(x, is_draft)?;
        let _ = product.shallow_clone().f_addmm_(&low_rank, &self.lora_b.f_tr()?)?;
        Ok(())
    }
}

impl LayerAdapters {
    pub(crate) fn ranks(&self) -> AdapterRanks {
        let rank = |adapters: &Option<DraftAdapters>| adapters.as_ref().map_or(0, DraftAdapters::rank);
        AdapterRanks {
            qkv: rank(&self.qkv),
            output: rank(&self.output),
            gate_up: rank(&self.gate_up),
            down: rank(&self.down),
        }
    }
}

impl AdapterRanks {
    pub(super) fn all(self) -> [usize; 4] {
        [self.qkv, self.output, self.gate_up, self.down]
    }

    /// Whether there are adapters.
    pub(super) fn is_adapted(self) -> bool {
        self != AdapterRanks::default()
    }

    pub(super) fn macros(self) -> Macros {
        let names = ["QKV_RANK", "OUTPUT_RANK", "GATE_UP_RANK", "DOWN_RANK"];
        let ranks = names.into_iter().zip(self.all().map(|rank| rank.to_string()));
        ranks.chain([("ADAPTED", u8::from(self.is_adapted()).to_string())]).collect()
    }
}

/// 1 for every draft token and 0 for others, bfloat16 `[T, 1]`.
pub(crate) fn is_draft(input: &ForwardInput) -> Result<Tensor> {
    Ok(input.adapted.f_to_kind(Kind::BFloat16)?.f_unsqueeze(1)?)
}

#[cfg(test)]
impl AdapterRanks {
    /// Of adapters of rank 32 on some projections.
    pub(super) const SOME: AdapterRanks = AdapterRanks { qkv: 64, output: 0, gate_up: 64, down: 32 };
}
