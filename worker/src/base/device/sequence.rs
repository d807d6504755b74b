//! A sequence that is being served: an answer in the making, or a text to be classified.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use crate::base::queue::Demand;
use crate::base::registry::LoadedHead;
use crate::base::sampling::{Row, Sampler, logprobs};
use crate::exchange::wire::{ErrorCode, FinishReason, GenerateEvent, TokenLogprob, Usage, WireError};
use crate::head::HeadKv;
use crate::model::Kv;

/// What a classified sequence comes back with: its place in the request and one logit per label.
pub type Score = (usize, Result<Vec<f32>, WireError>);

/// A head that runs on the rows of one sequence.
pub struct HeadUse {
    /// The head.
    pub head: Arc<LoadedHead>,
    /// Scale of its output.
    pub alpha: f64,
    /// Its keys and values for this sequence.
    pub kv: HeadKv,
}

impl HeadUse {
    /// `head` at the beginning of a sequence.
    pub fn new(head: Arc<LoadedHead>, alpha: f64) -> Self {
        let kv = HeadKv::new(head.shape());
        Self { head, alpha, kv }
    }
}

/// What comes out of a sequence.
pub enum Purpose {
    /// Tokens.
    Answer(Box<Answer>),
    /// Logits of a classification head.
    Classify {
        /// Rows so far, one entry per tap of the head.
        taps: Vec<Vec<f32>>,
        /// Place in the request.
        place: usize,
        /// Who waits for it.
        scores: UnboundedSender<Score>,
    },
}

/// An answer in the making.
pub struct Answer {
    /// Who reads it; a sequence whose reader is gone is dropped.
    pub events: UnboundedSender<GenerateEvent>,
    /// How tokens are chosen.
    pub sampler: Sampler,
    /// Tokens that end it.
    pub stop_token_ids: Vec<u32>,
    /// Alternatives to report per generated token.
    pub logprobs: Option<u32>,
    /// Alternatives to report per prompt token.
    pub prompt_logprobs: Option<u32>,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Prompt tokens scored so far.
    pub scored: Vec<Option<TokenLogprob>>,
}

/// A sequence that is being served.
pub struct Sequence {
    /// Prompt, then what was generated.
    pub tokens: Vec<u32>,
    /// Length of the prompt.
    pub prompt: usize,
    /// Tokens that have run through the base.
    pub done: usize,
    /// Longest the sequence may become.
    pub max_length: usize,
    /// The base's keys and values, from the first step on.
    pub kv: Option<Kv>,
    /// Its head.
    pub head: Option<HeadUse>,
    /// What comes out.
    pub purpose: Purpose,
    /// Whether nothing more comes out.
    pub finished: bool,
    /// Its place in the bounded queue.
    pub permit: Arc<OwnedSemaphorePermit>,
}

impl Sequence {
    /// What the sequence needs to go on.
    pub fn demand(&self) -> Demand {
        match self.tokens.len() - self.done {
            1 if self.done >= self.prompt => Demand::Decode,
            tokens => Demand::Prefill(tokens),
        }
    }

    /// Whether somebody still waits for it.
    pub fn is_wanted(&self) -> bool {
        !self.finished
            && match &self.purpose {
                Purpose::Answer(answer) => !answer.events.is_closed(),
                Purpose::Classify { scores, .. } => !scores.is_closed(),
            }
    }

    /// Positions whose logits are needed when `rows` more tokens run.
    pub fn logit_positions(&self, rows: usize) -> std::ops::Range<usize> {
        let (end, complete) = (self.done + rows, self.done + rows == self.tokens.len());
        let Purpose::Answer(answer) = &self.purpose else { return end..end };
        let end = match complete && answer.max_tokens == 0 {
            true => end - 1,
            false => end,
        };
        match (answer.prompt_logprobs, complete) {
            (Some(_), _) if self.done < self.prompt => self.done..end,
            (_, true) => (self.tokens.len() - 1).min(end)..end,
            (_, false) => end..end,
        }
    }

    /// Takes the logits of `position`: scores the prompt's next token, or chooses one.
    pub fn take_logits(&mut self, position: usize, logits: &[f32]) {
        if self.finished {
            return;
        }
        let Some(row) = Row::read(logits) else { return self.fail(ErrorCode::HeadNotFinite, "the logits are not finite") };
        let Purpose::Answer(answer) = &mut self.purpose else { return };
        if position + 1 < self.prompt {
            let scored = logprobs(&row, self.tokens[position + 1], answer.prompt_logprobs.unwrap_or(0) as usize);
            answer.scored.push(Some(scored));
            return;
        }
        self.finish_prompt();
        let Purpose::Answer(answer) = &mut self.purpose else { return };
        let token = answer.sampler.sample(&row);
        if answer.stop_token_ids.contains(&token) {
            return self.finish(FinishReason::Stop);
        }
        let event = match answer.logprobs {
            Some(count) => logprobs(&row, token, count as usize),
            None => TokenLogprob { token, logprob: None, top: Vec::new() },
        };
        // A reader that went away is noticed before the next step.
        let _ = answer.events.send(GenerateEvent::Token(event));
        self.tokens.push(token);
        if self.tokens.len() - self.prompt >= answer.max_tokens || self.tokens.len() >= self.max_length {
            self.finish(FinishReason::Length);
        }
    }

    /// Counts `rows` tokens as run, before their logits are taken.
    pub fn advance(&mut self, rows: usize) {
        self.done += rows;
    }

    /// Ends an answer that wants no token when its prompt is scored.
    pub fn settle(&mut self) {
        if let Purpose::Answer(answer) = &self.purpose
            && answer.max_tokens == 0
            && self.done >= self.prompt
            && !self.finished
        {
            self.finish_prompt();
            self.finish(FinishReason::Length);
        }
    }

    /// Ends the sequence with an error; its neighbours go on.
    pub fn fail(&mut self, code: ErrorCode, message: &str) {
        let error = WireError::new(code, message);
        let _ = match &self.purpose {
            Purpose::Answer(answer) => answer.events.send(GenerateEvent::Error { error }).is_ok(),
            Purpose::Classify { place, scores, .. } => scores.send((*place, Err(error))).is_ok(),
        };
        self.finished = true;
    }

    /// Sends the prompt's log probabilities, once.
    fn finish_prompt(&mut self) {
        if let Purpose::Answer(answer) = &mut self.purpose
            && answer.prompt_logprobs.is_some()
            && !answer.scored.is_empty()
        {
            let prompt_logprobs = std::mem::take(&mut answer.scored);
            let _ = answer.events.send(GenerateEvent::Prompt { prompt_logprobs });
        }
    }

    fn finish(&mut self, finish_reason: FinishReason) {
        if let Purpose::Answer(answer) = &self.purpose {
            let usage = Usage { prompt_tokens: self.prompt as u32, completion_tokens: (self.tokens.len() - self.prompt) as u32 };
            let _ = answer.events.send(GenerateEvent::Finish { finish_reason, usage });
        }
        self.finished = true;
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::Semaphore;
    use tokio::sync::mpsc::unbounded_channel;

    use super::*;
    use crate::exchange::wire::GenerateRequest;

    #[test]
    fn logits_that_are_not_finite_end_the_answer_once_and_with_an_error() {
        for (prompt_logprobs, position) in [(None, 1), (Some(0), 0)] {
            let (events, mut received) = unbounded_channel();
            let sampler = Sampler::new(&GenerateRequest::greedy(vec![1, 2], 4));
            let (stop_token_ids, scored) = (Vec::new(), Vec::new());
            let answer = Answer { events, sampler, stop_token_ids, logprobs: None, prompt_logprobs, max_tokens: 4, scored };
            let permit = Arc::new(Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap());
            let (tokens, purpose) = (vec![1, 2], Purpose::Answer(Box::new(answer)));
            let mut sequence =
                Sequence { tokens, prompt: 2, done: 2, max_length: 16, kv: None, head: None, purpose, finished: false, permit };
            (position..2).for_each(|position| sequence.take_logits(position, &[0.5, f32::NAN, 1.0]));
            assert!(sequence.finished);
            assert!(matches!(received.try_recv(), Ok(GenerateEvent::Error { error }) if error.code == ErrorCode::HeadNotFinite));
            assert!(received.try_recv().is_err());
        }
    }
}
