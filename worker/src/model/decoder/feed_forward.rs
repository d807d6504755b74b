//! The feed-forward layer: the same for all rows, or experts that are chosen for each.

use carryon_crds::pool::Dtype;

use super::{Buffers, Pass, left};
use crate::kernel::{Activation, Backend, Left, Part, Result, Sink};
use crate::model::config::{ExpertsConfig, FeedForwardConfig};
use crate::model::experts;
use crate::model::weights::{Experts, FeedForward, Gated, Layer};

impl<B: Backend> Pass<'_, '_, B> {
    /// `residual += down(activation(gate(norm(residual))) · up(norm(residual)))`, or the weighted sum of such over each row's experts.
    pub(super) fn feed_forward(
        &self,
        index: usize,
        layer: &Layer<B>,
        rows: usize,
        buffers: &mut Buffers<B>,
        gated: &mut B::Packed,
        added: &mut B::Rows,
    ) -> Result<()> {
        match (&layer.feed_forward, &self.model.config.layers[index].feed_forward) {
            (FeedForward::Gated(weights), FeedForwardConfig::Gated { activation, .. }) => {
                self.gated(layer, weights, *activation, rows, buffers, gated, added)
            }
            (FeedForward::Experts(weights), FeedForwardConfig::Experts(config)) => {
                self.experts(layer, weights, config, rows, buffers, gated, added)
            }
            _ => unreachable!("weights are loaded as the configuration says"),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the buffers are those of all layers")]
    fn gated(
        &self,
        layer: &Layer<B>,
        weights: &Gated<B>,
        activation: Activation,
        rows: usize,
        buffers: &mut Buffers<B>,
        gated: &mut B::Packed,
        added: &mut B::Rows,
    ) -> Result<()> {
        let norm = layer.feed_forward_norm.as_ref();
        let left = left(&buffers.residual, norm, self.model.config.rms_norm_eps);
        self.model.backend.product(left, &[Part { rows, matrix: &weights.gate_up, norm }], Sink::Gated(gated, activation))?;
        self.add(&weights.down, gated, layer.down_norm.as_ref(), buffers, added)
    }

    #[expect(clippy::too_many_arguments, reason = "the buffers are those of all layers")]
    fn experts(
        &self,
        layer: &Layer<B>,
        weights: &Experts<B>,
        config: &ExpertsConfig,
        rows: usize,
        buffers: &mut Buffers<B>,
        gated: &mut B::Packed,
        added: &mut B::Rows,
    ) -> Result<()> {
        let (backend, epsilon, norm) = (&self.model.backend, self.model.config.rms_norm_eps, layer.feed_forward_norm.as_ref());
        let part = Part { rows, matrix: &weights.router, norm };
        backend.product(left(&buffers.residual, norm, epsilon), &[part], Sink::Store(added))?;
        let dealt = experts::deal(&backend.read(added)?, &weights.bias, config);
        // Copies, so that the shared expert may be added first.
        let own = backend.tap(&buffers.residual, Some(&dealt.rows), None, Dtype::Float32)?;
        if let Some(shared) = &weights.shared {
            self.gated(layer, shared, config.activation, rows, buffers, gated, added)?;
        }
        let busy = || weights.experts.iter().zip(&dealt.counts).filter(|(_, rows)| **rows > 0);
        let parts: Vec<_> = busy().map(|(expert, rows)| Part { rows: *rows, matrix: &expert.gate_up, norm }).collect();
        backend.product(left(&own, norm, epsilon), &parts, Sink::Gated(gated, config.activation))?;
        let parts: Vec<_> = busy().map(|(expert, rows)| Part { rows: *rows, matrix: &expert.down, norm: None }).collect();
        backend.product(Left::Packed(gated), &parts, Sink::Store(added))?;
        backend.add_scaled(&mut buffers.residual, added, &dealt.rows, &dealt.weights)
    }
}
