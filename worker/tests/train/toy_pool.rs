//! A pool over a base of a few hundred numbers, in this process: exchange as it is, arithmetic that needs no model file, and switches for trouble.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use carryon_crds::pool::Dtype;
use carryon_crds::wire::{Identity, Limits, ModelDescription, Numerics, digest};
use carryon_worker::exchange::wire::{
    ErrorBody, ErrorCode, GenerateRequest, HiddenStatesRequest, IDENTITY_HEADER, NUMERICS_HEADER, WireError, row_formats,
};
use carryon_worker::exchange::{LossRequest, SequenceStates};
use carryon_worker::head::loss::{Against, LossWeights, lm_loss};
use carryon_worker::kernel::cpu::{Cpu, Panels};
use carryon_worker::kernel::{Backend as _, Threads};
use carryon_worker::numbers::to_bytes;
use carryon_worker::text::{Tokenizer, Vocabulary};
use tokio::sync::Semaphore;

pub const HIDDEN: usize = 16;
pub const LAYERS: usize = 3;
pub const VOCABULARY: usize = 264;
/// `<|end|>`.
pub const END: u32 = 256;

const TEMPLATE: &str = "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

pub struct ToyPool {
    pub url: String,
    shared: Arc<Shared>,
    // The server ends with its runtime.
    _runtime: tokio::runtime::Runtime,
}

struct Shared {
    description: Mutex<ModelDescription>,
    tokenizer: Vec<u8>,
    forward: Panels,
    cpu: Cpu,
    /// Sequences whose states were asked for.
    asked: AtomicU64,
    /// Requests answered before the next one meets an outage.
    healthy: AtomicU64,
    /// Requests refused in an outage.
    refused: AtomicU64,
    /// Losses are NaN from this request on.
    nan_after: AtomicU64,
    /// Losses that are answered before the others are held, and how many are.
    open: Semaphore,
    held: AtomicU64,
}

impl ToyPool {
    pub fn start() -> Self {
        Self::start_speaking("<|end|>")
    }

    /// One with a tokenizer that has another control token.
    pub fn start_speaking(end: &str) -> Self {
        let tokenizer = tokenizer_with(end).to_json().unwrap();
        let identity = Identity {
            weights: digest(b"toy"),
            tokenizer: digest(&tokenizer),
            chat_template: digest(TEMPLATE.as_bytes()),
            norm_point: "final_norm".to_owned(),
        };
        let description = ModelDescription {
            format_version: 1,
            name: "toy".to_owned(),
            model_type: "toy".to_owned(),
            instance: "first".to_owned(),
            identity,
            numerics: Numerics { dtype: Dtype::Float32, device: "cpu".to_owned(), kernel: "toy".to_owned() },
            hidden_size: HIDDEN as u32,
            num_hidden_layers: LAYERS as u32,
            vocab_size: VOCABULARY as u32,
            eos_token_ids: vec![END],
            bos_token: None,
            eos_token: Some("<|end|>".to_owned()),
            chat_template: Some(TEMPLATE.to_owned()),
            tool_use_template: None,
            limits: Limits {
                max_model_len: 256,
                max_sequences: 3,
                max_request_tokens: 512,
                max_body_bytes: 8192,
                max_num_seqs: None,
                max_head_bytes: None,
            },
        };
        let weight: Vec<f32> = (0..VOCABULARY * HIDDEN).map(|index| 3.0 * noise(index, 7)).collect();
        let shared = Arc::new(Shared {
            description: Mutex::new(description),
            tokenizer,
            forward: Panels::pack(&weight, VOCABULARY, HIDDEN, Dtype::Float32),
            cpu: Cpu::new(Threads::new(1)),
            asked: AtomicU64::new(0),
            healthy: AtomicU64::new(u64::MAX),
            refused: AtomicU64::new(0),
            nan_after: AtomicU64::new(u64::MAX),
            open: Semaphore::new(Semaphore::MAX_PERMITS),
            held: AtomicU64::new(0),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let address: SocketAddr = runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let router = router(shared.clone());
            tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
            address
        });
        Self { url: format!("http://{address}"), shared, _runtime: runtime }
    }

    /// Sequences whose hidden states were asked for so far.
    pub fn asked(&self) -> u64 {
        self.shared.asked.load(Ordering::SeqCst)
    }

    /// After `requests` more, refuses as a restarting pool does, three times; then it is another instance.
    pub fn restart_after(&self, requests: u64) {
        self.shared.healthy.store(requests, Ordering::SeqCst);
        self.shared.refused.store(0, Ordering::SeqCst);
    }

    /// Requests refused in an outage.
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::SeqCst)
    }

    /// Losses are NaN after `requests` more.
    pub fn nan_after(&self, requests: u64) {
        self.shared.nan_after.store(requests, Ordering::SeqCst);
    }

    /// Holds every request for a loss behind the next `requests`, until [`ToyPool::release`].
    pub fn hold_after(&self, requests: usize) {
        self.shared.open.forget_permits(usize::MAX);
        self.shared.open.add_permits(requests);
    }

    /// Whether a trainer waits for a loss: then it does nothing else.
    pub fn holds(&self) -> bool {
        self.shared.held.load(Ordering::SeqCst) > 0
    }

    /// Answers what was held, and all that comes.
    pub fn release(&self) {
        self.shared.open.add_permits(Semaphore::MAX_PERMITS / 2);
    }

    /// Changes what the pool says of itself.
    pub fn describe(&self, change: impl FnOnce(&mut ModelDescription)) {
        change(&mut self.shared.description.lock().unwrap());
    }
}

pub fn tokenizer() -> Tokenizer {
    tokenizer_with("<|end|>")
}

fn tokenizer_with(end: &str) -> Tokenizer {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut tokens: Vec<String> = (0..=255u8).filter(printable).map(|byte| char::from(byte).to_string()).collect();
    tokens.extend((0x100..0x144).filter_map(char::from_u32).map(String::from));
    tokens.push(end.to_owned());
    let mut token_types = vec![1; tokens.len()];
    token_types[END as usize] = 3;
    let vocabulary = Vocabulary { tokens, token_types, pre: Some("smollm".to_owned()), eos: Some(END), ..Vocabulary::default() };
    Tokenizer::from_vocabulary(&vocabulary).unwrap()
}

/// A fixed number between -1 and 1.
fn noise(index: usize, stream: u64) -> f32 {
    let mixed = (index as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31).wrapping_mul(stream * 2 + 0xBF58_476D_1CE4_E5B9);
    ((mixed >> 40) as f32 / (1u64 << 23) as f32) - 1.0
}

/// Layer by layer: each row mixes with the row before it. Row t depends on tokens up to t alone.
fn forward(ids: &[u32]) -> Vec<Vec<f32>> {
    let mut layers = vec![ids.iter().flat_map(|&id| (0..HIDDEN).map(move |d| noise(id as usize * HIDDEN + d, 3))).collect::<Vec<f32>>()];
    for layer in 0..LAYERS {
        let below = &layers[layer];
        let row = |t: usize, d: usize| {
            let before = if t > 0 { below[(t - 1) * HIDDEN + (d + layer + 1) % HIDDEN] } else { 0.0 };
            0.8 * below[t * HIDDEN + d] + 0.6 * before
        };
        layers.push((0..ids.len()).flat_map(|t| (0..HIDDEN).map(move |d| (t, d))).map(|(t, d)| row(t, d)).collect());
    }
    layers
}

/// RMS norm.
fn final_norm(rows: &[f32]) -> Vec<f32> {
    let norm = |row: &[f32]| (row.iter().map(|value| value * value).sum::<f32>() / HIDDEN as f32 + 1e-5).sqrt();
    rows.chunks(HIDDEN).flat_map(|row| row.iter().map(move |value| value / norm(row))).collect()
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/model", get(|State(pool): State<Arc<Shared>>| async move { axum::Json(pool.description.lock().unwrap().clone()) }))
        .route("/v1/tokenizer", get(|State(pool): State<Arc<Shared>>| async move { pool.tokenizer.clone() }))
        .route("/v1/lm-head", get(lm_head))
        .route("/v1/hidden-states", post(hidden_states))
        .route("/v1/loss", post(loss))
        .route(
            "/v1/heads/{digest}",
            put(|Path(_): Path<String>| async { "{}" }).get(|| async { refuse(ErrorCode::HeadMissing, "no such head") }),
        )
        .route("/v1/generate", post(generate))
        .with_state(shared)
}

fn refuse(code: ErrorCode, message: &str) -> Response {
    let status = StatusCode::from_u16(code.status()).unwrap();
    (status, axum::Json(ErrorBody { error: WireError::new(code, message) })).into_response()
}

/// Refusals that every request may meet; the pool's headers otherwise.
fn check(pool: &Shared, headers: &HeaderMap) -> Result<[(&'static str, String); 1], Response> {
    let healthy = pool.healthy.load(Ordering::SeqCst);
    if healthy == 0 {
        if pool.refused.fetch_add(1, Ordering::SeqCst) == 2 {
            pool.healthy.store(u64::MAX, Ordering::SeqCst);
            pool.description.lock().unwrap().instance = "second".to_owned();
        }
        return Err(refuse(ErrorCode::Unavailable, "loading"));
    }
    if healthy != u64::MAX {
        pool.healthy.store(healthy - 1, Ordering::SeqCst);
    }
    let description = pool.description.lock().unwrap();
    match headers.get(IDENTITY_HEADER) {
        Some(wanted) if *wanted != description.identity.digest().as_str() => {
            Err(refuse(ErrorCode::IdentityMismatch, "member `weights` differs"))
        }
        _ => Ok([(NUMERICS_HEADER, description.numerics.key())]),
    }
}

async fn hidden_states(State(pool): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    let request: HiddenStatesRequest = serde_json::from_slice(&body).unwrap();
    let own = match check(&pool, &headers) {
        Ok(own) => own,
        Err(refusal) => return refusal,
    };
    assert!(request.sequences.len() <= 3, "more sequences than the pool accepts");
    pool.asked.fetch_add(request.sequences.len() as u64, Ordering::SeqCst);
    let frames: Vec<u8> = request
        .sequences
        .iter()
        .enumerate()
        .rev()
        .flat_map(|(index, ids)| {
            let layers = forward(ids);
            let mut taps: Vec<Bytes> = request.taps.layers.iter().map(|&layer| to_bytes(&layers[layer as usize], Dtype::Float32)).collect();
            if request.taps.final_norm {
                taps.push(to_bytes(&final_norm(&layers[LAYERS]), Dtype::Float32));
            }
            let formats = row_formats(&request.taps, Dtype::Float32, request.dtype);
            let taps = taps.into_iter().zip(&formats).map(|(rows, format)| format.convert(rows, Dtype::Float32, HIDDEN)).collect();
            SequenceStates { index, tokens: ids.len(), formats, taps }.encode(&request.taps, HIDDEN).concat()
        })
        .collect();
    (own, frames).into_response()
}

async fn loss(State(pool): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    assert!(body.len() <= 8192, "a body of {} bytes", body.len());
    if let Ok(open) = pool.open.try_acquire() {
        open.forget();
    } else {
        pool.held.fetch_add(1, Ordering::SeqCst);
        pool.open.acquire().await.unwrap().forget();
        pool.held.fetch_sub(1, Ordering::SeqCst);
    }
    let own = match check(&pool, &headers) {
        Ok(own) => own,
        Err(refusal) => return refusal,
    };
    let request = LossRequest::decode(body, HIDDEN).unwrap();
    let x: Vec<f32> = request.x.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
    let backward = request.gradient.then(|| pool.cpu.transposed(&pool.forward).unwrap());
    let weights = LossWeights { forward: &pool.forward, backward: backward.as_ref(), dtype: Dtype::Float32, softcap: None };
    let delta: Option<Vec<f32>> =
        request.delta.as_ref().map(|delta| delta.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect());
    let delta = delta.as_deref().map(|delta| (delta, 1.0));
    let against = request.targets.as_deref().map_or(Against::Base, Against::Tokens);
    let mut measured = lm_loss(&pool.cpu, &weights, &x, delta, against).unwrap();
    let left = pool.nan_after.load(Ordering::SeqCst);
    if left == 0 {
        measured.loss[0] = f32::NAN;
    } else if left != u64::MAX {
        pool.nan_after.store(left - 1, Ordering::SeqCst);
    }
    let response = carryon_worker::exchange::LossResponse { loss: measured.loss, gradient: request.gradient.then_some(measured.gradient) };
    (own, response.encode(HIDDEN).concat()).into_response()
}

async fn lm_head(State(pool): State<Arc<Shared>>) -> Response {
    let mut weight = vec![0.0; VOCABULARY * HIDDEN];
    weight.chunks_mut(HIDDEN).enumerate().for_each(|(row, values)| pool.forward.row(row, values));
    let tensor = carryon_worker::exchange::frames::Outgoing {
        name: "weight".to_owned(),
        dtype: safetensors::Dtype::F32,
        shape: vec![VOCABULARY, HIDDEN],
        data: to_bytes(&weight, Dtype::Float32),
    };
    carryon_worker::exchange::frames::encode(&[], vec![tensor]).concat().into_response()
}

async fn generate(body: Bytes) -> Response {
    let request: GenerateRequest = serde_json::from_slice(&body).unwrap();
    let text = if request.head.is_some() { "<with & the head>" } else { "without it" };
    let mut lines: String = tokenizer().encode(text, false).unwrap().iter().map(|id| format!("{{\"token\":{id}}}\n")).collect();
    lines.push_str("{\"finish_reason\":\"stop\",\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1}}\n");
    Body::from(lines).into_response()
}
