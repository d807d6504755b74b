//! Sequences that are served: who is let in, and how many tokens of each run in a step.

use std::collections::VecDeque;

use super::cost::{Cost, Tokens};

/// Seconds of a step in which answers go on. A prompt beside them is cut so that their next tokens come within it: ten a second, twice as fast as one reads.
pub const STEP_SECONDS: f64 = 0.1;
/// How much longer than without prompts such a step may take, however slow the model: without it a model whose answers alone take the
/// whole step would never read a prompt.
const STEP_STRETCH: f64 = 2.0;
/// Seconds of a step in which prompts alone run: what comes in meanwhile, training and the next prompt, waits for it.
pub const PROMPT_SECONDS: f64 = 0.4;
/// Such a step takes at least this many times its fixed part, so that reading the weights is a fifth of it at most.
const PROMPT_STRETCH: f64 = 5.0;
/// Fewest tokens of prompts in a step that has any: a tile of the matrix kernels costs the same with one row.
const LEAST_PREFILL: usize = 16;

/// Tokens that a sequence still has to run before it can go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// The rest of a prompt; 0 for one that waits for another's.
    Prefill(usize),
    /// The token sampled last.
    Decode,
}

/// Sequences in order of arrival: active ones, and those that wait for a place.
#[derive(Debug)]
pub struct Serving<S> {
    max_active: usize,
    active: Vec<S>,
    waiting: VecDeque<S>,
    /// Index of the active sequence that decodes first when not all can.
    first: usize,
}

impl<S> Serving<S> {
    /// No sequences; at most `max_active` are going to run together.
    pub fn new(max_active: usize) -> Self {
        Self { max_active, active: Vec::new(), waiting: VecDeque::new(), first: 0 }
    }

    /// Adds a sequence behind all others.
    pub fn push(&mut self, sequence: S) {
        self.waiting.push_back(sequence);
    }

    /// Drops what nobody waits for any more, and lets waiting sequences in as long as `admit` says so (and reserves what they need). The first
    /// that does not fit keeps those behind it out, else a large one would wait for ever.
    ///
    /// # Errors
    /// Those of `admit`.
    pub fn refresh<E>(&mut self, wanted: impl Fn(&S) -> bool, mut admit: impl FnMut(&mut S) -> Result<bool, E>) -> Result<(), E> {
        self.retain(&wanted);
        self.waiting.retain(&wanted);
        while self.active.len() < self.max_active
            && let Some(first) = self.waiting.front_mut()
            && admit(first)?
        {
            self.active.extend(self.waiting.pop_front());
        }
        Ok(())
    }

    /// The sequences that wait.
    pub fn waiting(&self) -> impl Iterator<Item = &S> {
        self.waiting.iter()
    }

    /// The active sequences, in order of arrival.
    pub fn active(&mut self) -> &mut [S] {
        &mut self.active
    }

    /// Removes active sequences.
    pub fn retain(&mut self, keep: impl Fn(&S) -> bool) {
        let gone = self.active.iter().take(self.first).filter(|sequence| !keep(sequence)).count();
        self.first -= gone;
        self.active.retain(keep);
    }

    /// Active and waiting sequences.
    pub fn lengths(&self) -> (usize, usize) {
        (self.active.len(), self.waiting.len())
    }

    /// Shares a step of at most `max_tokens` out, one entry per active sequence: first a token for each that decodes, in turn when there are more of
    /// them; then prompts in order of arrival, as much of them as takes no longer than the step may.
    pub fn grants(&mut self, demands: &[Demand], cost: &Cost, max_tokens: usize) -> Vec<usize> {
        let waiting: usize = demands.iter().map(|demand| if let Demand::Prefill(tokens) = demand { *tokens } else { 0 }).sum();
        let most = max_tokens - waiting.min(LEAST_PREFILL).min(max_tokens / 2);
        let mut grants = vec![0; demands.len()];
        let mut tokens = Tokens::default();
        let start = self.first;
        for index in (start..demands.len()).chain(0..start.min(demands.len())) {
            if demands[index] == Demand::Decode && tokens.decode < most {
                grants[index] = 1;
                tokens.decode += 1;
                self.first = (index + 1) % demands.len();
            }
        }
        let mut rest = prefill(tokens.decode, cost).min(max_tokens - tokens.decode);
        for (grant, demand) in grants.iter_mut().zip(demands) {
            if let Demand::Prefill(tokens) = demand {
                *grant = rest.min(*tokens);
                rest -= *grant;
            }
        }
        grants
    }
}

/// Tokens of prompts that fit into a step beside `decode` answers.
fn prefill(decode: usize, cost: &Cost) -> usize {
    let alone = cost.step(Tokens { prefill: 0, decode });
    let seconds = match decode {
        0 => PROMPT_SECONDS.max(PROMPT_STRETCH * cost.fixed()),
        _ => STEP_SECONDS.max(STEP_STRETCH * alone),
    };
    cost.prefill_within(seconds - alone).max(LEAST_PREFILL)
}

#[cfg(test)]
mod tests {
    use super::Demand::{Decode, Prefill};
    use super::*;

    fn serving(active: usize) -> Serving<usize> {
        let mut serving = Serving::new(active);
        (0..active).for_each(|sequence| serving.push(sequence));
        serving.refresh(|_| true, |_| Ok::<_, ()>(true)).unwrap();
        serving
    }

    #[test]
    fn answers_come_first_and_prompts_share_the_rest_in_order() {
        // With nothing measured a token takes a millisecond.
        let cases: [(&[Demand], usize, &[usize]); 7] = [
            (&[Prefill(10), Decode, Prefill(10), Decode], 16, &[10, 1, 4, 1]),
            (&[Prefill(100), Decode], 16, &[15, 1]),
            (&[Decode, Decode, Decode], 2, &[1, 1, 0]),
            (&[Decode, Prefill(0), Decode], 2, &[1, 0, 1]),
            (&[Decode, Decode, Prefill(3)], 2, &[1, 0, 1]),
            (&[Prefill(3)], 16, &[3]),
            (&[], 16, &[]),
        ];
        for (demands, max_tokens, expected) in cases {
            assert_eq!(serving(demands.len()).grants(demands, &Cost::default(), max_tokens), expected, "{demands:?}");
        }
    }

    #[test]
    fn a_prompt_is_cut_by_what_it_costs() {
        // Milliseconds: fixed, a token of a prompt, a decoded token.
        for (costs, decode, expected) in [
            ([10.0, 1.0, 1.0], 4, 86),
            ([10.0, 1.0, 1.0], 0, 390),
            ([30.0, 0.1, 1.0], 10, 600),
            ([100.0, 20.0, 10.0], 10, 16),
            ([500.0, 5.0, 50.0], 10, 200),
            ([500.0, 5.0, 50.0], 0, 400),
        ] {
            let [fixed, token, decoded] = costs.map(|milliseconds: f64| milliseconds / 1e3);
            let mut cost = Cost::default();
            // What it is told of one kind of step it takes for true.
            for step in 0..4000 {
                let tokens = [Tokens { prefill: 200, decode: 0 }, Tokens { prefill: 0, decode: 20 }, Tokens::default()][step % 3];
                cost.learn(tokens, fixed + token * tokens.prefill as f64 + decoded * tokens.decode as f64);
            }
            let demands: Vec<_> = std::iter::repeat_n(Decode, decode).chain([Prefill(100_000)]).collect();
            let granted = serving(demands.len()).grants(&demands, &cost, 2048)[decode];
            assert!(granted.abs_diff(expected) <= expected / 10, "{costs:?} beside {decode}: {granted}");
        }
    }

    #[test]
    fn all_answers_get_their_turn_when_some_leave() {
        let mut serving = serving(12);
        let mut passed_over = [0; 12];
        for step in 0..40 {
            let grants = serving.grants(&vec![Decode; serving.lengths().0], &Cost::default(), 4);
            assert_eq!(grants.iter().sum::<usize>(), 4);
            for (sequence, granted) in serving.active().iter().zip(grants) {
                passed_over[*sequence] = if granted == 1 { 0 } else { passed_over[*sequence] + 1 };
                assert!(passed_over[*sequence] < 3, "{sequence} at step {step}");
            }
            // Before and behind the one whose turn it is.
            serving.retain(|sequence| !matches!((step, sequence), (4, 0 | 1) | (11, 11) | (21, 2..=4)));
        }
    }

    #[test]
    fn the_first_that_does_not_fit_keeps_those_behind_it_out() {
        let mut serving = Serving::new(3);
        for pages in [2, 6, 1, 1] {
            serving.push(pages);
        }
        let mut free = 5;
        let admit = |pages: &mut usize| {
            let fits = *pages <= free;
            free -= if fits { *pages } else { 0 };
            Ok::<_, ()>(fits)
        };
        serving.refresh(|_| true, admit).unwrap();
        assert_eq!((serving.active().to_vec(), serving.lengths()), (vec![2], (1, 3)));
        serving.refresh(|pages| *pages != 2, |_| Ok::<_, ()>(true)).unwrap();
        assert_eq!((serving.active().to_vec(), serving.lengths()), (vec![6, 1, 1], (3, 0)));
        serving.push(7);
        assert_eq!(serving.refresh(|pages| *pages != 1, |_| Err("lost")), Err("lost"));
        assert_eq!(serving.waiting().collect::<Vec<_>>(), [&7]);
    }
}
