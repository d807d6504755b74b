//! A sequence that is being served: an answer in the making, or a text to be classified.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use super::outside::{Follow, OtherRows};
use crate::base::pages::{BlockHash, Chain, Lease};
use crate::base::registry::LoadedHead;
use crate::base::sampling::{Row, Sampler, Sight, logprob_blocks, logprobs};
use crate::base::schedule::Demand;
use crate::exchange::wire::{ErrorCode, FinishReason, GenerateEvent, TokenLogprob, Usage, WireError};
use crate::kernel::{PAGE, PageTable};

/// What a classified sequence comes back with: its place in the request and one logit per label.
pub type Score = (usize, Result<Vec<f32>, WireError>);

/// A head that runs on the rows of one sequence.
pub struct HeadUse {
    /// The head.
    pub head: Arc<LoadedHead>,
    /// Scale of its output.
    pub alpha: f64,
    /// Where its keys and values of this sequence lie.
    pub table: PageTable,
    /// Pages of the table, from the first on, that belong to blocks.
    pub shared: usize,
    /// Pages of the table, from the first on, that no later position sees: they were given back.
    pub gone: usize,
    /// What it reads of further bases, if it does.
    pub others: Option<OtherRows>,
}

impl HeadUse {
    /// `head` at the beginning of a sequence.
    pub fn new(head: Arc<LoadedHead>, alpha: f64) -> Self {
        Self { head, alpha, table: PageTable::default(), shared: 0, gone: 0, others: None }
    }
}

/// What comes out of a sequence.
pub enum Purpose {
    /// Tokens.
    Answer(Box<Answer>),
    /// Logits of a classification head.
    Classify {
        /// What the head made of the rows so far, rows × w.
        features: Vec<f32>,
        /// Place in the request.
        place: usize,
        /// Who waits for it.
        scores: UnboundedSender<Score>,
    },
    /// The states of tokens that another pool chooses.
    Follow(Follow),
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
    /// Where the base's keys and values lie.
    pub table: PageTable,
    /// Names of its full blocks.
    pub chain: Chain,
    /// Pages of the table, from the first on, that belong to blocks.
    pub shared: usize,
    /// Pages of the table, from the first on, that no later position sees: they were given back.
    pub gone: usize,
    /// Bytes of all keys and values that it may come to.
    pub need: u64,
    /// What it may still take; none before it is admitted.
    pub lease: Option<Lease>,
    /// Its head.
    pub head: Option<HeadUse>,
    /// What comes out.
    pub purpose: Purpose,
    /// Whether nothing more comes out.
    pub finished: bool,
    /// Who wants to know that it is admitted, until it is.
    pub admitted: Option<oneshot::Sender<()>>,
    /// Its place in the bounded queue.
    pub permit: Arc<OwnedSemaphorePermit>,
}

impl Sequence {
    /// A sequence that waits to be admitted. `namespace` says with whom it may share.
    pub fn new(
        tokens: Vec<u32>,
        namespace: &str,
        max_length: usize,
        head: Option<HeadUse>,
        purpose: Purpose,
        permit: Arc<OwnedSemaphorePermit>,
    ) -> Self {
        let mut chain = Chain::new(namespace);
        chain.extend(&tokens);
        let (prompt, table) = (tokens.len(), PageTable::default());
        Self {
            prompt,
            tokens,
            done: 0,
            max_length,
            table,
            chain,
            shared: 0,
            gone: 0,
            need: 0,
            lease: None,
            head,
            purpose,
            finished: false,
            admitted: None,
            permit,
        }
    }

    /// Positions that it may come to.
    pub fn limit(&self) -> usize {
        match &self.purpose {
            Purpose::Answer(answer) => self.prompt.saturating_add(answer.max_tokens).min(self.max_length),
            Purpose::Classify { .. } => self.prompt,
            Purpose::Follow(follow) => self.prompt.saturating_add(follow.max_tokens).min(self.max_length),
        }
    }

    /// Whether it may go on from what others have computed. Who scores its prompt needs the logits of every position, a classifier its features, who
    /// follows its states; and of a head that reads further bases their rows are not kept.
    pub fn is_shareable(&self) -> bool {
        let mixes = self.head.as_ref().is_some_and(|own| own.others.is_some());
        !mixes && matches!(&self.purpose, Purpose::Answer(answer) if answer.prompt_logprobs.is_none())
    }

    /// Names of the blocks that it could go on from: the prompt's last token runs in any case, for its logits.
    pub fn shareable_chain(&self) -> &[BlockHash] {
        if self.is_shareable() { &self.chain.names()[..(self.prompt - 1) / PAGE] } else { &[] }
    }

    /// Whether a token of its own has run.
    pub fn has_begun(&self) -> bool {
        self.done > self.shared * PAGE
    }

    /// The temperatures at which the logits of `position` are looked at: the sampler's, then 1 where log probabilities need it too. None where the
    /// likeliest token is enough.
    pub fn looks_at(&self, position: usize) -> impl Iterator<Item = f32> {
        let (own, plain) = match &self.purpose {
            Purpose::Answer(_) if position + 1 < self.prompt => (Some(1.0), None),
            Purpose::Answer(answer) => {
                let own = (answer.logprobs.is_some() || !answer.sampler.is_greedy()).then(|| answer.sampler.temperature());
                (own, answer.logprobs.and(Some(1.0)).filter(|plain| own != Some(*plain)))
            }
            Purpose::Classify { .. } | Purpose::Follow(_) => (None, None),
        };
        own.into_iter().chain(plain)
    }

    /// The blocks of the logits of `position` that it wants to have, ascending.
    pub fn wanted_blocks(&self, position: usize, sight: &Sight<'_>) -> Vec<u32> {
        let Purpose::Answer(answer) = &self.purpose else { return Vec::new() };
        let mut blocks = if position + 1 < self.prompt {
            logprob_blocks(sight, Some(self.tokens[position + 1]), answer.prompt_logprobs.unwrap_or(0) as usize)
        } else {
            let mut blocks = answer.sampler.blocks(sight);
            blocks.extend(logprob_blocks(sight, None, answer.logprobs.unwrap_or(0) as usize));
            blocks
        };
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }

    /// What the sequence needs to go on, of what can run now.
    pub fn demand(&self) -> Demand {
        match (self.tokens.len() - self.done).min(self.can_run()) {
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
                Purpose::Follow(follow) => follow.is_wanted(),
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

    /// Takes the likeliest token of `position`, or the row where it is looked at: scores the prompt's next token, or chooses one. False when more of
    /// the row has to be there.
    pub fn take_logits(&mut self, position: usize, row: Option<&Row<'_>>, likeliest: u32) -> bool {
        let Purpose::Answer(answer) = &mut self.purpose else { return true };
        if position + 1 < self.prompt {
            let scored = |row: &Row<'_>| logprobs(row, self.tokens[position + 1], answer.prompt_logprobs.unwrap_or(0) as usize);
            answer.scored.push(row.map(scored));
            return true;
        }
        let Some(token) = row.map_or(Some(likeliest), |row| answer.sampler.sample(row)) else { return false };
        let event = match row.zip(answer.logprobs) {
            Some((row, count)) => logprobs(row, token, count as usize),
            None => TokenLogprob { token, logprob: None, top: Vec::new() },
        };
        self.finish_prompt();
        self.go_on_with(event);
        true
    }

    fn go_on_with(&mut self, event: TokenLogprob) {
        let Purpose::Answer(answer) = &mut self.purpose else { return };
        let token = event.token;
        if answer.stop_token_ids.contains(&token) {
            return self.finish(FinishReason::Stop);
        }
        // A reader that went away is noticed before the next step.
        let _ = answer.events.send(GenerateEvent::Token(event));
        self.tokens.push(token);
        if self.tokens.len() - self.prompt >= answer.max_tokens || self.tokens.len() >= self.max_length {
            self.finish(FinishReason::Length);
        }
    }

    /// Ends an answer that wants no token when its prompt is scored.
    pub fn end_scoring(&mut self) {
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
        self.fail_with(WireError::new(code, message));
    }

    /// The same, with an error that somebody else has found.
    pub fn fail_with(&mut self, error: WireError) {
        let _ = match &self.purpose {
            Purpose::Answer(answer) => answer.events.send(GenerateEvent::Error { error }).is_ok(),
            Purpose::Classify { place, scores, .. } => scores.send((*place, Err(error))).is_ok(),
            Purpose::Follow(follow) => follow.fail(error),
        };
        self.finished = true;
    }

    /// Ends the sequence because its head computed what is no number.
    pub fn fail_by_head(&mut self) {
        let digest = self.head.as_ref().map_or_else(String::new, |own| own.head.digest.clone());
        self.fail(ErrorCode::HeadNotFinite, &format!("head {digest} computed a number that is not finite"));
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
