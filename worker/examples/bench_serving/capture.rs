//! Sequences that are decoded while a trainer asks for hidden states as fast as it can.

use std::cell::RefCell;
use std::pin::pin;
use std::time::Instant;

use carryon_crds::common::{TapPreset, Taps};
use carryon_worker::exchange::wire::HiddenStatesRequest;
use futures::StreamExt as _;
use futures::future::try_join_all;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

use crate::answers::{read, request};
use crate::{Bench, print, quantile};

const SEQUENCES: u32 = 4;
const PROMPT: usize = 32;
const ANSWER: u32 = 128;
/// Requests at once: a trainer has two micro-batches in flight.
const IN_FLIGHT: u32 = 2;
/// Sequences of a micro-batch, and their tokens.
const BATCH: usize = 8;
const LENGTH: usize = 256;
/// Micro-batches of a measurement, after a first one that only starts the clock.
const BATCHES: usize = 4;

/// Four sequences alone, a trainer alone, both together.
pub async fn beside(bench: &Bench, round: u32) -> anyhow::Result<()> {
    let gaps = RefCell::default();
    let prompts = round * SEQUENCES..(round + 1) * SEQUENCES;
    try_join_all(prompts.clone().map(|seed| decode(bench, seed, &gaps))).await?;
    print("decode_p95_alone", quantile(gaps.take(), 0.95), "s");
    print("capture_alone", capture(bench).await?, "tokens/s");
    let for_ever = prompts.map(async |seed| -> anyhow::Result<()> {
        loop {
            decode(bench, seed, &gaps).await?;
        }
    });
    let rate = tokio::select! {
        rate = capture(bench) => rate?,
        ended = try_join_all(for_ever) => anyhow::bail!("an answer failed: {ended:?}"),
    };
    print("decode_p95_beside", quantile(gaps.take(), 0.95), "s");
    print("capture_beside", rate, "tokens/s");
    Ok(())
}

/// One answer; adds the seconds between its tokens to `gaps`.
async fn decode(bench: &Bench, seed: u32, gaps: &RefCell<Vec<f64>>) -> anyhow::Result<()> {
    let mut last = None;
    let came = |time: Instant| {
        gaps.borrow_mut().extend(last.replace(time).map(|last| (time - last).as_secs_f64()));
    };
    read(&bench.client, &request(bench.tokens(seed, PROMPT), ANSWER, None), came).await
}

/// Hidden states as fast as they come: tokens per second, from the end of the first micro-batch to that of the last.
async fn capture(bench: &Bench) -> anyhow::Result<f64> {
    let (done, mut came) = unbounded_channel();
    // Dropped at the end, and with it what is still in flight.
    let mut trainers = JoinSet::new();
    for trainer in 0..IN_FLIGHT {
        trainers.spawn(ask(bench.clone(), trainer, done.clone()));
    }
    let mut ends = Vec::new();
    while ends.len() <= BATCHES {
        tokio::select! {
            Some(end) = came.recv() => ends.push(end),
            Some(failed) = trainers.join_next() => failed??,
        }
    }
    let seconds = (ends[BATCHES] - ends[0]).as_secs_f64();
    Ok((BATCHES * BATCH * LENGTH) as f64 / seconds)
}

/// Asks again and again, for other sequences each time, and says when each answer was complete.
async fn ask(bench: Bench, trainer: u32, done: UnboundedSender<Instant>) -> anyhow::Result<()> {
    let taps = Taps::of(TapPreset::Balanced, bench.model.num_hidden_layers);
    for first in (trainer << 16..).step_by(BATCH) {
        let sequences = (first..).take(BATCH).map(|seed| bench.tokens(seed, LENGTH)).collect();
        let mut states = pin!(bench.client.hidden_states(HiddenStatesRequest::new(sequences, taps.clone())));
        while let Some(states) = states.next().await {
            states?;
        }
        done.send(Instant::now())?;
    }
    Ok(())
}
