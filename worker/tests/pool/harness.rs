//! A pool of a tiny random Llama on loopback, heads for it, and what it should answer.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use carryon_crds::common::Taps;
use carryon_crds::job::{HeadSpec, Task};
use carryon_crds::pool::{Device, Dtype, Engine};
use carryon_crds::wire::{BaseConfig, BaseReference, ModelDescription};
use carryon_worker::base::{self, BaseError, Placement};
use carryon_worker::exchange::wire::{GenerateEvent, GenerateRequest};
use carryon_worker::exchange::{ClientError, Endpoint, PoolClient};
use carryon_worker::head::{Artifact, Runner, init};
use carryon_worker::kernel::{Backend as _, Cpu, PageTable};
use futures::StreamExt as _;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::common::engine::{Pages, cpu, head_outputs};
use crate::common::tiny::{Random, Tiny};

/// Small enough that long sequences need several batches.
pub const ENGINE: Engine = Engine {
    device: Device::Cpu,
    kv_cache_memory: None,
    weight_dtype: None,
    max_model_len: 256,
    max_num_seqs: 4,
    max_num_batched_tokens: 32,
    tensor_parallel_size: None,
};

pub struct Pool {
    pub url: String,
    pub client: PoolClient,
    pub description: ModelDescription,
    pub engine: crate::common::engine::Engine<Cpu>,
    pub end: Option<oneshot::Sender<()>>,
    pub server: Option<JoinHandle<Result<(), BaseError>>>,
    _folder: Option<tempfile::TempDir>,
}

/// A checkpoint folder of a tiny model with a tokenizer.
pub fn checkpoint(seed: u64) -> tempfile::TempDir {
    Tiny { seed, ..Tiny::default() }.folder()
}

impl Pool {
    pub async fn tiny(dtype: Dtype, engine: Engine) -> Self {
        let folder = checkpoint(7);
        let pool = Self::start(folder.path(), dtype, engine).await;
        Self { _folder: Some(folder), ..pool }
    }

    pub async fn start(path: &Path, dtype: Dtype, engine: Engine) -> Self {
        Self::placed(path, dtype, engine, Placement::cpu(2)).await
    }

    pub async fn placed(path: &Path, dtype: Dtype, engine: Engine, placement: Placement) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (end, told) = oneshot::channel::<()>();
        let config = BaseConfig { name: "test".to_owned(), dtype, engine, text_only: false };
        let path_of_server: PathBuf = path.to_owned();
        let server =
            tokio::spawn(base::serve(
                listener,
                config,
                path_of_server,
                placement,
                Duration::from_secs(25),
                async move { drop(told.await) },
            ));
        let client = PoolClient::connect(std::slice::from_ref(&url), Duration::from_secs(60)).unwrap();
        let description = client.describe().await.unwrap();
        let engine = crate::common::engine::load(path, dtype, 1);
        Self { url, client, description, engine, end: Some(end), server: Some(server), _folder: None }
    }

    pub async fn endpoint(&self) -> Endpoint {
        self.client.endpoints().await.unwrap().remove(0)
    }

    /// Tap states of a sequence run alone, T × D each.
    pub fn states(&self, tokens: &[u32], taps: &Taps) -> Vec<Vec<f32>> {
        self.engine.states(&[tokens], &mut [PageTable::default()], taps)
    }

    /// Logits of every position, with a head run over the whole sequence at once.
    pub fn logits(&self, tokens: &[u32], head: Option<(&Artifact, f64)>) -> Vec<Vec<f32>> {
        let y = self.rows(tokens, head);
        self.engine.logits(&y).chunks_exact(self.description.vocab_size as usize).map(<[f32]>::to_vec).collect()
    }

    /// What the LM head sees, T × D: final states, and what a head adds to them.
    pub fn rows(&self, tokens: &[u32], head: Option<(&Artifact, f64)>) -> Vec<f32> {
        let x = self.states(tokens, &Taps { layers: vec![], final_norm: true }).remove(0);
        match head {
            Some((artifact, alpha)) => {
                let taps = self.states(tokens, &artifact.shape.taps);
                let taps: Vec<&[f32]> = taps.iter().map(Vec::as_slice).collect();
                let (cpu, dtype) = (cpu(1), self.description.numerics.dtype);
                let runner = Runner::new(artifact, cpu.clone()).unwrap();
                let mut pages = Pages::new(&cpu, runner.page_layout());
                let delta = head_outputs(&mut pages, &taps, &mut [(&runner, tokens.len(), &mut PageTable::default())]);
                let width = x.len() / tokens.len();
                let (mut y, delta) = (cpu.write(&x, width).unwrap(), cpu.write(&delta, width).unwrap());
                let rows: Vec<u32> = (0..tokens.len() as u32).collect();
                cpu.combine(&mut y, &rows, &vec![alpha as f32; tokens.len()], &delta, dtype).unwrap();
                cpu.read(&y).unwrap().into_owned()
            }
            None => x,
        }
    }

    /// The greedy continuation, every token from a forward pass over all before it.
    pub fn greedy(&self, prompt: &[u32], count: usize, head: Option<(&Artifact, f64)>) -> Vec<u32> {
        let mut tokens = prompt.to_vec();
        for _ in 0..count {
            let logits = self.logits(&tokens, head).pop().unwrap();
            let best = (0..logits.len()).rev().max_by(|one, other| logits[*one].total_cmp(&logits[*other])).unwrap();
            tokens.push(best as u32);
        }
        tokens.split_off(prompt.len())
    }

    /// A head for this base whose output is not zero.
    pub fn head(&self, seed: u64, task: Task) -> Artifact {
        self.head_with(seed, task, |value| value)
    }

    pub fn head_with(&self, seed: u64, task: Task, change: impl Fn(f32) -> f32) -> Artifact {
        let labels = (task == Task::Classification).then(|| ["ham", "spam"].map(String::from).to_vec());
        let gate = task == Task::CausalLM;
        let head = HeadSpec { width: 16, blocks: 2, attention_heads: 2, gate, alpha: 0.75, labels, ..HeadSpec::default() };
        let shape = head.shape(task, Taps { layers: vec![1, 2], final_norm: true }, self.description.hidden_size, 24);
        let mut weights = init::weights(&shape, seed);
        let mut random = Random(seed);
        for name in ["output.weight", "classifier.bias"] {
            for value in weights.get_mut(name).into_iter().flat_map(|weight| weight.values.floats_mut()) {
                *value = change(random.unit());
            }
        }
        let base = BaseReference { name: self.description.name.clone(), identity: self.description.identity.clone(), others: Vec::new() };
        Artifact::new(shape, base, weights).unwrap()
    }

    /// Pushes a head to the pool.
    pub async fn push(&self, artifact: &Artifact) {
        self.client.put_head(&self.endpoint().await, &artifact.digest, artifact.to_bytes(), Duration::from_secs(60)).await.unwrap();
    }

    /// Asks and collects all events.
    pub async fn events(&self, request: &GenerateRequest) -> Result<Vec<GenerateEvent>, ClientError> {
        let events: Vec<_> = self.client.generate(None, request).await?.collect().await;
        events.into_iter().collect()
    }

    /// Asks and collects the tokens.
    pub async fn answer(&self, request: &GenerateRequest) -> Vec<u32> {
        tokens_of(&self.events(request).await.unwrap())
    }

    /// Value of a metric, by the beginning of its line.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = reqwest::get(format!("{}/metrics", self.url)).await.unwrap().text().await.unwrap();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Waits until a metric has a value.
    pub async fn wait_for(&self, name: &str, value: f64) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.metric(name).await != value {
            assert!(Instant::now() < deadline, "{name} did not become {value}");
            tokio::task::yield_now().await;
        }
    }
}

pub fn tokens_of(events: &[GenerateEvent]) -> Vec<u32> {
    let token = |event: &GenerateEvent| match event {
        GenerateEvent::Token(token) => Some(token.token),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

pub fn with_head(prompt: Vec<u32>, max_tokens: u32, head: &Artifact) -> GenerateRequest {
    GenerateRequest { head: Some(head.digest.clone()), ..GenerateRequest::greedy(prompt, max_tokens) }
}

pub fn bytes_of(artifact: &Artifact) -> Bytes {
    artifact.to_bytes().into()
}
