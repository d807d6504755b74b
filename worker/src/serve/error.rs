//! What a client is told when it gets no answer: OpenAI's error bodies.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::exchange::ClientError;
use crate::exchange::wire::{ErrorCode, WireError};
use crate::http::BodyError;
use crate::text::TextError;

/// Seconds after which a client may ask a full or absent pool again.
const RETRY_AFTER: u32 = 1;

/// A refusal or failure.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    parameter: Option<String>,
    message: String,
}

impl ApiError {
    /// 400: `parameter` is wrong, unknown or unsupported.
    pub(super) fn parameter(parameter: impl Into<String>, message: impl Into<String>) -> Self {
        let parameter = Some(parameter.into());
        Self { status: StatusCode::BAD_REQUEST, kind: "invalid_request_error", code: None, parameter, message: message.into() }
    }

    /// 400: the request as a whole is wrong.
    pub(super) fn request(message: impl Into<String>) -> Self {
        Self { parameter: None, ..Self::parameter("", message) }
    }

    /// 400: the prompt fills the model's context, or more.
    pub(super) fn context_length(parameter: &str, tokens: usize, limit: u32) -> Self {
        let message = format!("This model's maximum context length is {limit} tokens. However, your prompt has {tokens} tokens.");
        Self { code: Some("context_length_exceeded"), ..Self::parameter(parameter, message) }
    }

    /// 404: no such model.
    pub(super) fn model<'a>(name: &str, served: impl Iterator<Item = &'a str>) -> Self {
        let message = format!("The model {name:?} does not exist; this endpoint serves {}.", served.collect::<Vec<_>>().join(", "));
        Self { status: StatusCode::NOT_FOUND, code: Some("model_not_found"), ..Self::parameter("model", message) }
    }

    /// 401.
    pub(super) fn unauthorized() -> Self {
        let message = "Incorrect API key: send it as \"Authorization: Bearer KEY\".";
        Self { status: StatusCode::UNAUTHORIZED, code: Some("invalid_api_key"), ..Self::request(message) }
    }

    /// 404 or 405: no such route.
    pub(super) fn route(status: StatusCode, method: &str, path: &str) -> Self {
        Self { status, code: Some("unknown_url"), ..Self::request(format!("Invalid URL ({method} {path})")) }
    }

    /// 500: our own fault.
    pub(super) fn internal(message: &str) -> Self {
        Self::server(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// 503: no pool answers.
    pub(super) fn unavailable(message: &str) -> Self {
        Self::server(StatusCode::SERVICE_UNAVAILABLE, "pool_unavailable", message)
    }

    /// 429.
    fn busy(message: &str) -> Self {
        Self { kind: "rate_limit_error", ..Self::server(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", message) }
    }

    fn server(status: StatusCode, code: &'static str, message: &str) -> Self {
        Self { status, kind: "server_error", code: Some(code), parameter: None, message: message.to_owned() }
    }

    /// The body: `{"error": {"message", "type", "param", "code"}}`.
    pub(super) fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.parameter, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let told = match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => (header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER)),
            StatusCode::UNAUTHORIZED => (header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")),
            StatusCode::UNSUPPORTED_MEDIA_TYPE => (header::ACCEPT_ENCODING, HeaderValue::from_static("identity")),
            _ => return response,
        };
        response.headers_mut().extend([told]);
        response
    }
}

impl From<BodyError> for ApiError {
    fn from(error: BodyError) -> Self {
        let refused = |status| Self { status, ..Self::request(sentence(&error)) };
        match error {
            BodyError::TooLarge(_) => refused(StatusCode::PAYLOAD_TOO_LARGE),
            BodyError::Late => refused(StatusCode::REQUEST_TIMEOUT),
            BodyError::Encoded(_) => refused(StatusCode::UNSUPPORTED_MEDIA_TYPE),
            BodyError::Broken(_) => refused(StatusCode::BAD_REQUEST),
            BodyError::Busy => Self::busy(&sentence(&error)),
        }
    }
}

/// An error's text as a sentence of its own.
fn sentence(error: &impl ToString) -> String {
    let mut text = error.to_string() + ".";
    text[..1].make_ascii_uppercase();
    text
}

/// The pool's own words, where they speak of the request; else a sentence without its addresses, which go to the log.
impl From<WireError> for ApiError {
    fn from(error: WireError) -> Self {
        match error.code {
            ErrorCode::InvalidRequest => Self::request(error.message),
            ErrorCode::TooLarge => Self { code: Some("context_length_exceeded"), ..Self::request(error.message) },
            ErrorCode::Busy => Self::busy("The pool's queue is full; try again later."),
            ErrorCode::HeadNotFinite => {
                Self::server(StatusCode::INTERNAL_SERVER_ERROR, "head_not_finite", "The head computed something that is not a number.")
            }
            ErrorCode::IdentityMismatch => Self::unavailable("The pool runs another base model than the head was trained on."),
            ErrorCode::Unavailable | ErrorCode::HeadMissing | ErrorCode::Late => {
                Self::unavailable("The pool is not ready; try again later.")
            }
            ErrorCode::NotFound | ErrorCode::HeadInvalid | ErrorCode::Internal | ErrorCode::Unknown => {
                Self::server(StatusCode::BAD_GATEWAY, "pool_error", "The pool failed to answer.")
            }
        }
    }
}

impl From<ClientError> for ApiError {
    fn from(error: ClientError) -> Self {
        tracing::warn!("{error}");
        match error {
            ClientError::Refused { error, .. } if error.code != ErrorCode::Unknown => error.into(),
            error if error.is_transient() => Self::unavailable("The pool does not answer; try again later."),
            ClientError::Outdated { member, .. } => {
                Self::parameter(member, format!("The pool is of an earlier version, which does not support {member}: leave it out."))
            }
            ClientError::HeadMissing { message, .. } => WireError::new(ErrorCode::HeadMissing, message).into(),
            error => WireError::new(ErrorCode::Internal, error.to_string()).into(),
        }
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        match error {
            TextError::Render(_) => Self::parameter("messages", error.to_string()),
            _ => Self::request(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_shape_of_openai() {
        let error = ApiError::parameter("top_p", "must be a number");
        assert_eq!(
            error.body(),
            json!({"error": {"message": "must be a number", "type": "invalid_request_error", "param": "top_p", "code": null}})
        );
        assert_eq!(error.into_response().status(), 400);
        let error = ApiError::context_length("messages", 9000, 8192);
        assert_eq!(error.body()["error"]["code"], "context_length_exceeded");
    }

    #[test]
    fn a_busy_pool_is_429_and_an_absent_one_503_with_retry_after() {
        for (code, status) in [(ErrorCode::Busy, 429), (ErrorCode::Unavailable, 503), (ErrorCode::IdentityMismatch, 503)] {
            let response = ApiError::from(WireError::new(code, "x")).into_response();
            assert_eq!(response.status(), status);
            assert_eq!(response.headers()["retry-after"], "1");
        }
        let response = ApiError::from(WireError::new(ErrorCode::HeadNotFinite, "x")).into_response();
        assert_eq!((response.status().as_u16(), response.headers().get("retry-after")), (500, None));
    }
}
