//! Reading request bodies within bounds.

use axum::extract::Request;
use serde::de::DeserializeOwned;

use super::{Pool, Refusal};
use crate::exchange::wire::ErrorCode;
use crate::http::Streamed;

/// JSON around the token ids of a request.
const JSON_FRAME_BYTES: usize = 64 * 1024;
/// JSON of one token id at most.
const JSON_TOKEN_BYTES: usize = 16;

/// Reads a JSON body that holds at most `tokens` token ids.
pub(super) async fn json<T: DeserializeOwned>(pool: &Pool, request: Request, tokens: u32) -> Result<T, Refusal> {
    let bytes = pool.bodies.read(request, bound(tokens)).await?;
    serde_json::from_slice(&bytes).map_err(|error| Refusal::new(ErrorCode::InvalidRequest, error.to_string()))
}

/// Reads the line of JSON that a body begins with; it holds at most `tokens` token ids.
pub(super) async fn line<T: DeserializeOwned>(body: &mut Streamed, tokens: u32) -> Result<T, Refusal> {
    let line = body.line(bound(tokens)).await?.unwrap_or_default();
    serde_json::from_slice(&line).map_err(|error| Refusal::new(ErrorCode::InvalidRequest, error.to_string()))
}

fn bound(tokens: u32) -> usize {
    JSON_FRAME_BYTES + JSON_TOKEN_BYTES * tokens as usize
}
