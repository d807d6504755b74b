//! What `metrics.jsonl` says as an event file, which TensorBoard shows beside those of other runs.
//!
//! A file is a row of TFRecords (length, its checksum, content, its checksum), each an `Event` in protocol buffers: scalars alone need a few fields of it
//! (`tensorflow/core/util/event.proto`, `framework/summary.proto`), and the crates that know all of it are no longer looked after.

use crate::train::metrics::Line;

/// The first record of every file.
const VERSION: &str = "brain.Event:2";

// Number of a field, and how it is written. Of `Event`: wall_time (double), step (int64), file_version (string), summary.
const WALL_TIME: u8 = 1 << 3 | 1;
const STEP: u8 = 2 << 3;
const FILE_VERSION: u8 = 3 << 3 | 2;
const SUMMARY: u8 = 5 << 3 | 2;
// Of `Summary`: value, once for each. Of a value: tag (string), simple_value (float).
const VALUE: u8 = 1 << 3 | 2;
const TAG: u8 = 1 << 3 | 2;
const SIMPLE_VALUE: u8 = 2 << 3 | 5;

/// The beginning of a file whose first step comes after `time`, seconds of Unix time.
pub fn head(time: f64) -> Vec<u8> {
    let mut event = at(time);
    bytes(&mut event, FILE_VERSION, VERSION.as_bytes());
    record(&event)
}

/// A line's figures under the names that Hugging Face's trainer gives them, at `time`; those that are not finite are left out.
pub fn event(line: &Line, time: f64) -> Vec<u8> {
    let step = match line {
        Line::Step(line) => line.step,
        Line::Evaluation(line) => line.step,
    };
    let mut summary = Vec::new();
    for (tag, figure) in scalars(line) {
        let mut value = Vec::new();
        bytes(&mut value, TAG, tag.as_bytes());
        value.push(SIMPLE_VALUE);
        value.extend((figure as f32).to_le_bytes());
        bytes(&mut summary, VALUE, &value);
    }
    let mut event = at(time);
    // Nothing is said of what is zero.
    if step > 0 {
        event.push(STEP);
        number(&mut event, step);
    }
    bytes(&mut event, SUMMARY, &summary);
    record(&event)
}

fn scalars(line: &Line) -> impl Iterator<Item = (&'static str, f64)> {
    let all = match line {
        Line::Step(line) => vec![
            ("train/loss", Some(line.loss)),
            ("train/epoch", Some(line.epoch)),
            ("train/learning_rate", Some(line.lr)),
            ("train/grad_norm", Some(line.grad_norm)),
            ("train/replay_kl", line.replay_kl),
            ("train/tokens_per_second", Some(line.tokens_per_second)),
            ("train/wait_seconds", Some(line.wait_seconds)),
        ],
        Line::Evaluation(line) => vec![
            ("eval/loss", Some(line.eval_loss)),
            ("eval/base_loss", line.base_eval_loss),
            ("eval/accuracy", line.eval_accuracy),
            ("eval/general_loss", line.general_loss),
            ("eval/base_general_loss", line.base_general_loss),
        ],
    };
    all.into_iter().filter_map(|(tag, figure)| Some((tag, figure?))).filter(|(_, figure)| figure.is_finite())
}

fn at(time: f64) -> Vec<u8> {
    let mut event = vec![WALL_TIME];
    event.extend(time.to_le_bytes());
    event
}

fn bytes(message: &mut Vec<u8>, field: u8, content: &[u8]) {
    message.push(field);
    number(message, content.len() as u64);
    message.extend(content);
}

/// A varint.
fn number(message: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        message.push(number as u8 | 0x80);
        number >>= 7;
    }
    message.push(number as u8);
}

fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let masked = |content: &[u8]| crc32c::crc32c(content).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
    [&length[..], &masked(&length), event, &masked(event)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::metrics::{EvaluationLine, StepLine};

    #[test]
    fn a_file_has_the_bytes_of_tensorboards_own_writer() {
        let began = 1_700_000_000.25;
        let base = EvaluationLine { eval_loss: 1.3, base_eval_loss: Some(1.3), ..EvaluationLine::default() };
        let step = StepLine {
            step: 300,
            epoch: 1.5,
            loss: 0.75,
            lr: 0.003,
            replay_kl: None,
            grad_norm: f64::NAN,
            tokens_per_second: 1000.0,
            seconds: 2.5,
            wait_seconds: 0.125,
        };
        let evaluation = EvaluationLine {
            step: 300,
            eval_loss: 0.5,
            eval_accuracy: Some(0.875),
            general_loss: Some(5.0),
            base_general_loss: Some(4.75),
            ..EvaluationLine::default()
        };
        let lines = [(0.0, Line::Evaluation(base)), (2.5, Line::Step(step)), (2.5, Line::Evaluation(evaluation))];
        let events = lines.iter().flat_map(|(seconds, line)| event(line, began + seconds));
        let file: Vec<u8> = head(began).into_iter().chain(events).collect();
        assert!(file == include_bytes!("../../../tests/oracles/fixtures/events.tfevents"));
    }
}
