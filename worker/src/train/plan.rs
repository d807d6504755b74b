//! From a configuration and a base to a run that can be started: every check that needs no arithmetic. Pure, files apart.

use std::path::Path;

use carryon_crds::common::Taps;
use carryon_crds::job::{DataFormat, Metric, Overlong, Task, Training};
use carryon_crds::wire::{HeadShape, ModelDescription, OtherBase, OtherPool, TapChoice, TrainConfig};

use crate::head::{artifact, parameters};
use crate::train::batches::Order;
use crate::train::data::{self, DataSet, Files, Part, Rules};
use crate::train::error::TrainError;
use crate::train::stop::Stop;

/// Largest configuration file, bytes.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// The files of a run and what names it.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// The configuration.
    pub config: TrainConfig,
    /// Training samples.
    pub train: Files,
    /// Held-out samples.
    pub evaluation: Option<Files>,
    /// Samples that have nothing to do with what is learned, to measure on.
    pub general: Option<Files>,
    /// Such samples, to be left as the base has them.
    pub replay: Option<Files>,
    /// Digest of the configuration (its checkpoints apart) and all splits: what a checkpoint and a finished head belong to.
    pub run: String,
}

impl Inputs {
    /// The same, trained otherwise: with one of several seeds.
    #[must_use]
    pub fn with(&self, training: Training) -> Self {
        Self { config: TrainConfig { training, ..self.config.clone() }, ..self.clone() }
    }

    /// Reads the configuration and the digests of the data.
    ///
    /// # Errors
    /// A configuration that cannot be read or is wrong; data that are missing; the wish to stop.
    pub fn read(config: &Path, folder: &Path, stop: &Stop) -> Result<Self, TrainError> {
        let unusable = |reason: String| TrainError::Configuration(format!("configuration {config:?}: {reason}"));
        let length = std::fs::metadata(config).map_err(|error| unusable(error.to_string()))?.len();
        if length > MAX_CONFIG_BYTES {
            return Err(unusable(format!("has {length} bytes, more than {MAX_CONFIG_BYTES}")));
        }
        let text = std::fs::read(config).map_err(|error| unusable(error.to_string()))?;
        let config: TrainConfig = serde_json::from_slice(&text).map_err(|error| unusable(error.to_string()))?;
        let train = Files::find(folder, &config.split.train, Part::Train, stop)?;
        let find = |names: &[String], part| (!names.is_empty()).then(|| Files::find(folder, names, part, stop)).transpose();
        let evaluation = find(&config.split.evaluation, Part::Evaluation)?;
        let (general, replay) = (find(&config.split.general, Part::Evaluation)?, find(&config.split.replay, Part::Train)?);
        let digests = [&evaluation, &general, &replay].map(|files| files.as_ref().map(|files| files.digest.as_str()));
        let run = digest(&config, &train.digest, digests);
        Ok(Self { config, train, evaluation, general, replay, run })
    }
}

/// What changes nothing in the head (how often it is saved) is left out.
fn digest(config: &TrainConfig, train: &str, [evaluation, general, replay]: [Option<&str>; 3]) -> String {
    let config = TrainConfig { checkpoint: Default::default(), ..config.clone() };
    let mut whole = serde_json::json!({ "config": config, "train": train, "evaluation": evaluation });
    // Runs from before they were there have no such members.
    for (name, files) in [("general", general), ("replay", replay)] {
        if let Some(digest) = files {
            whole[name] = digest.into();
        }
    }
    carryon_crds::wire::digest(whole.to_string().as_bytes())
}

/// Taps of the head, ascending, all in the base.
///
/// # Errors
/// A layer the base does not have.
pub fn taps(choice: Option<&TapChoice>, base: &ModelDescription) -> Result<Taps, TrainError> {
    let layers = base.num_hidden_layers;
    let taps = TapChoice::taps(choice, layers);
    match taps.layers.iter().find(|&&layer| layer > layers) {
        Some(layer) => Err(TrainError::Configuration(format!("taps.layers: {layer} is beyond layer {layers}, the last of {}", base.name))),
        None => Ok(taps),
    }
}

/// How the data become samples; `eos` is the base's end-of-sequence token.
///
/// # Errors
/// A format, length or label list that does not fit task and base.
pub fn rules<'a>(config: &'a TrainConfig, base: &'a ModelDescription, eos: Option<u32>) -> Result<Rules<'a>, TrainError> {
    let refuse = |reason: String| Err(TrainError::Configuration(reason));
    if let Err(problem) = data::check_task(config.format, config.task) {
        return refuse(format!("data.format {:?}: {problem}", config.format));
    }
    if config.max_length > base.limits.max_model_len {
        return refuse(format!(
            "data.maxLength {} is beyond {}, the longest sequence of the pool",
            config.max_length, base.limits.max_model_len
        ));
    }
    if matches!(config.format, DataFormat::Chat | DataFormat::PromptCompletion) && base.chat_template.is_none() {
        return refuse(format!("data.format {:?} needs a chat template, {} has none", config.format, base.name));
    }
    if config.add_eos_token && eos.is_none() {
        return refuse(format!("data.addEosToken: {} has no end-of-sequence token", base.name));
    }
    let training = &config.training;
    if training.per_device_train_batch_size == 0 || training.gradient_accumulation_steps == 0 || config.checkpoint.save_steps == 0 {
        return refuse(
            "training.perDeviceTrainBatchSize, training.gradientAccumulationSteps and checkpoint.saveSteps must be at least 1".to_owned(),
        );
    }
    if config.task.has_labels() && config.head.labels.as_ref().is_none_or(|labels| labels.len() < 2) {
        return refuse(format!("head.labels: task {:?} needs at least two", config.task));
    }
    if config.task == Task::Embedding && training.per_device_train_batch_size < 2 {
        return refuse("training.perDeviceTrainBatchSize: task Embedding needs 2 or more".to_owned());
    }
    if training.temperature.is_some_and(|temperature| config.task != Task::Embedding || !(0.001..=10.0).contains(&temperature)) {
        return refuse("training.temperature is for task Embedding, from 0.001 to 10".to_owned());
    }
    if config.task.is_pooled() && !(config.split.general.is_empty() && config.split.replay.is_empty()) {
        return refuse(format!("data.split.general and replay are for tasks CausalLM and DPO; the task is {:?}", config.task));
    }
    if training.kl_coef.is_some_and(|factor| !(0.0..=1000.0).contains(&factor)) || training.replay_batch_size == Some(0) {
        return refuse("training.klCoef is from 0 to 1000, training.replayBatchSize 1 or more".to_owned());
    }
    if training.beta.is_some_and(|beta| config.task != Task::Dpo || !(0.001..=10.0).contains(&beta)) {
        return refuse("training.beta is for task DPO, from 0.001 to 10".to_owned());
    }
    if training.class_weights.is_some() && !config.task.has_labels() {
        return refuse(format!("training.classWeights: task {:?} has no labels", config.task));
    }
    let smoothing = training.label_smoothing_factor;
    if smoothing != 0.0 && (config.task != Task::Classification || !(0.0..=0.9).contains(&smoothing)) {
        return refuse("training.labelSmoothingFactor is for task Classification, from 0 to 0.9".to_owned());
    }
    if !(0.0..=0.9).contains(&training.dropout) {
        return refuse(format!("training.dropout: {} is not from 0 to 0.9", training.dropout));
    }
    if training.ema_decay.is_some_and(|decay| !(decay > 0.0 && decay < 1.0)) {
        return refuse("training.emaDecay is above 0 and below 1".to_owned());
    }
    if training.seeds.is_some() && config.split.evaluation.is_empty() {
        return refuse("training.seeds are compared on held-out samples: name data.split.evaluation".to_owned());
    }
    if training.seeds.as_ref().is_some_and(|seeds| !(2..=16).contains(&seeds.count)) {
        return refuse("training.seeds.count is from 2 to 16".to_owned());
    }
    let metric = config.evaluation.metric;
    // Answers are asked for once, when the head is chosen.
    if !metric.fits(config.task) || metric == Metric::ExactMatch {
        return refuse(format!("evaluation.metric {metric:?}: task {:?} has no such figure", config.task));
    }
    let alphas = &config.evaluation.alphas;
    if !alphas.is_empty() && (config.task.is_pooled() || config.split.evaluation.is_empty()) {
        return refuse("evaluation.alphas are for tasks CausalLM and DPO, and need data.split.evaluation".to_owned());
    }
    if let Some(alpha) = alphas.iter().find(|alpha| !(0.01..=100.0).contains(*alpha)) {
        return refuse(format!("evaluation.alphas: {alpha} is not from 0.01 to 100"));
    }
    if config.evaluation.generation.is_some() && config.task != Task::CausalLM {
        return refuse("evaluation.generation is for task CausalLM".to_owned());
    }
    if let Some(bound) = config.evaluation.thresholds.iter().find(|bound| !bound.metric.fits(config.task)) {
        return refuse(format!("evaluation.thresholds: task {:?} has no figure {:?}", config.task, bound.metric));
    }
    Ok(Rules {
        task: config.task,
        format: config.format,
        max_length: config.max_length as usize,
        overlong: config.overlong,
        on_error: config.on_error,
        targets: config.targets,
        thinking: config.thinking,
        split_special_tokens: config.split_special_tokens,
        text_end: eos.filter(|_| config.add_eos_token),
        vocab_size: base.vocab_size,
        end_tokens: &base.eos_token_ids,
        labels: config.head.labels.as_deref().unwrap_or_default(),
    })
}

/// What the head reads of the further bases.
///
/// # Errors
/// A layer that one does not have.
pub fn others<'a>(config: &TrainConfig, bases: impl Iterator<Item = &'a ModelDescription>) -> Result<Vec<OtherBase>, TrainError> {
    let of = |(pool, base): (&OtherPool, &ModelDescription)| {
        Ok(OtherBase { taps: taps(pool.taps.as_ref(), base)?, hidden_size: base.hidden_size })
    };
    config.other_pools.iter().zip(bases).map(of).collect()
}

/// The head's shape: of its taps in the first base, `base`, and in the others. Its window is the longest training sample when none is asked for.
///
/// # Errors
/// A member out of bounds.
pub fn shape(
    config: &TrainConfig,
    base: &ModelDescription,
    (taps, others): (Taps, Vec<OtherBase>),
    longest: u64,
) -> Result<HeadShape, TrainError> {
    let head = &config.head;
    let shape = HeadShape {
        max_length: (config.task.is_pooled() && config.overlong == Overlong::Truncate).then_some(config.max_length),
        split_special_tokens: config.split_special_tokens,
        ..head.shape(config.task, taps, base.hidden_size, u32::try_from(longest).unwrap_or(u32::MAX))
    };
    let shape = shape.mixing(others);
    parameters::check(&shape).map_err(|error| TrainError::Configuration(format!("head.{error}")))?;
    let bytes = artifact::weights_bytes(&shape);
    if let Some(limit) = base.limits.max_head_bytes.filter(|limit| bytes > *limit) {
        return Err(TrainError::Configuration(format!(
            "head: has {} parameters, {bytes} bytes in its file; the pool serves none of more than {limit}",
            parameters::count(&shape)
        )));
    }
    if !config.task.is_pooled() && head.alpha == 0.0 {
        return Err(TrainError::Configuration("head.alpha is 0: the base alone has nothing to train".to_owned()));
    }
    Ok(shape)
}

/// What is fetched: the head's taps, and `final` behind them where the loss is measured at the base's LM head.
pub fn fetched(taps: &Taps, task: Task) -> Taps {
    Taps { layers: taps.layers.clone(), final_norm: taps.final_norm || !task.is_pooled() }
}

/// How text that has nothing to do with what is learned becomes samples.
pub fn general_rules<'a>(rules: &Rules<'a>) -> Rules<'a> {
    Rules { task: Task::CausalLM, format: DataFormat::Auto, overlong: Overlong::Truncate, ..*rules }
}

/// Samples that are replayed beside a micro-batch.
pub fn replay_batch(config: &TrainConfig) -> u32 {
    if config.split.replay.is_empty() { 0 } else { config.training.replay_batch_size.unwrap_or(Training::REPLAY_BATCH_SIZE) }
}

/// Order of the training samples, and optimizer steps in all.
pub fn order(config: &TrainConfig, data: &DataSet, replay: Option<&DataSet>) -> (Order, u64) {
    let training = &config.training;
    let order = Order {
        replay: (replay.map_or(0, |replay| replay.samples.len()), replay_batch(config) as usize),
        lengths: data.samples.group_lengths().clone(),
        batch: training.per_device_train_batch_size as usize,
        accumulation: training.gradient_accumulation_steps as usize,
        seed: training.seed,
    };
    let total = training.max_steps.unwrap_or(u64::from(training.num_train_epochs) * order.steps_per_epoch());
    (order, total)
}

#[cfg(test)]
mod tests {
    use carryon_crds::common::TapPreset;
    use carryon_crds::job::{Checkpoint, HeadSpec, Split};
    use carryon_crds::wire::{Limits, TapChoice};

    use super::*;
    use crate::train::checkpoint::tests::{identity, numerics};

    fn config() -> TrainConfig {
        TrainConfig {
            name: "job".to_owned(),
            namespace: "default".to_owned(),
            task: Task::CausalLM,
            taps: None,
            hidden_states_dtype: Default::default(),
            other_pools: Vec::new(),
            head: HeadSpec::default(),
            init_head: None,
            format: DataFormat::Auto,
            split: Split { train: vec!["train.jsonl".to_owned()], ..Split::default() },
            max_length: 64,
            overlong: Default::default(),
            on_error: Default::default(),
            targets: Default::default(),
            thinking: Default::default(),
            add_eos_token: false,
            split_special_tokens: true,
            training: Default::default(),
            evaluation: Default::default(),
            checkpoint: Default::default(),
        }
    }

    fn base() -> ModelDescription {
        ModelDescription {
            format_version: 1,
            name: "tiny".to_owned(),
            model_type: "llama".to_owned(),
            instance: "i".to_owned(),
            identity: identity(),
            numerics: numerics(),
            hidden_size: 16,
            num_hidden_layers: 30,
            vocab_size: 100,
            eos_token_ids: vec![2],
            bos_token: None,
            eos_token: None,
            chat_template: None,
            tool_use_template: None,
            limits: Limits {
                max_model_len: 128,
                max_sequences: 8,
                max_request_tokens: 1024,
                max_body_bytes: 1 << 20,
                max_num_seqs: None,
                max_head_bytes: None,
            },
        }
    }

    #[test]
    fn taps_default_to_four_depths_and_final_and_come_sorted() {
        assert_eq!(taps(config().taps.as_ref(), &base()).unwrap().layers, [10, 20, 25, 28]);
        let mut config = config();
        config.taps = Some(TapChoice::Layers(Taps { layers: vec![30, 3], final_norm: false }));
        assert_eq!(taps(config.taps.as_ref(), &base()).unwrap().layers, [3, 30]);
        for (preset, layers) in [(TapPreset::Balanced, &[10, 20, 25, 28][..]), (TapPreset::Late, &[25, 28]), (TapPreset::Final, &[])] {
            config.taps = Some(TapChoice::Preset(preset));
            assert_eq!(taps(config.taps.as_ref(), &base()).unwrap(), Taps { layers: layers.to_vec(), final_norm: true });
        }
        config.taps = Some(TapChoice::Layers(Taps { layers: vec![31], final_norm: false }));
        assert_eq!(taps(config.taps.as_ref(), &base()).unwrap_err().to_string(), "taps.layers: 31 is beyond layer 30, the last of tiny");
    }

    #[test]
    fn a_length_beyond_the_pool_s_is_refused_by_name() {
        let config = TrainConfig { max_length: 129, ..config() };
        assert_eq!(
            rules(&config, &base(), None).unwrap_err().to_string(),
            "data.maxLength 129 is beyond 128, the longest sequence of the pool"
        );
        let config = TrainConfig { add_eos_token: true, ..self::config() };
        assert_eq!(rules(&config, &base(), Some(2)).unwrap().text_end, Some(2));
        assert_eq!(rules(&config, &base(), None).unwrap_err().to_string(), "data.addEosToken: tiny has no end-of-sequence token");
        let config = TrainConfig { format: DataFormat::Chat, ..self::config() };
        assert_eq!(rules(&config, &base(), None).unwrap_err().to_string(), "data.format Chat needs a chat template, tiny has none");
    }

    #[test]
    fn the_window_is_the_longest_sample_unless_one_is_asked_for() {
        let taps = taps(config().taps.as_ref(), &base()).unwrap();
        assert_eq!(shape(&config(), &base(), (taps.clone(), Vec::new()), 37).unwrap().window, 37);
        let mut config = config();
        config.head.window = Some(8);
        assert_eq!(shape(&config, &base(), (taps, Vec::new()), 37).unwrap().window, 8);
    }

    #[test]
    fn how_often_is_saved_does_not_name_a_run() {
        let often = TrainConfig { checkpoint: Checkpoint { save_steps: 1, save_total_limit: 9 }, ..config() };
        assert_eq!(digest(&config(), "a", [None; 3]), digest(&often, "a", [None; 3]));
        let mut seeded = config();
        seeded.training.seed = 1;
        assert_ne!(digest(&config(), "a", [None; 3]), digest(&seeded, "a", [None; 3]));
        assert_ne!(digest(&config(), "a", [None; 3]), digest(&config(), "b", [None; 3]));
        assert_ne!(digest(&config(), "a", [None, Some("b"), None]), digest(&config(), "a", [None, None, Some("b")]));
    }
}
