//! Preallocated keys and values. The slot of a known token is its position, so that a rollback is only bookkeeping.

use tch::{Device, IndexOp, Kind, Tensor};

use super::{ALIGNED, ModelConfig};

/// A slot of a row to copy to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlotMove {
    pub(crate) row: usize,
    pub(crate) from: usize,
    pub(crate) to: usize,
}

impl SlotMove {
    /// Rows, slots to read and slots to write of some moves: int64 `[moves]` each.
    pub(crate) fn indices(moves: &[SlotMove], device: Device) -> [Tensor; 3] {
        let parts: [fn(&SlotMove) -> usize; 3] = [|one| one.row, |one| one.from, |one| one.to];
        parts.map(|part| {
            let numbers: Vec<i64> = moves.iter().map(|one| part(one) as i64).collect();
            Tensor::from_slice(&numbers).to_device(device)
        })
    }
}

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

    /// Some neighbouring rows, sharing their memory.
    pub fn rows(&self, first: usize, count: usize) -> Self {
        let part = |whole: &Tensor| whole.narrow(0, first as i64, count as i64);
        let layers = self.layers.iter().map(|(keys, values)| (part(keys), part(values))).collect();
        KvCache { layers, capacity: self.capacity }
    }

    /// Copies one row over another.
    pub fn copy_row(&mut self, from: usize, to: usize) {
        for tensor in self.layers.iter_mut().flat_map(|(keys, values)| [keys, values]) {
            tensor.get(to as i64).copy_(&tensor.get(from as i64));
        }
    }

    /// Copies keys and values between slots; all are read before any is written.
    pub(crate) fn move_slots(&mut self, moves: &[SlotMove]) {
        let Some((first, _)) = self.layers.first() else { return };
        let [rows, from, to] = SlotMove::indices(moves, first.device());
        for tensor in self.layers.iter_mut().flat_map(|(keys, values)| [keys, values]) {
            let read = tensor.index(&[Some(&rows), None, Some(&from)]);
            let _ = tensor.index_put_(&[Some(&rows), None, Some(&to)], &read, false);
        }
    }

    /// Slots of each row.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Writes `[rows, kv_heads, width, head_dim]` at slots `[rows, width]` of a layer and returns its leading
    /// `attended` slots of keys and values.
    pub(crate) fn update(
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
