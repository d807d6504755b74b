//! Weights of feed-forward layers.

use super::packer::{Packer, Rows, TensorName, of_layer};
use crate::kernel::Backend;
use crate::model::config::{ExpertsConfig, FeedForwardConfig, Scores};
use crate::model::error::ModelError;
use crate::model::families::{CHOICE_BIAS, SHARED_EXPERT};
use crate::model::tensor::Tensor;

/// A feed-forward layer.
pub enum FeedForward<B: Backend> {
    /// The same for all rows.
    Gated(Gated<B>),
    /// Chosen for each row.
    Experts(Experts<B>),
}

impl<B: Backend> FeedForward<B> {
    /// Its matrices, without the router.
    pub fn matrices(&self) -> impl Iterator<Item = &B::Matrix> {
        let gated = match self {
            Self::Gated(gated) => vec![gated],
            Self::Experts(weights) => weights.experts.iter().chain(&weights.shared).collect(),
        };
        gated.into_iter().flat_map(|gated| [&gated.gate_up, &gated.down])
    }
}

/// Matrices of a gated layer.
pub struct Gated<B: Backend> {
    /// Gate and up, width × D each.
    pub gate_up: B::Matrix,
    /// D × width.
    pub down: B::Matrix,
}

/// Gated layers of which a router chooses some for each row.
pub struct Experts<B: Backend> {
    /// Experts × D.
    pub router: B::Matrix,
    /// What is added to each expert's score for the choice; empty where nothing is.
    pub bias: Vec<f32>,
    /// All of one shape.
    pub experts: Vec<Gated<B>>,
    /// The one to which all rows go.
    pub shared: Option<Gated<B>>,
}

impl<B: Backend> Packer<'_, B> {
    /// The feed-forward layer of layer `index`.
    pub fn feed_forward(&self, index: usize, config: &FeedForwardConfig) -> Result<FeedForward<B>, ModelError> {
        let names = &self.config.names;
        let name = |of| of_layer(index, of, "weight");
        match config {
            FeedForwardConfig::Gated { width, .. } => {
                let gate_up: Vec<TensorName> = names.gate_up.iter().map(|of| name(*of)).collect();
                self.gated(&gate_up, &name(names.down), *width).map(FeedForward::Gated)
            }
            FeedForwardConfig::Experts(config) => self.experts(index, config).map(FeedForward::Experts),
        }
    }

    fn experts(&self, index: usize, config: &ExpertsConfig) -> Result<Experts<B>, ModelError> {
        let names = &self.config.names;
        let name = |of| of_layer(index, of, "weight");
        let experts = match self.checkpoint.is_gguf() {
            true => self.experts_together(names.expert.map(name), config)?,
            false => self.experts_apart(index, config)?,
        };
        let [gate, up, down] = SHARED_EXPERT.map(name);
        Ok(Experts {
            router: self.router(&name(names.router), config.count)?,
            bias: match config.scores {
                Scores::Softmax => Vec::new(),
                Scores::Sigmoid => {
                    let (safetensors, gguf) = CHOICE_BIAS;
                    self.values(&[format!("model.layers.{index}.{safetensors}"), format!("blk.{index}.{gguf}")], config.count)?
                }
            },
            experts,
            shared: config.shared.map(|width| self.gated(&[gate, up], &down, width)).transpose()?,
        })
    }

    /// Experts with tensors of their own, as safetensors have them.
    fn experts_apart(&self, index: usize, config: &ExpertsConfig) -> Result<Vec<Gated<B>>, ModelError> {
        let mut experts = Vec::new();
        for number in 0..config.count {
            let [gate, up, down] = self.config.names.expert.map(|(of, _)| of.replace("{}", &number.to_string()));
            let [gate, up, down] = [gate, up, down].map(|of| [format!("model.layers.{index}.{of}.weight"), String::new()]);
            experts.push(self.gated(&[gate, up], &down, config.width)?);
        }
        Ok(experts)
    }

    /// Experts whose gates lie one below the other in a tensor, and so what is up and down, as GGUF files have them.
    fn experts_together(&self, names: [TensorName; 3], config: &ExpertsConfig) -> Result<Vec<Gated<B>>, ModelError> {
        let (ExpertsConfig { count, width, .. }, hidden) = (config, self.config.hidden_size);
        let [gate, up, down] = &names;
        let (gate, up) = (self.tensor(gate, count * width, hidden)?, self.tensor(up, count * width, hidden)?);
        let down = self.tensor(down, count * hidden, *width)?;
        let expert = |number: usize| {
            let parts = [Rows::part(&gate, number, *width), Rows::part(&up, number, *width)];
            let gate_up = self.stacked(&parts, hidden, B::gate_up, *width)?;
            Ok(Gated { gate_up, down: self.stacked(&[Rows::part(&down, number, hidden)], *width, B::matrix, hidden)? })
        };
        (0..*count).map(expert).collect()
    }

    /// It decides who computes: it is kept as it is.
    fn router(&self, name: &TensorName, count: usize) -> Result<B::Matrix, ModelError> {
        let (tensor, hidden) = (self.tensor(name, count, self.config.hidden_size)?, self.config.hidden_size);
        let router = self.backend.matrix(count, hidden, self.stored.products().into(), &|row, values| tensor.row(row, values))?;
        tensor.finish()?;
        Ok(router)
    }

    /// Gate and up, in one tensor or two, and down.
    fn gated(&self, gate_up: &[TensorName], down: &TensorName, width: usize) -> Result<Gated<B>, ModelError> {
        let hidden = self.config.hidden_size;
        let mut tensors: Vec<Tensor> = Vec::new();
        for name in gate_up {
            tensors.push(self.tensor(name, 2 * width / gate_up.len(), hidden)?);
        }
        let parts: Vec<_> = tensors.iter().map(Rows::of).collect();
        Ok(Gated { gate_up: self.stacked(&parts, hidden, B::gate_up, width)?, down: self.matrix(down, hidden, width)? })
    }
}
