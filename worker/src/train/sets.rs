//! The samples of a run: all its splits, read and tokenised.

use carryon_crds::wire::{HeadShape, TrainConfig};

use crate::train::data::{self, DataSet, Files, Rules};
use crate::train::error::TrainError;
use crate::train::output::Places;
use crate::train::plan::{self, Inputs};
use crate::train::pool::Base;
use crate::train::progress::{Console, Phase};
use crate::train::stop::Stop;

/// The samples of all splits.
pub struct Data {
    /// To learn from.
    pub train: DataSet,
    /// Held out.
    pub evaluation: Option<DataSet>,
    /// To be measured on beside them.
    pub general: Option<DataSet>,
    /// To be left as the base has them.
    pub replay: Option<DataSet>,
    /// Of the head that they make.
    pub shape: HeadShape,
}

impl Data {
    /// All that are read.
    pub fn sets(&self) -> impl Iterator<Item = &DataSet> {
        std::iter::once(&self.train).chain([&self.evaluation, &self.general, &self.replay].into_iter().flatten())
    }

    /// Tokens of the largest micro-batch.
    pub fn largest_batch(&self, config: &TrainConfig) -> u64 {
        let batch = u64::from(config.training.per_device_train_batch_size);
        let of = |data: &DataSet, texts: u32| data.counts.longest * u64::from(texts) * data.counts.samples.min(batch);
        let replayed = self.replay.as_ref().map_or(0, |data| data.counts.longest * u64::from(plan::replay_batch(config)));
        let texts = config.task.group();
        let evaluated = self.evaluation.iter().map(|data| of(data, texts)).chain(self.general.iter().map(|data| of(data, 1)));
        evaluated.fold(of(&self.train, texts) + replayed, u64::max)
    }

    /// Reads all that the configuration names.
    ///
    /// # Errors
    /// Files or settings that cannot be used; the wish to stop.
    pub fn read(inputs: &Inputs, base: &Base, places: &Places, stop: &Stop, console: &mut Console) -> Result<Self, TrainError> {
        let rules = plan::rules(&inputs.config, &base.description, base.eos_token_id())?;
        let taps = plan::taps(inputs.config.taps.as_ref(), &base.description)?;
        let others = plan::others(&inputs.config, base.others.iter().map(|base| &base.description))?;
        let train = load(&inputs.train, "training", &rules, base, places, stop, console)?;
        let mut read = |files: &Option<Files>, name: &str, rules: &Rules<'_>| {
            files.as_ref().map(|files| load(files, name, rules, base, places, stop, console)).transpose()
        };
        let evaluation = read(&inputs.evaluation, "held out", &rules)?;
        let plain = plan::general_rules(&rules);
        let (general, replay) = (read(&inputs.general, "general", &plain)?, read(&inputs.replay, "replay", &plain)?);
        let shape = plan::shape(&inputs.config, &base.description, (taps, others), train.counts.longest)?;
        Ok(Self { train, evaluation, general, replay, shape })
    }
}

fn load(
    files: &Files,
    name: &str,
    rules: &Rules<'_>,
    base: &Base,
    places: &Places,
    stop: &Stop,
    console: &mut Console,
) -> Result<DataSet, TrainError> {
    let bytes = files.bytes();
    console.phase(Phase::Encoding, bytes, "bytes");
    let data = data::load(&files.paths, rules, base.language(), &places.root, &mut |read| {
        console.advance(read, bytes);
        stop.check()
    })?;
    let counts = &data.counts;
    let policy = match (counts.truncated, counts.skipped + counts.emptied) {
        (0, 0) => String::new(),
        (cut, left_out) => format!(" · {cut} cut, {left_out} left out"),
    };
    console.note(&format!(
        "{name}: {} samples, {} tokens, {} learned, longest {}{policy}",
        counts.samples, counts.tokens, counts.targets, counts.longest
    ));
    if let Some(first) = counts.refusals.first() {
        console.warn(&format!("{name}: {} lines left out that cannot be read, the first: {first}", counts.refused));
    }
    if !counts.ignored.is_empty() {
        let members: Vec<String> = counts.ignored.iter().map(|(name, count)| format!("{name} ({count} times)")).collect();
        console.warn(&format!("{name}: members that are not used: {}", members.join(", ")));
    }
    Ok(data)
}
