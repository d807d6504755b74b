//! Many sequences that are decoded together, each with its tenant's head, and by the base alone.

use std::time::Instant;

use carryon_worker::exchange::wire::GenerateRequest;
use futures::future::try_join_all;

use crate::answers::{request, times};
use crate::{Bench, print};

const TENANTS: u32 = 32;
const PROMPT: usize = 16;
const ANSWER: u32 = 64;

/// 32 tenants with a head each, then the base alone with as many sequences.
pub async fn heads(bench: &Bench, round: u32) -> anyhow::Result<()> {
    let heads = bench.push_heads(TENANTS.into()).await?;
    let prompt = |tenant: usize| bench.tokens(round * TENANTS + tenant as u32, PROMPT);
    let with = heads.iter().enumerate().map(|(tenant, head)| request(prompt(tenant), ANSWER, Some(head))).collect();
    let alone = (0..heads.len()).map(|tenant| request(prompt(tenant), ANSWER, None)).collect();
    print("heads_32", together(bench, with).await?, "tokens/s");
    print("base_32", together(bench, alone).await?, "tokens/s");
    Ok(())
}

async fn together(bench: &Bench, requests: Vec<GenerateRequest>) -> anyhow::Result<f64> {
    let answers = try_join_all(requests.iter().map(|request| times(&bench.client, request))).await?;
    Ok(rate(&answers))
}

/// Tokens per second while all of the answers were being written: without prompts, and without the end when some are through.
fn rate(answers: &[Vec<Instant>]) -> f64 {
    let begin = answers.iter().filter_map(|times| times.first()).max();
    let end = answers.iter().filter_map(|times| times.last()).min();
    let (Some(begin), Some(end)) = (begin, end) else { return f64::NAN };
    let count = answers.iter().flatten().filter(|time| begin < *time && *time <= end).count();
    count as f64 / end.saturating_duration_since(*begin).as_secs_f64()
}
