//! Reading request bodies within bounds.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::CONTENT_LENGTH;
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use serde::de::DeserializeOwned;

use super::Refusal;
use crate::exchange::wire::ErrorCode;

/// Longest time a body may take to come.
const BODY_TIMEOUT: Duration = Duration::from_secs(120);
/// JSON around the token ids of a request.
const JSON_FRAME_BYTES: usize = 64 * 1024;
/// JSON of one token id at most.
const JSON_TOKEN_BYTES: usize = 16;

/// Reads a whole body of at most `bound` bytes.
pub(super) async fn read(request: Request, bound: usize) -> Result<Bytes, Refusal> {
    let announced = request.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > bound) {
        return Err(too_large(bound));
    }
    let late = |_| Refusal::new(ErrorCode::InvalidRequest, format!("the body did not come within {BODY_TIMEOUT:?}"));
    tokio::time::timeout(BODY_TIMEOUT, collect(request.into_body(), announced.unwrap_or(0), bound)).await.map_err(late)?
}

async fn collect(body: Body, announced: usize, bound: usize) -> Result<Bytes, Refusal> {
    let mut pieces = body.into_data_stream();
    let mut collected = BytesMut::with_capacity(announced);
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| Refusal::new(ErrorCode::InvalidRequest, format!("the body broke off: {error}")))?;
        if collected.len() + piece.len() > bound {
            return Err(too_large(bound));
        }
        collected.extend_from_slice(&piece);
    }
    Ok(collected.freeze())
}

/// Reads a JSON body that holds at most `tokens` token ids.
pub(super) async fn json<T: DeserializeOwned>(request: Request, tokens: u32) -> Result<T, Refusal> {
    let bytes = read(request, JSON_FRAME_BYTES + JSON_TOKEN_BYTES * tokens as usize).await?;
    serde_json::from_slice(&bytes).map_err(|error| Refusal::new(ErrorCode::InvalidRequest, error.to_string()))
}

fn too_large(bound: usize) -> Refusal {
    Refusal::new(ErrorCode::TooLarge, format!("the body exceeds {bound} bytes"))
}
