//! Attention, and which keys and values the queries of a forward see.
//!
//! Plain, cached and packed forwards compute the same layers and differ only here: each has its own
//! [`Attention`].

use tch::{Device, Kind, Tensor};

use super::config::ModelConfig;
use super::kv_cache::KvCache;
use super::sliding_window::{PerWindow, is_within};

/// The attention of a forward. Shapes: `b` batch, `s` sequence, `d` width of a head.
pub(crate) trait Attention {
    /// Attention of one layer with its sliding window. `q [b, heads, s, d]`, `k` and
    /// `v [b, kv_heads, s, d]`, with RoPE applied; returns `[b, heads, s, d]`.
    fn attend(&mut self, layer: usize, window: Option<i32>, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor;
}

/// Every token sees itself and the tokens before it; nothing is cached.
pub(crate) struct CausalAttention {
    /// The mask of layers with a sliding window: `[b, 1, s, s]`.
    biases: PerWindow<Option<Tensor>>,
}

impl CausalAttention {
    /// `positions`: int64 `[b, s]`.
    pub(crate) fn new(config: &ModelConfig, positions: &Tensor, kind: Kind) -> Self {
        let (b, s) = positions.size2().expect("positions have two dimensions");
        let bias = |window: Option<i32>| {
            let is_within = is_within(window?, &positions.view([b, 1, s, 1]), &positions.view([b, 1, 1, s]));
            Some(attention_bias(&is_within.tril(0), kind))
        };
        CausalAttention { biases: PerWindow::new(config, bias) }
    }
}

impl Attention for CausalAttention {
    fn attend(&mut self, _layer: usize, window: Option<i32>, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        scaled_dot_product_attention(q, k, v, self.biases.get(window).as_ref())
    }
}

/// `q [b, heads, s, d]`, `k` and `v [b, kv_heads, t, d]`. `bias` is added to the scores; without
/// one, attention is causal.
pub(crate) fn scaled_dot_product_attention(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let group = q.size()[1] / k.size()[1];
    let (k, v) = (repeat_heads(k, group), repeat_heads(v, group));
    Tensor::scaled_dot_product_attention(q, &k, &v, bias, 0.0, bias.is_none(), None, false)
}

/// Each head of keys or values `[b, kv_heads, t, d]`, `group` times in a row. (With a mask, libtorch's
/// own `enable_gqa` leaves only the slow kernel that stores all scores.)
pub(crate) fn repeat_heads(x: &Tensor, group: i64) -> Tensor {
    let (b, kv_heads, t, d) = x.size4().expect("keys and values have four dimensions");
    match group {
        1 => x.shallow_clone(),
        _ => x.unsqueeze(2).expand([b, kv_heads, group, t, d], false).flatten(1, 2),
    }
}

/// The bias of the scores: 0 where `mask` is true, minus infinity where it is false.
pub(crate) fn attention_bias(mask: &Tensor, kind: Kind) -> Tensor {
    Tensor::full(mask.size(), f64::NEG_INFINITY, (kind, mask.device())).masked_fill(mask, 0.0)
}

/// The position and the cache slot of each token of a forward, int64 `[rows, width]`.
#[derive(Debug)]
pub struct SlotMapping {
    /// Position in the sequence, for RoPE.
    pub positions: Tensor,
    /// Slot of the cache that the token's key and value are written to.
    pub slots: Tensor,
    /// `None` if every query sees all slots up to its own.
    pub tree_mask: Option<TreeMask>,
}

/// Which tokens of a tree a token sees: those on its path to the root, not its siblings.
#[derive(Debug)]
pub struct TreeMask {
    /// First slot of each row's tree, int64 `[rows, 1]`. All slots before it are visible.
    pub first_slot: Tensor,
    /// Unsigned 64-bit masks in an int64 `[rows, width]`: bit i is set if the token sees slot
    /// `first_slot + i`.
    pub visible: Tensor,
}

impl SlotMapping {
    /// Tokens whose slots are their positions.
    pub fn sequential(positions: Tensor) -> Self {
        SlotMapping { slots: positions.shallow_clone(), positions, tree_mask: None }
    }

    /// True where a query of a layer with this sliding window sees a slot: `[rows, 1, group * width,
    /// num_attended]`, with the queries repeated `group` times.
    fn mask(&self, window: Option<i32>, group: i64, num_attended: usize) -> Tensor {
        let per_query = |x: &Tensor| x.repeat([1, group]).unsqueeze(1).unsqueeze(-1);
        let all_slots = Tensor::arange(num_attended as i64, (Kind::Int64, self.slots.device()));
        let slots = all_slots.view([1, 1, 1, -1]);
        let up_to_own = slots.le_tensor(&per_query(&self.slots));
        let mask = match &self.tree_mask {
            None => up_to_own,
            Some(TreeMask { first_slot, visible }) => {
                let offset = slots - first_slot.unsqueeze(-1).unsqueeze(-1);
                let bit = per_query(visible).bitwise_right_shift(&offset.clamp(0, 63)).bitwise_and(1);
                up_to_own.logical_and(&bit.ne(0).logical_or(&offset.lt(0)))
            }
        };
        let Some(window) = window else { return mask };
        // The slot of a token is its position, except in a tree.
        let key_positions = all_slots.repeat([self.slots.size()[0], 1]).scatter(1, &self.slots, &self.positions);
        let is_within = is_within(window, &per_query(&self.positions), &key_positions.unsqueeze(1).unsqueeze(1));
        mask.logical_and(&is_within)
    }
}

/// Writes keys and values into a cache, then attends to the cache's leading slots as far as the
/// slot mapping allows.
pub(crate) struct CachedAttention<'c> {
    cache: &'c mut KvCache,
    /// int64 `[rows, width]`.
    slots: &'c Tensor,
    num_attended: usize,
    /// The masks, `[rows, 1, group * width, num_attended]`.
    biases: PerWindow<Tensor>,
    padding: Option<&'c Padding>,
}

impl<'c> CachedAttention<'c> {
    pub(crate) fn new(
        config: &ModelConfig,
        cache: &'c mut KvCache,
        mapping: &'c SlotMapping,
        num_attended: usize,
        padding: Option<&'c Padding>,
    ) -> Self {
        let group = config.num_heads / config.num_kv_heads;
        let bias = |window| attention_bias(&mapping.mask(window, group, num_attended), cache.kind());
        let biases = PerWindow::new(config, bias);
        CachedAttention { cache, slots: &mapping.slots, num_attended, biases, padding }
    }
}

impl Attention for CachedAttention<'_> {
    fn attend(&mut self, layer: usize, window: Option<i32>, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let pad = |x: &Tensor| self.padding.map_or_else(|| x.shallow_clone(), |padding| padding.insert(x));
        let (q, k, v) = (pad(q), pad(k), pad(v));
        let (keys, values) = self.cache.update(layer, &k, &v, self.slots, self.num_attended);
        // The query heads of a key head become further queries of it: no copy of the cache is
        // needed.
        let (rows, heads, width, head_dim) = q.size4().expect("queries have four dimensions");
        let grouped = q.reshape([rows, k.size()[1], -1, head_dim]);
        let out = scaled_dot_product_attention(&grouped, &keys, &values, Some(self.biases.get(window)));
        let out = out.reshape([rows, heads, width, head_dim]);
        self.padding.map_or_else(|| out.shallow_clone(), |padding| padding.remove(&out))
    }
}

/// Rows of different lengths. Outside of attention their tokens are packed into one row,
/// `[1, tokens]`, so that nothing is computed for padding; attention needs them padded to one
/// width, `[rows, width]`.
pub(crate) struct Padding {
    num_rows: i64,
    /// Index in the padded rows of each packed token, int64 `[tokens]`.
    padded_index: Tensor,
    /// Index among the packed tokens of each padded one, the row's last token for padding, int64
    /// `[rows * width]`.
    packed_index: Tensor,
}

impl Padding {
    /// `None` if every row is full.
    pub(crate) fn new(lengths: &[usize], width: usize, device: Device) -> Option<Self> {
        if lengths.iter().all(|&length| length == width) {
            return None;
        }
        let (mut padded_index, mut packed_index) = (Vec::new(), Vec::new());
        for (row, &length) in lengths.iter().enumerate() {
            let first = padded_index.len();
            packed_index.extend((0..width).map(|offset| (first + offset.min(length - 1)) as i64));
            padded_index.extend((0..length).map(|offset| (row * width + offset) as i64));
        }
        let to_device = |indices: &[i64]| Tensor::from_slice(indices).to_device(device);
        Some(Padding {
            num_rows: lengths.len() as i64,
            padded_index: to_device(&padded_index),
            packed_index: to_device(&packed_index),
        })
    }

    /// Packs token ids or positions: `[rows, width]` to `[1, tokens]`.
    pub(crate) fn pack(&self, x: &Tensor) -> Tensor {
        x.reshape([-1]).index_select(0, &self.padded_index).unsqueeze(0)
    }

    /// `[1, heads, tokens, d]` to `[rows, heads, width, d]`.
    fn insert(&self, x: &Tensor) -> Tensor {
        let padded = x.squeeze_dim(0).transpose(0, 1).index_select(0, &self.packed_index);
        padded.unflatten(0, [self.num_rows, -1]).transpose(1, 2)
    }

    /// `[rows, heads, width, d]` to `[1, heads, tokens, d]`.
    fn remove(&self, x: &Tensor) -> Tensor {
        let packed = x.transpose(1, 2).flatten(0, 1).index_select(0, &self.padded_index);
        packed.unsqueeze(0).transpose(1, 2)
    }
}
