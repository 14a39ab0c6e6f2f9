//! Keys and values of the tokens read so far, in preallocated slots.
//!
//! A token's slot is its position in the sequence, so rejecting draft tokens needs no work here:
//! the next forward overwrites their slots before any query sees them.

use tch::{Device, IndexOp, Kind, Tensor};

use super::config::ModelConfig;
use crate::Result;

/// Capacities and the number of attended slots are multiples of this. Otherwise the GPU's attention
/// kernel copies the bias in every layer.
pub(super) const SLOT_ALIGNMENT: usize = 8;

/// Copies the key and value of one slot to another slot of the same row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlotMove {
    pub(crate) row: usize,
    pub(crate) from: usize,
    pub(crate) to: usize,
}

impl SlotMove {
    /// The rows, sources and destinations of some moves, int64 `[moves]` each.
    pub(crate) fn to_indices(moves: &[SlotMove], device: Device) -> [Tensor; 3] {
        let fields: [fn(&SlotMove) -> usize; 3] = [|slot| slot.row, |slot| slot.from, |slot| slot.to];
        fields.map(|field| {
            let indices: Vec<i64> = moves.iter().map(|slot| field(slot) as i64).collect();
            Tensor::from_slice(&indices).to_device(device)
        })
    }
}

/// Copies neighboring slots of a row to another row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlotCopy {
    /// Row and first slot.
    pub(crate) from: (usize, usize),
    pub(crate) to: (usize, usize),
    pub(crate) num_slots: usize,
}

impl SlotCopy {
    /// Copies in a tensor `[rows, ...]` whose slots are in dimension `slot_dimension` of a row.
    pub(crate) fn apply(&self, tensor: &Tensor, slot_dimension: i64) {
        let slots = |(row, slot): (usize, usize)| {
            tensor.get(row as i64).narrow(slot_dimension, slot as i64, self.num_slots as i64)
        };
        slots(self.to).copy_(&slots(self.from));
    }
}

pub struct KvCache {
    /// Keys and values of each layer, `[rows, kv_heads, capacity, head_dim]` each.
    layers: Vec<(Tensor, Tensor)>,
    capacity: usize,
    kind: Kind,
}

impl KvCache {
    /// An empty cache of at least `capacity` slots for each of `num_rows` sequences.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] when memory runs out.
    pub fn new(config: &ModelConfig, num_rows: usize, capacity: usize, device: Device, kind: Kind) -> Result<Self> {
        let capacity = capacity.next_multiple_of(SLOT_ALIGNMENT);
        let shape = [num_rows as i64, config.num_kv_heads, capacity as i64, config.head_dim];
        let zeros = || Tensor::f_zeros(shape, (kind, device));
        let layers = (0..config.num_layers).map(|_| Ok((zeros()?, zeros()?))).collect::<Result<_>>()?;
        Ok(KvCache { layers, capacity, kind })
    }

    /// Slots of each row.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Consecutive rows, in the same memory.
    pub fn rows(&self, first_row: usize, num_rows: usize) -> Self {
        let narrow = |tensor: &Tensor| tensor.narrow(0, first_row as i64, num_rows as i64);
        let layers = self.layers.iter().map(|(keys, values)| (narrow(keys), narrow(values))).collect();
        KvCache { layers, ..*self }
    }

    /// Copies one row over another.
    pub fn copy_row(&mut self, from: usize, to: usize) {
        for tensor in self.layers.iter_mut().flat_map(|(keys, values)| [keys, values]) {
            tensor.get(to as i64).copy_(&tensor.get(from as i64));
        }
    }

    /// Copies slots of a row to another row.
    pub(crate) fn copy_slots(&mut self, copy: &SlotCopy) {
        self.layers.iter().flat_map(|(keys, values)| [keys, values]).for_each(|tensor| copy.apply(tensor, 1));
    }

    /// Copies keys and values between slots; every source is read before any destination is
    /// written.
    pub(crate) fn move_slots(&mut self, moves: &[SlotMove]) {
        let Some((first, _)) = self.layers.first() else { return };
        let [rows, from, to] = SlotMove::to_indices(moves, first.device());
        for tensor in self.layers.iter_mut().flat_map(|(keys, values)| [keys, values]) {
            let moved = tensor.index(&[Some(&rows), None, Some(&from)]);
            let _ = tensor.index_put_(&[Some(&rows), None, Some(&to)], &moved, false);
        }
    }

    /// Writes `keys` and `values`, `[rows, kv_heads, width, head_dim]`, to `slots [rows, width]` of
    /// a layer, and returns the layer's keys and values in its leading `num_attended` slots.
    pub(super) fn update(
        &mut self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        slots: &Tensor,
        num_attended: usize,
    ) -> (Tensor, Tensor) {
        let (all_keys, all_values) = &mut self.layers[layer];
        let index = slots.unsqueeze(1).unsqueeze(-1).expand_as(keys);
        let _ = all_keys.scatter_(2, &index, keys);
        let _ = all_values.scatter_(2, &index, values);
        let attended = num_attended as i64;
        (all_keys.i((.., .., ..attended)), all_values.i((.., .., ..attended)))
    }
}
