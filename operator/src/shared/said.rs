//! What workers say, made fit to be kept and shown. A pod is its tenant's: it may say what it likes, and as much as it likes.

use carryon_crds::wire::limits::{MAX_FIGURES, MAX_POOLS};
use carryon_crds::wire::{FetchReport, GatewayStatus, Identity, ModelDescription, Progress, TerminationMessage};
use serde::de::DeserializeOwned;

use super::text::{WORDS, bounded};

/// Longest name or phase, in characters.
const NAME: usize = 128;
/// Largest count: an API server takes no larger integers, and exactly these fit a JSON number.
const COUNT: u64 = 1 << 53;
/// Largest measured figure.
const FIGURE: f64 = 1e12;

/// Most API keys of a gateway.
const KEYS: usize = 16;

/// Something that a worker says.
pub trait Said: DeserializeOwned {
    /// It without control characters, overlong texts and figures out of all proportion.
    fn fit(self) -> Self;
}

impl Said for Progress {
    fn fit(self) -> Self {
        let figure = |value: Option<f64>| value.filter(|value| value.abs() <= FIGURE);
        Self {
            phase: bounded(&self.phase, NAME),
            step: self.step.min(COUNT),
            total_steps: self.total_steps.min(COUNT),
            train_loss: figure(self.train_loss),
            eval_loss: figure(self.eval_loss),
            base_eval_loss: figure(self.base_eval_loss),
            general_loss: figure(self.general_loss),
            base_general_loss: figure(self.base_general_loss),
            tokens_per_second: figure(self.tokens_per_second),
            eta_seconds: self.eta_seconds.filter(|seconds| *seconds <= COUNT),
        }
    }
}

impl Said for FetchReport {
    /// Its commit becomes an argument of other pods.
    fn fit(self) -> Self {
        let is_commit = |commit: &String| (1..=64).contains(&commit.len()) && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
        Self {
            state: bounded(&self.state, NAME),
            bytes: self.bytes.min(COUNT),
            total: self.total.min(COUNT),
            eta_seconds: self.eta_seconds.filter(|seconds| *seconds <= COUNT),
            message: bounded(&self.message, WORDS),
            commit: self.commit.filter(is_commit),
            failure: self.failure,
        }
    }
}

impl Said for GatewayStatus {
    fn fit(mut self) -> Self {
        self.api_keys.truncate(KEYS);
        self
    }
}

impl Said for TerminationMessage {
    fn fit(self) -> Self {
        Self {
            message: bounded(&self.message, WORDS),
            digest: self.digest.filter(|digest| is_digest(digest)),
            base_model_digest: self.base_model_digest.filter(|digest| is_digest(digest)),
            other_base_model_digests: self
                .other_base_model_digests
                .into_iter()
                .filter(|digest| is_digest(digest))
                .take(MAX_POOLS)
                .collect(),
            evaluation: self
                .evaluation
                .into_iter()
                .filter(|(name, value)| name.len() <= NAME && value.abs() <= FIGURE)
                .take(MAX_FIGURES)
                .collect(),
            unmet_thresholds: self.unmet_thresholds.iter().take(MAX_FIGURES).map(|unmet| bounded(unmet, NAME)).collect(),
            progress: self.progress.map(Said::fit),
        }
    }
}

impl Said for ModelDescription {
    /// Its template and tokens are for the pool's clients: nothing here reads them.
    fn fit(self) -> Self {
        let Identity { weights, tokenizer, chat_template, norm_point } = self.identity;
        let name = |text: &str| bounded(text, NAME);
        Self {
            name: name(&self.name),
            model_type: name(&self.model_type),
            instance: name(&self.instance),
            identity: Identity {
                weights: name(&weights),
                tokenizer: name(&tokenizer),
                chat_template: name(&chat_template),
                norm_point: name(&norm_point),
            },
            eos_token_ids: Vec::new(),
            bos_token: None,
            eos_token: None,
            chat_template: None,
            tool_use_template: None,
            ..self
        }
    }
}

/// Whether a text may be the digest of something. It becomes the name of a folder.
fn is_digest(text: &str) -> bool {
    let plain = |hex: &str| (1..=64).contains(&hex.len()) && hex.bytes().all(|byte| byte.is_ascii_alphanumeric());
    text.strip_prefix("sha256:").is_some_and(plain)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn progress_is_bounded_in_text_and_number() {
        let said = json!({"phase": format!("\u{1b}[31mtrain\n{}", "g".repeat(1 << 20)), "step": u64::MAX, "total_steps": 20, "train_loss": 1e300,
            "eval_loss": 0.5, "base_eval_loss": -1e13, "tokens_per_second": 1e12, "eta_seconds": u64::MAX});
        let progress = serde_json::from_value::<Progress>(said).unwrap().fit();
        assert!(progress.phase.chars().count() <= NAME && !progress.phase.contains(char::is_control), "{:?}", progress.phase);
        let figures = (progress.train_loss, progress.eval_loss, progress.base_eval_loss, progress.tokens_per_second);
        assert_eq!(figures, (None, Some(0.5), None, Some(1e12)));
        assert_eq!((progress.step, progress.total_steps, progress.eta_seconds), (COUNT, 20, None));
        assert!(i64::try_from(progress.step).is_ok());
    }

    #[test]
    fn a_digest_names_a_folder_and_leads_nowhere_else() {
        let words =
            |digest: &str| serde_json::from_value::<TerminationMessage>(json!({"message": "m\u{0}", "digest": digest})).unwrap().fit();
        assert_eq!(words(&carryon_crds::wire::digest(b"head")).digest, Some(carryon_crds::wire::digest(b"head")));
        for digest in ["sha256:../../other", "sha256:", "md5:00", "", &format!("sha256:{}", "0".repeat(65))] {
            assert_eq!(words(digest).digest, None, "{digest:?}");
        }
    }
}
