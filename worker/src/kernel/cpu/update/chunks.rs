//! A parameter's numbers, some at a time, in f32: in what they are kept is this file's alone.

use half::bf16;
use half::slice::HalfFloatSliceExt as _;

use crate::kernel::moment::{BLOCK, Dice, Map, Moment, Table};
use crate::numbers::Values;

/// Values that one thread takes at a time: whole blocks.
pub(super) const CHUNK: usize = 16 * BLOCK;

/// Some of the numbers.
pub(super) enum Chunk<'a> {
    Float32(&'a mut [f32]),
    Bfloat16(&'a mut [bf16]),
    Int8 { map: Map, codes: &'a mut [u8], scales: &'a mut [f32] },
}

/// In order, [`CHUNK`] values each.
pub(super) fn moment_chunks(moment: &mut Moment) -> Vec<Chunk<'_>> {
    match moment {
        Moment::Plain(values) => chunks(values),
        Moment::Int8 { map, codes, scales } => {
            let chunks = codes.chunks_mut(CHUNK).zip(scales.chunks_mut(CHUNK / BLOCK));
            chunks.map(|(codes, scales)| Chunk::Int8 { map: *map, codes, scales }).collect()
        }
    }
}

/// In order, [`CHUNK`] values each.
pub(super) fn chunks(values: &mut Values) -> Vec<Chunk<'_>> {
    match values {
        Values::Float32(values) => values.chunks_mut(CHUNK).map(Chunk::Float32).collect(),
        Values::Bfloat16(values) => values.chunks_mut(CHUNK).map(Chunk::Bfloat16).collect(),
    }
}

impl Chunk<'_> {
    /// Lets `change` have the numbers, the first of which is number `first` of its parameter, and keeps what it leaves.
    pub(super) fn with(&mut self, dice: Dice, first: usize, change: impl FnOnce(&mut [f32])) {
        match self {
            Self::Float32(values) => change(values),
            Self::Bfloat16(kept) => {
                let mut values = vec![0.0; kept.len()];
                kept.convert_to_f32_slice(&mut values);
                change(&mut values);
                for (index, (kept, value)) in kept.iter_mut().zip(values).enumerate() {
                    *kept = dice.round(value, first + index);
                }
            }
            Self::Int8 { map, codes, scales } => {
                let Table { values: meanings, bounds } = map.table();
                let scale_of = |index: usize| index / BLOCK;
                let decode = |(index, code): (usize, &u8)| meanings[usize::from(*code)] * scales[scale_of(index)];
                let mut values: Vec<f32> = codes.iter().enumerate().map(decode).collect();
                change(&mut values);
                for ((codes, values), scale) in codes.chunks_mut(BLOCK).zip(values.chunks(BLOCK)).zip(scales.iter_mut()) {
                    *scale = values.iter().fold(0.0, |most: f32, value| most.max(value.abs()));
                    let share = if *scale > 0.0 { 1.0 / *scale } else { 0.0 };
                    for (code, value) in codes.iter_mut().zip(values) {
                        *code = bounds.partition_point(|bound| *bound < value * share) as u8;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use carryon_crds::job::{SMALL_PARAMETER as SMALL, StateDtype};

    use super::*;

    fn change(moment: &mut Moment, dice: Dice, mut change: impl FnMut(usize, &mut f32)) {
        for (chunk, mut numbers) in moment_chunks(moment).into_iter().enumerate() {
            numbers.with(dice, chunk * CHUNK, |values| {
                values.iter_mut().enumerate().for_each(|(index, value)| change(chunk * CHUNK + index, value));
            });
        }
    }

    fn values(moment: &Moment) -> Vec<f32> {
        let mut values = Vec::new();
        change(&mut moment.clone(), Dice::new(0, 0, "", 0), |_, value| values.push(*value));
        values
    }

    #[test]
    fn what_moves_by_less_than_a_bf16_moves_on_average() {
        let mut moment = Moment::zeros(3 * CHUNK, StateDtype::Bfloat16, Map::Signed);
        change(&mut moment, Dice::new(7, 0, "w", 0), |_, value| *value = 1.0);
        for step in 1..=100 {
            change(&mut moment, Dice::new(7, step, "w", 0), |_, value| *value *= 1.001);
        }
        let values = values(&moment);
        let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len() as f64;
        assert!((mean / 1.001f64.powi(100) - 1.0).abs() < 2e-3, "{mean}");
        let mut again = Moment::zeros(3 * CHUNK, StateDtype::Bfloat16, Map::Signed);
        change(&mut again, Dice::new(7, 100, "w", 0), |index, value| *value = values[index]);
        assert_eq!(again, moment, "a bf16 is kept as it is");
    }

    #[test]
    fn small_parameters_are_remembered_in_f32() {
        for dtype in [StateDtype::Bfloat16, StateDtype::Int8] {
            assert!(matches!(Moment::zeros(SMALL - 1, dtype, Map::Signed), Moment::Plain(Values::Float32(_))));
            assert!(!matches!(Moment::zeros(SMALL, dtype, Map::Signed), Moment::Plain(Values::Float32(_))));
        }
    }

    #[test]
    fn zeros_are_zeros_in_any_type() {
        for dtype in [StateDtype::Float32, StateDtype::Bfloat16, StateDtype::Int8] {
            for map in [Map::Signed, Map::Unsigned] {
                assert!(values(&Moment::zeros(SMALL + 1, dtype, map)).iter().all(|value| *value == 0.0));
            }
        }
    }
}
