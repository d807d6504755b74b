//! What a run takes of memory: told before it begins, and compared with what it took.

use std::io::Write as _;

use carryon_crds::wire::TerminationMessage;
use carryon_crds::wire::memory::{Tally, Trainer, megabytes};
use tokio::runtime::Handle;

use crate::train::args::TrainArgs;
use crate::train::error::TrainError;
use crate::train::memory::Watch;
use crate::train::output::Places;
use crate::train::plan::Inputs;
use crate::train::pool::Base;
use crate::train::progress::Console;
use crate::train::run::connect;
use crate::train::sets::Data;
use crate::train::stop::Stop;

/// `--plan`: asks pool and data as a run does, and prints what it would take.
pub(super) fn show(
    args: &TrainArgs,
    inputs: &Inputs,
    runtime: &Handle,
    stop: &Stop,
    console: &mut Console,
) -> Result<TerminationMessage, TrainError> {
    let base = connect(args, inputs, runtime, stop, console)?;
    let scratch = tempfile::tempdir().map_err(TrainError::file("create", std::env::temp_dir()))?;
    let data = Data::read(inputs, &base, &Places::new(scratch.path(), None), stop, console)?;
    let context = Watch::start(runtime).start_anonymous();
    let tally = trainer(inputs, &base, &data).tally();
    std::io::stdout().write_all(table(&tally, context).as_bytes()).map_err(TrainError::file("write to", "stdout"))?;
    let message = format!("memory: {} planned", megabytes(tally.total() + context));
    Ok(TerminationMessage { message, ..TerminationMessage::default() })
}

/// What the memory of a run depends on.
pub(super) fn trainer<'a>(inputs: &'a Inputs, base: &Base, data: &'a Data) -> Trainer<'a> {
    let training = &inputs.config.training;
    Trainer {
        shape: &data.shape,
        training,
        dtype: base.description.numerics.dtype,
        states: inputs.config.hidden_states_dtype,
        vocab_size: base.description.vocab_size,
        rows: data.largest_batch(&inputs.config),
        evaluated: data.evaluation.is_some(),
    }
}

/// A line a group; `context` is what the process has without a head: its code's own data, threads, tokenizer, lengths of the samples.
fn table(tally: &Tally, context: u64) -> String {
    let rows = tally.groups().into_iter().chain([("context", context), ("all", tally.total() + context)]);
    rows.map(|(name, bytes)| format!("{name:11} {:>12}\n", megabytes(bytes))).collect()
}

/// What is said before the first step.
pub(super) fn outlook(tally: &Tally) -> String {
    format!("memory: planned for the head {tally}")
}

/// What is said behind the last step.
pub(super) fn outcome(planned: u64, memory: &Watch) -> String {
    let highest = memory.peak_anonymous() - memory.start_anonymous();
    format!(
        "memory: {} for the head at most, {} planned; {} without it",
        megabytes(highest),
        megabytes(planned),
        megabytes(memory.start_anonymous())
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_a_table_that_adds_up() {
        let tally = Tally { weights: 1_000_000, gradients: 2_000_000, moments: 3_000_000, activations: 4_000_000, buffers: 123_450_000 };
        let table = table(&tally, 500_000);
        assert!(table.starts_with("weights           1.0 MB\ngradients         2.0 MB\n"), "{table}");
        assert!(table.ends_with("context           0.5 MB\nall             133.9 MB\n"), "{table}");
    }
}
