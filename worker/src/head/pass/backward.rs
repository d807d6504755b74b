//! The way back.

use carryon_crds::job::Task;

use super::{
    CLASSIFIER, CLASSIFIER_BIAS, DOWN, GATE, GATE_BIAS, GATE_UP, INPUT_NORM, Inside, O, OUTPUT, POOLING, POST_NORM, PackedBatch, Pass, QKV,
    Saved, bridge, gate, in_block,
};
use crate::kernel::{Backward, GateGradients, Result, Trained};

/// Takes a weight's gradient, as long as the weight: by name, with the weight, which nothing reads again in this pass.
pub type Take<'a, B> = dyn FnMut(&str, &mut <B as Backward>::Trained, <B as crate::kernel::Backend>::Rows) -> Result<()> + 'a;

impl<B: Backward> Pass<B> {
    /// Hands the gradient of every weight to `take`, from the head's end to its bridge. `by_output` is the loss' derivative by the output of the forward
    /// pass that kept `saved`; weights and batch are those of that pass.
    ///
    /// # Errors
    /// The device failed.
    pub fn backward(
        &self,
        weights: &mut Trained<B>,
        batch: &PackedBatch,
        saved: Saved<B>,
        by_output: B::Rows,
        take: &mut Take<'_, B>,
    ) -> Result<()> {
        let Saved { mut blocks, u, gated } = saved;
        let angles = self.angles(batch)?;
        let mut way = Back { pass: self, weights, take };
        let mut du = match self.shape.task {
            Task::CausalLM => way.delta(batch, u, gated, by_output)?,
            _ => way.class_logits(batch, &u, &by_output)?,
        };
        for index in (0..self.shape.blocks).rev() {
            let Some((input, inside)) = blocks.pop() else { break };
            let inside = match inside {
                Some(inside) => inside,
                None => self.block(way.weights, index, &angles, &batch.lengths, &input)?.0,
            };
            way.block(index, &angles, &batch.lengths, &input, inside, &mut du)?;
        }
        for index in 0..batch.taps.len() {
            let x = self.backend.inputs(self.normed_tap(batch, index)?)?;
            let gradient = self.backend.gradient(&du, 0..self.attention.width, &x)?;
            drop(x);
            way.give(&bridge(index), gradient)?;
        }
        Ok(())
    }
}

/// On the way.
struct Back<'a, 'b, B: Backward> {
    pass: &'a Pass<B>,
    weights: &'a mut Trained<B>,
    take: &'a mut Take<'b, B>,
}

impl<B: Backward> Back<'_, '_, B> {
    fn give(&mut self, name: &str, gradient: B::Rows) -> Result<()> {
        self.weights.get_mut(name).map_or(Ok(()), |weight| (self.take)(name, weight, gradient))
    }

    /// Through `y = x · Wᵀ` of the matrices `names`, one below the other: gives their gradients, and `dx`.
    fn linear(&mut self, names: &[String], x: B::Rows, dy: &B::Rows) -> Result<B::Rows> {
        let backend = &self.pass.backend;
        let dx = backend.linear_back(dy, &names.iter().map(|name| &self.weights[name]).collect::<Vec<_>>())?;
        let (x, mut first) = (backend.inputs(x)?, 0);
        for name in names {
            let own = first..first + B::dimensions(&self.weights[name])[0];
            first = own.end;
            let gradient = backend.gradient(dy, own, &x)?;
            self.give(name, gradient)?;
        }
        Ok(dx)
    }

    /// Through RMSNorm with the weight `name`: adds the gradient by its input to `du`.
    fn norm(&mut self, name: &str, x: &B::Rows, dy: &B::Rows, du: &mut B::Rows) -> Result<()> {
        let (dx, dw) = self.pass.backend.norm_back(x, Some(&self.weights[name]), self.pass.epsilon(), dy)?;
        self.give(name, dw)?;
        self.pass.backend.add(du, &dx)
    }

    /// From the gradient by `g ⊙ Δ` to that by u, `[rows, w]`.
    fn delta(&mut self, batch: &PackedBatch, u: B::Rows, gated: Option<B::Gated>, dy: B::Rows) -> Result<B::Rows> {
        let (pass, backend, count) = (self.pass, &self.pass.backend, B::count(&u));
        let targets = pass.targets(batch, &u)?;
        drop(u);
        let normed = pass.plain_norm(&targets)?;
        let dnormed = match pass.shape.gate {
            true => self.gated(&normed, gated, dy)?,
            false => self.linear(&[OUTPUT.to_owned()], normed, &dy)?,
        };
        let (dtargets, _) = backend.norm_back(&targets, None, pass.epsilon(), &dnormed)?;
        backend.spread(&dtargets, &batch.rows, count)
    }

    /// Through the gate: gives the gradients of its weights and the output's, and that by `normed`.
    fn gated(&mut self, normed: &B::Rows, kept: Option<B::Gated>, dy: B::Rows) -> Result<B::Rows> {
        let by = self.pass.backend.gated_back(gate(self.weights), normed, kept, dy)?;
        let GateGradients { x, output, gate, bias } = by;
        self.give(GATE_BIAS, bias)?;
        self.give(OUTPUT, output)?;
        self.give(GATE, gate)?;
        Ok(x)
    }

    /// From the gradient by the logits to that by u, `[rows, w]`.
    fn class_logits(&mut self, batch: &PackedBatch, u: &B::Rows, dy: &B::Rows) -> Result<B::Rows> {
        let (pass, backend) = (self.pass, &self.pass.backend);
        let (which, lengths) = pass.pooled(batch);
        let some = pass.some_of(u, which.as_deref())?;
        let rows = some.as_ref().unwrap_or(u);
        let normed = pass.plain_norm(rows)?;
        let pooled = backend.pool(&normed, &self.weights[POOLING], &lengths)?;
        let dbias = backend.sum(dy)?;
        let dpooled = self.linear(&[CLASSIFIER.to_owned()], pooled, dy)?;
        let (dnormed, dpooling) = backend.pool_back(&normed, &self.weights[POOLING], &lengths, &dpooled)?;
        self.give(CLASSIFIER_BIAS, dbias)?;
        self.give(POOLING, dpooling)?;
        let drows = backend.norm_back(rows, None, pass.epsilon(), &dnormed)?.0;
        match which {
            Some(which) => backend.spread(&drows, &which, B::count(u)),
            None => Ok(drows),
        }
    }

    /// Through a block: `du` becomes the gradient by its input.
    fn block(
        &mut self,
        index: u32,
        angles: &B::Rows,
        lengths: &[usize],
        input: &B::Rows,
        inside: Inside<B>,
        du: &mut B::Rows,
    ) -> Result<()> {
        let names = |parts: &[&str]| parts.iter().map(|part| in_block(index, part)).collect::<Vec<_>>();
        let (pass, backend) = (self.pass, &self.pass.backend);
        let Inside { qkv, attended, middle, gate_up } = inside;

        let dhidden = self.linear(&names(DOWN), backend.silu_mul(&gate_up)?, du)?;
        let dgate_up = backend.silu_mul_back(&gate_up, &dhidden)?;
        drop((gate_up, dhidden));
        let post_norm = in_block(index, POST_NORM);
        let normed = pass.norm(&middle, &self.weights[&post_norm])?;
        let dnormed = self.linear(&names(GATE_UP), normed, &dgate_up)?;
        drop(dgate_up);
        self.norm(&post_norm, &middle, &dnormed, du)?;
        drop(dnormed);

        let dattended = self.linear(&names(O), attended, du)?;
        let dqkv = backend.attend_whole_back(pass.attention.attention(), angles, &qkv, lengths, &dattended)?;
        drop((qkv, dattended));
        let input_norm = in_block(index, INPUT_NORM);
        let normed = pass.norm(input, &self.weights[&input_norm])?;
        let dnormed = self.linear(&names(QKV), normed, &dqkv)?;
        drop(dqkv);
        self.norm(&input_norm, input, &dnormed, du)
    }
}
