//! Dropout of hidden states: some features of a sample are not there in a step. Before the norm, so that what stays is scaled up by itself.

use bytes::Bytes;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};

use crate::head::pass::PackedBatch;
use crate::numbers::{RowFormat, number_bytes};

/// Which features are dropped: a pure function of seed, step, place of the sample in the step, tap and feature, so that a resumed run drops the same.
#[derive(Clone, Debug)]
pub struct Dropout {
    /// Share of the features of each tap.
    pub share: f64,
    /// Of the run.
    pub seed: u64,
    /// Number of the optimizer step, from 0.
    pub step: u64,
    /// Width of the hidden states of each tap.
    pub widths: Vec<usize>,
}

impl Dropout {
    /// Sets the dropped features of each sample to zero in all its rows, of each tap others. `first`: samples of the step before those of `batch`.
    pub fn apply(&self, batch: &mut PackedBatch, first: usize) {
        if self.share == 0.0 {
            return;
        }
        let taps = batch.taps.len();
        for (tap, (samples, format)) in batch.taps.iter_mut().zip(&batch.formats).enumerate() {
            let width = self.widths[tap];
            for (sample, rows) in samples.iter_mut().enumerate() {
                let dropped = self.dropped((first + sample) * taps + tap, width);
                *rows = without(rows, &dropped, *format, width);
            }
        }
    }

    /// Features of the tap of a sample with this number in the step.
    fn dropped(&self, number: usize, width: usize) -> Vec<usize> {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        // The first streams draw weights and orders of samples.
        random.set_stream(u64::MAX - self.step);
        random.set_word_pos(number as u128 * self.widths.iter().max().map_or(0, |widest| *widest as u128));
        (0..width).filter(|_| f64::from(random.next_u32()) < self.share * 2f64.powi(32)).collect()
    }
}

/// `rows` with zeros for some of their `width` numbers: no bit of them is set in any format.
fn without(rows: &[u8], dropped: &[usize], format: RowFormat, width: usize) -> Bytes {
    let bytes = match format {
        RowFormat::Plain(dtype) => number_bytes(dtype),
        RowFormat::Float8 => 1,
    };
    let mut rows = rows.to_vec();
    for row in rows.chunks_exact_mut(format.row_bytes(width)) {
        dropped.iter().for_each(|feature| row[feature * bytes..][..bytes].fill(0));
    }
    rows.into()
}

#[cfg(test)]
mod tests {
    use carryon_crds::pool::Dtype;

    use super::*;
    use crate::numbers::to_bytes;

    const WIDTH: usize = 64;

    /// A tap of f32 and one of eight bits, samples of some lengths; every number is 1.
    fn batch(lengths: &[usize]) -> PackedBatch {
        let ones = |length: &usize| to_bytes(&vec![1.0; length * WIDTH], Dtype::Float32);
        let plain: Vec<Bytes> = lengths.iter().map(ones).collect();
        let bits = plain.iter().map(|rows| RowFormat::Float8.convert(rows.clone(), Dtype::Float32, WIDTH)).collect();
        PackedBatch {
            taps: vec![plain, bits],
            formats: vec![RowFormat::Plain(Dtype::Float32), RowFormat::Float8],
            lengths: lengths.to_vec(),
            rows: Vec::new(),
        }
    }

    fn dropped(share: f64, step: u64, lengths: &[usize], first: usize) -> PackedBatch {
        let mut batch = batch(lengths);
        Dropout { share, seed: 7, step, widths: vec![WIDTH; 2] }.apply(&mut batch, first);
        batch
    }

    /// Of each sample of a tap, its rows as numbers.
    fn numbers(batch: &PackedBatch, tap: usize) -> Vec<Vec<Vec<f32>>> {
        let format = batch.formats[tap];
        let row = |row: &[u8]| {
            let mut values = vec![0.0; WIDTH];
            format.read(row, &mut values);
            values
        };
        batch.taps[tap].iter().map(|rows| rows.chunks_exact(format.row_bytes(WIDTH)).map(row).collect()).collect()
    }

    #[test]
    fn as_many_features_are_dropped_as_asked_for_and_the_rest_stays() {
        let batch = dropped(0.25, 3, &[2; 100], 0);
        for tap in [0, 1] {
            let all: Vec<f32> = numbers(&batch, tap).into_iter().flatten().flatten().collect();
            assert!(all.iter().all(|value| *value == 0.0 || *value == 1.0));
            let share = all.iter().filter(|value| **value == 0.0).count() as f64 / all.len() as f64;
            assert!((share - 0.25).abs() < 0.02, "{share}");
        }
        assert_eq!(dropped(0.0, 3, &[2, 3], 0).taps, self::batch(&[2, 3]).taps);
    }

    #[test]
    fn all_rows_of_a_sample_lose_the_same_features_and_samples_taps_and_steps_others() {
        let (batch, next) = (dropped(0.5, 3, &[3, 3], 0), dropped(0.5, 4, &[3, 3], 0));
        let (plain, bits) = (numbers(&batch, 0), numbers(&batch, 1));
        assert!(plain[0].iter().all(|row| *row == plain[0][0]));
        assert_ne!(plain[0][0], plain[1][0]);
        assert_ne!(plain[0][0], bits[0][0]);
        assert_ne!(plain[0][0], numbers(&next, 0)[0][0]);
    }

    #[test]
    fn what_a_sample_loses_depends_on_its_place_in_the_step_alone() {
        let (whole, second) = (dropped(0.5, 3, &[1, 2, 3, 4], 0), dropped(0.5, 3, &[3, 4], 2));
        for tap in [0, 1] {
            assert_eq!(whole.taps[tap][2..], second.taps[tap][..]);
        }
    }
}
