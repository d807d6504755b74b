//! The pools of a run: the first as its base, description and words, the others beside it.

use std::time::Duration;

use carryon_crds::wire::{BaseReference, Identity, ModelDescription, Numerics};

use crate::exchange::wire::ErrorCode;
use crate::exchange::{ClientError, Endpoint, PoolClient};
use crate::text::{ChatTemplate, Tokenizer};
use crate::train::data::Language;
use crate::train::error::TrainError;

/// How long a pool that does not answer is waited for: it restarts in place, loading included.
const PATIENCE: Duration = Duration::from_secs(600);

/// A pool's base model.
pub struct Base {
    /// Bound to the base's identity and numerics.
    pub client: PoolClient,
    /// What the pool says of it.
    pub description: ModelDescription,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its pods and what each says, those that answered at the start.
    pods: Vec<(Endpoint, ModelDescription)>,
    template: Option<ChatTemplate>,
    /// Those whose hidden states the head reads too: their tokenizers are this one's, their templates are not used.
    pub others: Vec<Self>,
}

impl Base {
    /// Waits for the pool and fetches description and tokenizer, for a job (`NAMESPACE/NAME`).
    ///
    /// # Errors
    /// The pool does not answer in time; tokenizer or template cannot be used.
    pub async fn connect(urls: &[String], job: &str) -> Result<Self, TrainError> {
        let client = PoolClient::connect(urls, PATIENCE).map_err(pool_error)?.asking_for(job);
        let first = client.describe().await.map_err(pool_error)?;
        let mut pods = client.describe_each().await.map_err(pool_error)?;
        pods.retain(|(_, pod)| pod.identity == first.identity);
        let description = most_alike(&pods).cloned().unwrap_or(first);
        let client = bound(client, &description, &pods);
        let tokenizer = client.tokenizer().await.map_err(pool_error)?;
        let found = carryon_crds::wire::digest(&tokenizer);
        if found != description.identity.tokenizer {
            return Err(TrainError::Pool(format!(
                "its tokenizer has digest {found}, its description says {}",
                description.identity.tokenizer
            )));
        }
        let tokenizer = Tokenizer::from_json(&tokenizer).map_err(|error| TrainError::Pool(error.to_string()))?;
        let (bos, eos) = (description.bos_token.as_deref(), description.eos_token.as_deref());
        let template = description
            .chat_template
            .as_ref()
            .map(|template| ChatTemplate::new(template, description.tool_use_template.as_deref(), bos, eos));
        // A pool of today has compiled it before it said that it is ready.
        let template = template.transpose().map_err(|error| TrainError::Configuration(format!("{}: {error}", description.name)))?;
        Ok(Self { client, description, tokenizer, pods, template, others: Vec::new() })
    }

    /// Waits for the further pools behind `urls`, each one or more, with commas between them.
    ///
    /// # Errors
    /// As [`Self::connect`]; a base with another tokenizer.
    pub async fn mixed_with(mut self, urls: &[String], job: &str) -> Result<Self, TrainError> {
        for url in urls {
            let other = Self::connect(std::slice::from_ref(url), job).await?;
            let (first, found) = (&self.description, &other.description);
            if found.identity.tokenizer != first.identity.tokenizer {
                return Err(TrainError::Configuration(format!(
                    "the bases cannot be mixed: {} at {url} has another tokenizer ({}) than {} ({})",
                    found.name, found.identity.tokenizer, first.name, first.identity.tokenizer
                )));
            }
            self.others.push(other);
        }
        // A sample is a sequence of each base.
        let longest = self.all().map(|base| base.description.limits.max_model_len).min();
        self.description.limits.max_model_len = longest.unwrap_or_default();
        Ok(self)
    }

    /// This base and those beside it.
    pub fn all(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(&self.others)
    }

    /// What checkpoints are bound to: the base, and where there are several, all of them under the name of one.
    pub fn identity(&self) -> Identity {
        let mut identity = self.description.identity.clone();
        if !self.others.is_empty() {
            let all: Vec<String> = self.all().map(|base| base.description.identity.digest()).collect();
            identity.weights = carryon_crds::wire::digest(all.join("\n").as_bytes());
        }
        identity
    }

    /// As a head names it.
    pub fn reference(&self) -> BaseReference {
        let Self { description, others, .. } = self;
        let others = others.iter().map(Self::reference).collect();
        BaseReference { name: description.name.clone(), identity: description.identity.clone(), others }
    }

    /// How the further ones compute.
    pub fn other_numerics(&self) -> Vec<Numerics> {
        self.others.iter().map(|base| base.description.numerics.clone()).collect()
    }

    /// Asks only pods that compute with `numerics` from now on; false where there is none.
    pub fn keep_to(&mut self, numerics: &Numerics) -> bool {
        let Some((_, pod)) = self.pods.iter().find(|(_, pod)| pod.numerics == *numerics) else { return false };
        self.client = bound(self.client.clone(), pod, &self.pods);
        let limits = self.description.limits.clone();
        self.description = ModelDescription { limits, ..pod.clone() };
        true
    }

    /// Lets the chat template's clock stand at `time`, milliseconds of Unix time: samples are the same on any day.
    pub fn stand_still(&mut self, time: i64) {
        let now = jiff::Timestamp::from_millisecond(time).unwrap_or_default();
        self.template.iter_mut().for_each(|template| template.stand_still(now));
    }

    /// Its words.
    pub fn language(&self) -> Language<'_> {
        Language { tokenizer: &self.tokenizer, template: self.template.as_ref() }
    }

    /// The end-of-sequence token.
    pub fn eos_token_id(&self) -> Option<u32> {
        let named = self.description.eos_token.as_deref().and_then(|token| self.tokenizer.token_id(token));
        named.or(self.description.eos_token_ids.first().copied())
    }
}

/// Of the largest group of pods that compute alike, the first: a run is bound to how they compute, and has all of them.
fn most_alike(pods: &[(Endpoint, ModelDescription)]) -> Option<&ModelDescription> {
    let pods = || pods.iter().map(|(_, pod)| pod);
    pods().rev().max_by_key(|pod| pods().filter(|other| other.numerics == pod.numerics).count())
}

/// A client that asks only those of `pods` that compute as `description` says.
fn bound(client: PoolClient, description: &ModelDescription, pods: &[(Endpoint, ModelDescription)]) -> PoolClient {
    let client = client.bound_to(&description.identity, Some(&description.numerics));
    pods.iter().for_each(|(endpoint, pod)| client.note(endpoint, &pod.numerics));
    client
}

/// A client's failure, sorted by what can be done about it.
pub fn pool_error(error: ClientError) -> TrainError {
    match error {
        ClientError::Refused { error, .. } if error.code == ErrorCode::IdentityMismatch => {
            TrainError::IdentityChanged { member: error.message }
        }
        ClientError::Refused { ref error, .. } if matches!(error.code, ErrorCode::TooLarge | ErrorCode::InvalidRequest) => {
            TrainError::Configuration(format!("the pool refuses what this job asks for: {error}"))
        }
        ClientError::Address { .. } => TrainError::Configuration(error.to_string()),
        error => TrainError::Pool(error.to_string()),
    }
}
