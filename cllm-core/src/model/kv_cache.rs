//! Preallocated keys and values. Slot = position, so that a rollback is only bookkeeping.

use tch::{Device, IndexOp, Kind, Tensor};

use super::{ALIGNED, ModelConfig};

/// Keys and values of `rows` sequences.
pub struct KvCache {
    /// Per layer: keys and values, each `[rows, kv_heads, capacity, head_dim]`.
    layers: Vec<(Tensor, Tensor)>,
    capacity: usize,
}

impl KvCache {
    /// An empty cache of at least `capacity` slots a row.
    pub fn new(config: &ModelConfig, rows: usize, capacity: usize, device: Device, kind: Kind) -> Self {
        let capacity = capacity.next_multiple_of(ALIGNED);
        let shape = [rows as i64, config.num_kv_heads, capacity as i64, config.head_dim];
        let empty = || Tensor::zeros(shape, (kind, device));
        KvCache { layers: (0..config.num_layers).map(|_| (empty(), empty())).collect(), capacity }
    }

    /// Keeps only these rows, in this order.
    pub fn select(&mut self, rows: &[i64]) {
        for (keys, values) in &mut self.layers {
            let index = Tensor::from_slice(rows).to_device(keys.device());
            *keys = keys.index_select(0, &index);
            *values = values.index_select(0, &index);
        }
    }

    /// Slots of each row.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Writes `[rows, kv_heads, width, head_dim]` at slots `[rows, width]` of a layer and returns its leading
    /// `attended` slots of keys and values.
    pub(super) fn update(
        &mut self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        slots: &Tensor,
        attended: usize,
    ) -> (Tensor, Tensor) {
        let (all_keys, all_values) = &mut self.layers[layer];
        let index = slots.unsqueeze(1).unsqueeze(-1).expand_as(keys);
        let _ = all_keys.scatter_(2, &index, keys);
        let _ = all_values.scatter_(2, &index, values);
        let attended = attended as i64;
        (all_keys.i((.., .., ..attended)), all_values.i((.., .., ..attended)))
    }
}
