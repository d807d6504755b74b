//! A pool that answers what a test tells it to: one token a byte, and failures on demand.

use std::collections::{BTreeSet, VecDeque};
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Json;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{AppendHeaders, IntoResponse, Response};
use axum::routing::{get, post, put};
use carryon_crds::pool::Dtype;
use carryon_crds::wire::{Identity, Limits, ModelDescription, Numerics, digest};
use carryon_worker::exchange::wire::{
    ClassifyRequest, ClassifyResponse, ErrorBody, ErrorCode, FinishReason, GenerateEvent, GenerateRequest, HeadStatus, SAMPLING_HEADER,
    TokenLogprob, Usage, WireError,
};
use carryon_worker::text::{Tokenizer, Vocabulary};
use futures::StreamExt as _;
use tokio::net::TcpListener;

/// What the pool does with a request to generate.
#[derive(Clone, Debug)]
pub enum Act {
    /// Generates these tokens.
    Say(Vec<u32>),
    /// Generates the prompt's last two tokens and the seed.
    Repeat,
    /// Generates these tokens and loses the connection.
    Break(Vec<u32>),
    /// Generates these tokens, then nothing, for ever.
    Hang(Vec<u32>),
    /// Says that the head is not finite, after these tokens.
    Fail(Vec<u32>),
    /// Refuses before the first byte.
    Refuse(ErrorCode),
}

#[derive(Default)]
pub struct Pool {
    pub heads: Mutex<BTreeSet<String>>,
    /// What to do with the next requests; the last stays.
    pub script: Mutex<VecDeque<Act>>,
    /// Requests to generate that were answered.
    pub asked: Mutex<Vec<GenerateRequest>>,
    /// Whether it says that it has read `sampling`; a pool of the first version does not.
    pub knows_sampling: AtomicBool,
    /// Digests of the heads that were pushed, in order.
    pub pushed: Mutex<Vec<String>>,
    /// Digests of heads that it does not take.
    pub refused: Mutex<BTreeSet<String>>,
    /// Whether it does not answer any more whether it holds a head.
    pub deaf: AtomicBool,
    /// How often it did not answer that.
    pub unheard: AtomicUsize,
    /// Whether it reads heads and never says that it holds them.
    pub stuck: AtomicBool,
    /// Answers that nobody reads any more before they were complete.
    pub abandoned: AtomicUsize,
}

/// One token a byte (id = byte), and the control token `<|end|>` as 256.
pub fn tokenizer() -> Tokenizer {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = (0x100..).filter_map(char::from_u32);
    let letter = |byte: u8| if printable(&byte) { char::from(byte) } else { others.next().unwrap() };
    let mut tokens: Vec<String> = (0..=255u8).map(letter).map(String::from).collect();
    tokens.push("<|end|>".into());
    let mut token_types = vec![1; 257];
    token_types[256] = 3;
    Tokenizer::from_vocabulary(&Vocabulary { tokens, token_types, pre: Some("gpt-2".into()), ..Vocabulary::default() }).unwrap()
}

pub fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

pub fn description() -> ModelDescription {
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}A:{% endif %}";
    let identity = Identity {
        weights: digest(b"weights"),
        tokenizer: digest(&tokenizer().to_json().unwrap()),
        chat_template: digest(template.as_bytes()),
        norm_point: "final_norm".into(),
    };
    ModelDescription {
        format_version: 1,
        name: "scripted".into(),
        model_type: "llama".into(),
        instance: "1".into(),
        identity,
        numerics: Numerics { dtype: Dtype::Float32, device: "cpu".into(), kernel: "none".into() },
        hidden_size: 4,
        num_hidden_layers: 1,
        vocab_size: 257,
        eos_token_ids: vec![256],
        bos_token: None,
        eos_token: Some("<|end|>".into()),
        chat_template: Some(template.into()),
        tool_use_template: None,
        limits: Limits {
            max_model_len: 64,
            max_sequences: 2,
            max_request_tokens: 64,
            max_body_bytes: 1 << 20,
            max_num_seqs: None,
            max_head_bytes: None,
        },
    }
}

impl Pool {
    /// Sets what happens from now on.
    pub fn then(&self, acts: impl IntoIterator<Item = Act>) {
        *self.script.lock().unwrap() = acts.into_iter().collect();
    }

    fn next(&self) -> Act {
        let mut script = self.script.lock().unwrap();
        match script.len() {
            0 => Act::Say(ids("hello")),
            1 => script[0].clone(),
            _ => script.pop_front().unwrap(),
        }
    }

    fn holds(&self, digest: &str) -> Result<(), ErrorCode> {
        match self.heads.lock().unwrap().contains(digest) {
            true => Ok(()),
            false => Err(ErrorCode::HeadMissing),
        }
    }
}

/// Starts the pool; it answers until the test's runtime ends.
pub async fn start() -> (Arc<Pool>, String) {
    let pool = Arc::new(Pool::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let routes = Router::new()
        .route("/v1/model", get(async || Json(description())))
        .route("/v1/tokenizer", get(async || tokenizer().to_json().unwrap()))
        .route("/v1/heads/{digest}", put(put_head).get(get_head))
        .route("/v1/generate", post(generate))
        .route("/v1/classify", post(classify))
        .with_state(pool.clone());
    tokio::spawn(async move { axum::serve(listener, routes).await });
    (pool, url)
}

fn refusal(code: ErrorCode) -> Response {
    let error = WireError::new(code, "as told");
    (StatusCode::from_u16(code.status()).unwrap(), Json(ErrorBody { error })).into_response()
}

async fn put_head(State(pool): State<Arc<Pool>>, Path(name): Path<String>, body: Bytes) -> Response {
    assert_eq!(digest(&body), name);
    pool.pushed.lock().unwrap().push(name.clone());
    if pool.stuck.load(Ordering::SeqCst) {
        return std::future::pending().await;
    }
    if pool.refused.lock().unwrap().contains(&name) {
        return refusal(ErrorCode::HeadInvalid);
    }
    pool.heads.lock().unwrap().insert(name);
    StatusCode::OK.into_response()
}

async fn get_head(State(pool): State<Arc<Pool>>, Path(digest): Path<String>) -> Response {
    if pool.deaf.load(Ordering::SeqCst) {
        pool.unheard.fetch_add(1, Ordering::SeqCst);
        return std::future::pending().await;
    }
    match pool.holds(&digest) {
        Ok(()) => Json(HeadStatus { digest, bytes: 1, expires_in_seconds: 1 }).into_response(),
        Err(code) => refusal(code),
    }
}

/// The first label is as likely as the text is long.
async fn classify(State(pool): State<Arc<Pool>>, Json(request): Json<ClassifyRequest>) -> Response {
    if let Err(code) = pool.holds(&request.head) {
        return refusal(code);
    }
    let scores = request.sequences.iter().map(|ids| vec![ids.len() as f32, 2.0]).collect();
    Json(ClassifyResponse { scores }).into_response()
}

struct Reader {
    pool: Arc<Pool>,
    complete: bool,
}

impl Drop for Reader {
    fn drop(&mut self) {
        if !self.complete {
            self.pool.abandoned.fetch_add(1, Ordering::SeqCst);
        }
    }
}

async fn generate(State(pool): State<Arc<Pool>>, Json(request): Json<GenerateRequest>) -> Response {
    if let Some(Err(code)) = request.head.as_ref().map(|digest| pool.holds(digest)) {
        return refusal(code);
    }
    let act = pool.next();
    let (tokens, end) = match act.clone() {
        Act::Refuse(code) => return refusal(code),
        Act::Repeat => {
            let last = &request.prompt[request.prompt.len().saturating_sub(2)..];
            let tokens = [last, &ids(&request.seed.map_or("?".into(), |seed| seed.to_string()))].concat();
            (tokens.clone(), Act::Say(tokens))
        }
        Act::Say(tokens) | Act::Break(tokens) | Act::Hang(tokens) | Act::Fail(tokens) => (tokens, act),
    };
    let scored = |id: u32| TokenLogprob { token: id, logprob: request.logprobs.map(|_| -0.5), top: Vec::new() };
    let mut events: Vec<GenerateEvent> = Vec::new();
    if request.prompt_logprobs.is_some() {
        let first = [None].into_iter();
        let prompt_logprobs =
            first.chain(request.prompt[1..].iter().map(|id| Some(TokenLogprob { logprob: Some(-0.25), ..scored(*id) }))).collect();
        events.push(GenerateEvent::Prompt { prompt_logprobs });
    }
    let said: Vec<u32> = tokens.into_iter().take(request.max_tokens as usize).collect();
    let usage = Usage { prompt_tokens: request.prompt.len() as u32, completion_tokens: said.len() as u32 };
    let finish_reason = if said.len() == request.max_tokens as usize { FinishReason::Length } else { FinishReason::Stop };
    events.extend(said.into_iter().map(|id| GenerateEvent::Token(scored(id))));
    match end {
        Act::Say(_) => events.push(GenerateEvent::Finish { finish_reason, usage }),
        Act::Fail(_) => events.push(GenerateEvent::Error { error: WireError::new(ErrorCode::HeadNotFinite, "as told") }),
        _ => {}
    }
    let hangs = matches!(end, Act::Hang(_));
    let knows_sampling = pool.knows_sampling.load(Ordering::SeqCst);
    pool.asked.lock().unwrap().push(request);
    let reader = Reader { pool, complete: false };
    let lines = futures::stream::iter(events).map(|event| Ok::<_, Infallible>(Bytes::from(serde_json::to_string(&event).unwrap() + "\n")));
    let end = async move {
        let mut reader = reader;
        if hangs {
            std::future::pending::<()>().await;
        }
        reader.complete = true;
        None
    };
    let body = lines.chain(futures::stream::once(end).filter_map(async |nothing| nothing));
    let said = if knows_sampling { Some((SAMPLING_HEADER, "1")) } else { None };
    (AppendHeaders(said), Body::from_stream(body)).into_response()
}
