//! More clients with long prompts than the pool has memory for.

use std::pin::pin;
use std::time::Duration;

use carryon_worker::exchange::wire::{GenerateEvent, GenerateRequest};
use carryon_worker::exchange::{ClientError, PoolClient};
use futures::StreamExt as _;
use futures::future::join_all;

use crate::answers::request;
use crate::{Bench, print};

const CLIENTS: u32 = 64;
const PROMPT: usize = 4096;
/// Long enough that the answers of many prompts are written while later prompts run.
const ANSWER: u32 = 64;
/// How long a client asks again before it gives up; an answer that has begun is read to its end.
const PATIENCE: Duration = Duration::from_secs(90);

enum Outcome {
    Answered,
    /// Refused for now, or not begun in time.
    GaveUp,
    FailedBefore(String),
    FailedAfter(String),
}

/// All at once: how many were answered, gave up, and failed before and after their first byte.
pub async fn clients(bench: &Bench, round: u32) -> anyhow::Result<()> {
    let client = PoolClient::connect(std::slice::from_ref(&bench.url), PATIENCE)?;
    let prompts = (0..CLIENTS).map(|number| request(bench.tokens(round * CLIENTS + number, PROMPT), ANSWER, None));
    let outcomes = join_all(prompts.map(|request| ask(client.clone(), request))).await;
    let [mut answered, mut gave_up, mut failed_before, mut failed_after] = [0.0; 4];
    for outcome in outcomes {
        match outcome {
            Outcome::Answered => answered += 1.0,
            Outcome::GaveUp => gave_up += 1.0,
            Outcome::FailedBefore(reason) => {
                eprintln!("{reason}");
                failed_before += 1.0;
            }
            Outcome::FailedAfter(reason) => {
                eprintln!("after its first byte: {reason}");
                failed_after += 1.0;
            }
        }
    }
    print("answered", answered, "requests");
    print("gave_up", gave_up, "requests");
    print("failed_before_first_byte", failed_before, "requests");
    print("failed_after_first_byte", failed_after, "requests");
    Ok(())
}

async fn ask(client: PoolClient, request: GenerateRequest) -> Outcome {
    let events = match tokio::time::timeout(PATIENCE, client.generate(None, &request)).await {
        Ok(Ok(events)) => events,
        Ok(Err(error @ ClientError::Refused { .. })) if error.is_transient() => return Outcome::GaveUp,
        Ok(Err(error)) => return Outcome::FailedBefore(error.to_string()),
        Err(_) => return Outcome::GaveUp,
    };
    let mut events = pin!(events);
    let mut tokens = 0;
    while let Some(event) = events.next().await {
        match event {
            Ok(GenerateEvent::Token(_)) => tokens += 1,
            Ok(GenerateEvent::Error { error }) => return Outcome::FailedAfter(error.to_string()),
            Err(error) => return Outcome::FailedAfter(error.to_string()),
            Ok(_) => {}
        }
    }
    if tokens == ANSWER { Outcome::Answered } else { Outcome::FailedAfter(format!("an answer of {tokens} tokens, not {ANSWER}")) }
}
