//! Web pages that may use this endpoint: cross-origin resource sharing, as the Fetch standard has it. None may, by default.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

/// Seconds for which a browser may keep a preflight's answer.
const MAX_AGE: u32 = 600;
/// Origins that are any.
const ANY: &str = "*";

/// Origins whose pages may ask and read the answers.
#[derive(Clone, Debug)]
pub(super) struct Origins(Vec<String>);

impl Origins {
    /// As the deployment lists them: `*` is every origin. Browsers never write a scheme's own port.
    pub(super) fn new(origins: Vec<String>) -> Self {
        let bare = |origin: String| {
            let own_port = if origin.starts_with("https:") { ":443" } else { ":80" };
            origin.strip_suffix(own_port).map(str::to_owned).unwrap_or(origin)
        };
        Self(origins.into_iter().map(bare).collect())
    }

    fn allow(&self, origin: &HeaderValue) -> bool {
        self.0.iter().any(|allowed| allowed == ANY || allowed.as_bytes().eq_ignore_ascii_case(origin.as_bytes()))
    }

    /// Answers preflights itself, before a key is asked for: browsers send none with them. Every other answer, a refusal too, is shown to pages
    /// of the allowed origins.
    pub(super) async fn share(self, request: Request, next: Next) -> Response {
        let origin = request.headers().get(header::ORIGIN).filter(|origin| self.allow(origin)).cloned();
        let preflight = request.method() == Method::OPTIONS && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
        let mut response = match &origin {
            Some(_) if preflight => permission(request.headers()),
            _ => next.run(request).await,
        };
        let headers = response.headers_mut();
        if !self.0.is_empty() {
            headers.append(header::VARY, HeaderValue::from_name(header::ORIGIN));
        }
        if let Some(origin) = origin {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_name(header::RETRY_AFTER));
        }
        response
    }
}

/// What a page may send: OpenAI's clients add headers of their own, so whichever it asks for.
fn permission(asked: &HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let mut allow = |name: HeaderName, value: HeaderValue| response.headers_mut().insert(name, value);
    allow(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
    allow(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE.into());
    if let Some(headers) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        allow(header::ACCESS_CONTROL_ALLOW_HEADERS, headers.clone());
    }
    response
}
