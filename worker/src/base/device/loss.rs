//! Losses and gradients for trainers, a slice at a time.

use carryon_crds::pool::Dtype;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::exchange::{LossRequest, LossResponse};
use crate::head::loss::{self, Against, LossWeights};
use crate::kernel::{Backend, Result};
use crate::model::LmHead;
use crate::numbers::{from_bytes, number_bytes};

/// Losses and gradients of rows.
pub struct LossJob {
    /// Rows, outputs of the head, targets.
    pub request: LossRequest,
    /// Who waits.
    pub reply: oneshot::Sender<LossResponse>,
    /// Its place in the bounded queue.
    pub permit: OwnedSemaphorePermit,
}

impl LossJob {
    /// Whether somebody still waits for it.
    pub fn is_wanted(&self) -> bool {
        !self.reply.is_closed()
    }

    /// Rows in all.
    pub fn rows(&self) -> usize {
        self.request.rows()
    }
}

/// Losses that have begun.
pub struct LossRun {
    job: LossJob,
    answer: LossResponse,
}

impl LossRun {
    /// `job`, of which nothing has run.
    pub fn new(job: LossJob) -> Self {
        let answer = LossResponse { loss: Vec::new(), gradient: job.request.gradient.then(Vec::new) };
        Self { job, answer }
    }

    /// Whether nothing more has to run: all rows have, or nobody waits any more.
    pub fn is_over(&self) -> bool {
        self.answer.loss.len() == self.job.rows() || !self.job.is_wanted()
    }

    /// Runs the next rows, at most `most`; returns how many.
    pub fn slice<B: Backend>(&mut self, backend: &B, lm_head: &LmHead<B>, most: usize) -> Result<usize> {
        let (request, done) = (&self.job.request, self.answer.loss.len());
        let width = request.hidden_size;
        let rows = done..(done + most).min(self.job.rows());
        let read = |bytes: &[u8], dtype: Dtype| {
            let row_bytes = width * number_bytes(dtype);
            let mut values = vec![0.0; rows.len() * width];
            from_bytes(&bytes[rows.start * row_bytes..rows.end * row_bytes], dtype, &mut values);
            values
        };
        let (x, delta) = (read(&request.x, request.dtype), request.delta.as_ref().map(|delta| read(delta, Dtype::Float32)));
        let backward = request.gradient.then(|| lm_head.backward());
        let weights = LossWeights { forward: lm_head.forward(), backward, dtype: lm_head.dtype(), softcap: lm_head.softcap() };
        let delta = delta.as_deref().map(|delta| (delta, 1.0));
        let against = request.targets.as_ref().map_or(Against::Base, |targets| Against::Tokens(&targets[rows.clone()]));
        let output = loss::lm_loss(backend, &weights, &x, delta, against)?;
        self.answer.loss.extend(output.loss);
        if let Some(gradient) = &mut self.answer.gradient {
            gradient.extend(output.gradient);
        }
        Ok(rows.len())
    }

    /// Answers whoever waits.
    pub fn reply(self) {
        // A reader that went away needs no answer.
        let _ = self.job.reply.send(self.answer);
    }
}
