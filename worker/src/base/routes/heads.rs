//! Heads, pushed by gateways.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode};

use super::{Pool, Refusal};
use crate::base::registry::DEFAULT_EXPIRY;
use crate::base::uploads::UploadError;
use crate::exchange::wire::{EXPIRY_HEADER, ErrorCode, HeadStatus};

fn expiry(headers: &HeaderMap) -> Result<Option<Duration>, Refusal> {
    let Some(value) = headers.get(EXPIRY_HEADER) else { return Ok(None) };
    let seconds = value.to_str().ok().and_then(|text| text.parse::<u64>().ok()).filter(|seconds| *seconds > 0);
    let refused = || Refusal::new(ErrorCode::InvalidRequest, format!("{EXPIRY_HEADER} must be a positive number of seconds"));
    seconds.map(|seconds| Some(Duration::from_secs(seconds))).ok_or_else(refused)
}

impl From<UploadError> for Refusal {
    fn from(error: UploadError) -> Self {
        let code = match error {
            UploadError::Body(error) => return error.into(),
            UploadError::TooLarge { .. } => ErrorCode::TooLarge,
            UploadError::Full => ErrorCode::Busy,
            UploadError::Failed(_) => ErrorCode::Internal,
        };
        Self::new(code, error.to_string())
    }
}

/// `PUT /v1/heads/{digest}`: verified and packed, or renewed when it is held already.
pub(super) async fn put(State(pool): State<Arc<Pool>>, Path(digest): Path<String>, request: Request) -> Result<Json<HeadStatus>, Refusal> {
    pool.ready()?;
    let expiry = expiry(request.headers())?.unwrap_or(DEFAULT_EXPIRY);
    let bytes = pool.uploads.read(request).await?;
    if let Ok(status) = pool.ready()?.registry.renew(&digest, Some(expiry), Instant::now()) {
        return Ok(Json(status));
    }
    let pack = {
        let pool = pool.clone();
        move || {
            let ready = pool.ready()?;
            let head = ready.fit.load(&digest, bytes)?;
            Ok::<_, Refusal>(ready.registry.put(head, expiry, Instant::now())?)
        }
    };
    pool.uploads.pack(pack).await?.map(Json)
}

/// `GET /v1/heads/{digest}`: counts as use.
pub(super) async fn get(State(pool): State<Arc<Pool>>, Path(digest): Path<String>) -> Result<Json<HeadStatus>, Refusal> {
    Ok(Json(pool.ready()?.registry.renew(&digest, None, Instant::now())?))
}

/// `DELETE /v1/heads/{digest}`: answers that use it go on.
pub(super) async fn delete(State(pool): State<Arc<Pool>>, Path(digest): Path<String>) -> Result<StatusCode, Refusal> {
    pool.ready()?.registry.delete(&digest, Instant::now())?;
    Ok(StatusCode::NO_CONTENT)
}
