//! A hub as its clients see it: descriptions and addresses at one origin, the bytes of large files at another one. It fails as it is told to.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use futures::StreamExt as _;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const TOKEN: &str = "hf_secret";
/// Bytes that are sent at once.
const PIECE: u64 = 64 << 10;

/// What happens to one request for a file's bytes.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// This answer, with its `Retry-After`.
    Status(u16, Option<&'static str>),
    /// The connection breaks at this byte of the file.
    Break(u64),
    /// Nothing comes after this byte of the file.
    Pause(u64),
}

#[derive(Clone)]
pub struct File {
    pub content: Bytes,
    /// Large files are elsewhere, and have a digest.
    pub large: bool,
    /// What the hub says instead of the content's digest.
    pub promised: Option<String>,
    /// What the hub says instead of the content's length.
    pub size: Option<u64>,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub authorization: Option<String>,
    /// Bytes of the answer that were sent.
    pub sent: u64,
}

#[derive(Default)]
pub struct Hub {
    pub files: Mutex<BTreeMap<String, File>>,
    pub commit: Mutex<String>,
    pub guarded: Mutex<bool>,
    faults: Mutex<HashMap<String, VecDeque<Fault>>>,
    seen: Mutex<Vec<Seen>>,
    elsewhere: Mutex<String>,
}

pub struct Server {
    pub hub: Arc<Hub>,
    pub url: String,
}

/// Bytes without a pattern, the same for the same seed.
pub fn content(seed: u64, length: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Server {
    /// Holds `files`; those that end with .safetensors or .gguf are large.
    pub async fn start(files: &[(&str, Bytes)]) -> Self {
        let hub = Arc::new(Hub::default());
        *hub.commit.lock().unwrap() = COMMIT.to_owned();
        files.iter().for_each(|(name, content)| hub.put(name, content.clone()));
        let elsewhere = listen(Router::new().route("/cdn/{*file}", get(large)).with_state(hub.clone())).await;
        *hub.elsewhere.lock().unwrap() = format!("http://{elsewhere}");
        let router = Router::new()
            .route("/api/models/o/n/revision/{revision}", get(describe))
            .route("/o/n/resolve/{commit}/{*file}", get(resolve))
            .route("/web/{*file}", get(plain));
        let url = format!("http://{}", listen(router.with_state(hub.clone())).await);
        Self { hub, url }
    }
}

async fn listen(router: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address
}

impl Hub {
    pub fn put(&self, name: &str, content: Bytes) {
        let large = name.ends_with(".safetensors") || name.ends_with(".gguf");
        self.files.lock().unwrap().insert(name.to_owned(), File { content, large, promised: None, size: None });
    }

    pub fn change(&self, name: &str, change: impl FnOnce(&mut File)) {
        change(self.files.lock().unwrap().get_mut(name).unwrap());
    }

    pub fn faults(&self, name: &str, faults: impl IntoIterator<Item = Fault>) {
        self.faults.lock().unwrap().entry(name.to_owned()).or_default().extend(faults);
    }

    /// What was asked since the last call.
    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.seen.lock().unwrap())
    }

    /// Bytes of the file `name` that were sent, in all requests since [`Hub::take_seen`].
    pub fn sent(&self, name: &str) -> u64 {
        self.seen.lock().unwrap().iter().filter(|seen| seen.path.ends_with(name)).map(|seen| seen.sent).sum()
    }

    /// Index of the request among those seen.
    fn saw(&self, path: String, headers: &HeaderMap) -> usize {
        let authorization = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let mut seen = self.seen.lock().unwrap();
        seen.push(Seen { path, authorization, sent: 0 });
        seen.len() - 1
    }

    fn refuses(&self, headers: &HeaderMap) -> Option<Response> {
        let known = headers.get(header::AUTHORIZATION).is_some_and(|value| value.as_bytes() == format!("Bearer {TOKEN}").as_bytes());
        let refused = *self.guarded.lock().unwrap() && !known;
        refused.then(|| (StatusCode::UNAUTHORIZED, [("x-error-code", "GatedRepo")], "no").into_response())
    }
}

async fn describe(State(hub): State<Arc<Hub>>, Path(revision): Path<String>, headers: HeaderMap) -> Response {
    hub.saw(format!("/api/{revision}"), &headers);
    if let Some(refusal) = hub.refuses(&headers) {
        return refusal;
    }
    let now = hub.commit.lock().unwrap().clone();
    // A commit stays what it was.
    let sha = if revision.len() == COMMIT.len() { revision } else { now };
    let siblings: Vec<_> = hub.files.lock().unwrap().keys().map(|name| json!({"rfilename": name})).collect();
    axum::Json(json!({"id": "o/n", "sha": sha, "siblings": siblings})).into_response()
}

async fn resolve(
    State(hub): State<Arc<Hub>>,
    Path((commit, name)): Path<(String, String)>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    if let Some(refusal) = hub.refuses(&headers) {
        hub.saw(format!("/resolve/{commit}/{name}"), &headers);
        return refusal;
    }
    let file = hub.files.lock().unwrap().get(&name).cloned();
    let Some(file) = file.filter(|file| !file.content.is_empty()) else { return StatusCode::NOT_FOUND.into_response() };
    if !file.large {
        return send(&hub, &name, &file, &method, &headers, &format!("/resolve/{commit}"));
    }
    hub.saw(format!("/resolve/{commit}/{name}"), &headers);
    let etag = format!("\"{}\"", file.promised.clone().unwrap_or_else(|| sha256(&file.content)));
    let size = file.size.unwrap_or(file.content.len() as u64).to_string();
    let place = format!("{}/cdn/{name}?signature=x", hub.elsewhere.lock().unwrap());
    let described = [("x-linked-etag", etag), ("x-linked-size", size), ("x-repo-commit", commit), ("location", place)];
    (StatusCode::FOUND, described).into_response()
}

async fn large(State(hub): State<Arc<Hub>>, Path(name): Path<String>, method: Method, headers: HeaderMap) -> Response {
    let file = hub.files.lock().unwrap()[&name].clone();
    send(&hub, &name, &file, &method, &headers, "/cdn")
}

async fn plain(State(hub): State<Arc<Hub>>, Path(name): Path<String>, method: Method, headers: HeaderMap) -> Response {
    let file = hub.files.lock().unwrap().get(&name).cloned();
    file.map_or_else(|| StatusCode::NOT_FOUND.into_response(), |file| send(&hub, &name, &file, &method, &headers, "/web"))
}

fn send(hub: &Arc<Hub>, name: &str, file: &File, method: &Method, headers: &HeaderMap, at: &str) -> Response {
    let request = hub.saw(format!("{at}/{name}"), headers);
    let size = file.content.len() as u64;
    // The first byte alone is what asks for a description.
    let range = headers.get(header::RANGE).and_then(|value| value.to_str().ok()?.strip_prefix("bytes=")?.split_once('-'));
    let range = range.map(|(first, last)| (first.parse::<u64>().unwrap(), last.parse::<u64>().unwrap().min(size - 1)));
    let bytes_wanted = method == Method::GET && range != Some((0, 0));
    let fault = if bytes_wanted { hub.faults.lock().unwrap().get_mut(name).and_then(VecDeque::pop_front) } else { None };
    if let Some(Fault::Status(status, after)) = fault {
        let mut response = StatusCode::from_u16(status).unwrap().into_response();
        if let Some(after) = after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(after));
        }
        return response;
    }
    let (first, last) = range.unwrap_or((0, size - 1));
    let (stop, breaks) = match fault {
        Some(Fault::Break(at)) => (at, true),
        Some(Fault::Pause(at)) => (at, false),
        _ => (u64::MAX, false),
    };
    let (content, hub, counted) = (file.content.clone(), hub.clone(), method == Method::GET);
    let mut at = first;
    let pieces = std::iter::from_fn(move || {
        let end = (at + PIECE).min(last + 1).min(stop.max(first));
        let piece = content.slice(at as usize..end as usize);
        (end > at).then(|| {
            at = end;
            if let Some(seen) = hub.seen.lock().unwrap().get_mut(request).filter(|_| counted) {
                seen.sent += piece.len() as u64;
            }
            Ok::<_, std::io::Error>(piece)
        })
    });
    let end = async move {
        if stop > last {
            return None;
        }
        if !breaks {
            std::future::pending::<Infallible>().await;
        }
        Some(Err::<Bytes, _>(std::io::Error::other("broken on purpose")))
    };
    let ends = futures::stream::once(end).filter_map(std::future::ready);
    let mut response = Response::new(Body::from_stream(futures::stream::iter(pieces).chain(ends)));
    let fields = response.headers_mut();
    let etag = sha256(&file.content)[..40].to_owned();
    fields.insert(header::ETAG, format!("\"{etag}\"").parse().unwrap());
    fields.insert(header::CONTENT_LENGTH, (last + 1 - first).into());
    if range.is_some() {
        fields.insert(header::CONTENT_RANGE, format!("bytes {first}-{last}/{size}").parse().unwrap());
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    response
}
