//! Tensors of a checkpoint become weights on a device, rounded to the pool's number type.

use crate::kernel::{self, Backend, Fill, Stored};
use crate::model::checkpoint::Checkpoint;
use crate::model::config::ModelConfig;
use crate::model::error::ModelError;
use crate::model::families::Name;
use crate::model::tensor::Tensor;

/// Names of one tensor, in safetensors and in GGUF.
pub type TensorName = [String; 2];

/// The whole names of a tensor outside the layers.
pub fn full((safetensors, gguf): Name, what: &str) -> TensorName {
    [format!("{safetensors}.{what}"), format!("{gguf}.{what}")]
}

/// The whole names of a tensor of a layer.
pub fn of_layer(index: usize, (safetensors, gguf): Name, what: &str) -> TensorName {
    [format!("model.layers.{index}.{safetensors}.{what}"), format!("blk.{index}.{gguf}.{what}")]
}

/// Rows of a tensor, one of several that lie one below the other, and their order.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub tensor: &'a Tensor,
    /// The first of them, and their number.
    pub first: usize,
    pub count: usize,
    pub order: Option<Order>,
}

impl<'a> Rows<'a> {
    /// All of them, as they are in the file.
    pub fn of(tensor: &'a Tensor) -> Self {
        Self { tensor, first: 0, count: tensor.rows, order: None }
    }

    /// All of them in another order.
    pub fn ordered(tensor: &'a Tensor, order: Option<Order>) -> Self {
        Self { order, ..Self::of(tensor) }
    }

    /// Those of one of several matrices of `count` rows each.
    pub fn part(tensor: &'a Tensor, index: usize, count: usize) -> Self {
        Self { first: index * count, count, ..Self::of(tensor) }
    }
}

/// Heads of which `dims` values, from `begin` on in the file, are rotated; they come first, in halves. Where they are pairs of neighbours in the file
/// these are put apart: of `dims` 4, rows (0, 1, 2, 3) of the file are rows (0, 2, 1, 3).
#[derive(Clone, Copy)]
pub struct Order {
    pub head_dim: usize,
    pub dims: usize,
    pub begin: usize,
    pub interleaved: bool,
}

impl Order {
    /// The row in the file.
    pub fn of(self, row: usize) -> usize {
        let (head, index) = (row / self.head_dim, row % self.head_dim);
        let half = self.dims / 2;
        let index = match index.checked_sub(self.dims) {
            None if self.interleaved => self.begin + 2 * (index % half) + index / half,
            None => self.begin + index,
            Some(other) if other < self.begin => other,
            Some(_) => index,
        };
        head * self.head_dim + index
    }
}

/// [`Backend::matrix`] or [`Backend::gate_up`].
pub type Pack<B> = fn(&B, usize, usize, Stored, Fill<'_>) -> kernel::Result<<B as Backend>::Matrix>;

/// Reads tensors and packs them.
pub struct Packer<'a, B> {
    pub backend: &'a B,
    pub checkpoint: &'a Checkpoint,
    pub config: &'a ModelConfig,
    /// What large matrices are kept as.
    pub stored: Stored,
}

impl<B: Backend> Packer<'_, B> {
    /// Rows of tensors, one below the other, `cols` columns each.
    pub fn stacked(&self, parts: &[Rows<'_>], cols: usize, pack: Pack<B>, rows: usize) -> Result<B::Matrix, ModelError> {
        let fill = |mut row: usize, values: &mut [f32]| {
            for Rows { tensor, first, count, order } in parts {
                if row < *count {
                    return tensor.row(first + order.map_or(row, |order| order.of(row)), values);
                }
                row -= count;
            }
        };
        let packed = pack(self.backend, rows, cols, self.stored, &fill)?;
        parts.iter().try_for_each(|part| part.tensor.finish())?;
        Ok(packed)
    }

    pub fn tensor(&self, name: &TensorName, rows: usize, cols: usize) -> Result<Tensor, ModelError> {
        self.checkpoint.tensor(name, rows, cols)
    }

    pub fn matrix(&self, name: &TensorName, rows: usize, cols: usize) -> Result<B::Matrix, ModelError> {
        self.stacked(&[Rows::of(&self.tensor(name, rows, cols)?)], cols, B::matrix, rows)
    }

    /// A vector on the host.
    pub fn values(&self, name: &TensorName, length: usize) -> Result<Vec<f32>, ModelError> {
        self.tensor(name, 1, length)?.vector()
    }

    /// The weight of a norm.
    pub fn norm(&self, name: &TensorName, length: usize) -> Result<B::Vector, ModelError> {
        let mut values = self.values(name, length)?;
        if self.config.names.norms_less_one && !self.checkpoint.is_gguf() {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        Ok(self.backend.vector(&values)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_rotated_comes_first_and_pairs_of_neighbours_are_put_into_halves() {
        let order =
            |head_dim, dims, begin, interleaved| (0..8).map(|row| Order { head_dim, dims, begin, interleaved }.of(row)).collect::<Vec<_>>();
        assert_eq!(order(4, 4, 0, true), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(order(8, 4, 0, true), [0, 2, 1, 3, 4, 5, 6, 7]);
        assert_eq!(order(8, 4, 2, true), [2, 4, 3, 5, 0, 1, 6, 7]);
        assert_eq!(order(4, 2, 2, false), [2, 3, 0, 1, 6, 7, 4, 5]);
    }
}
