//! What an optimizer remembers of a parameter, and the parameter, in as many bits as the job asks for.
//!
//! - `Bfloat16` is rounded up or down by chance, in proportion to what is lost: an average that moves by a thousandth of itself would otherwise stand
//!   still. Chance is a function of seed, step, name and place, so that a resumed run has the bits of an unbroken one.
//! - `Int8` is block-wise dynamic quantisation (arXiv 2110.02861): blocks of 256 values, each divided by its largest magnitude, and the nearest of 256
//!   values that lie closer together towards zero. Small parameters stay in f32, as in bitsandbytes.

use std::sync::LazyLock;

use carryon_crds::job::{INT8_BLOCK, StateDtype};
use carryon_crds::pool::Dtype;
use half::bf16;
use half::slice::HalfFloatSliceExt as _;

use crate::numbers::Values;

/// Values that share a scale.
pub const BLOCK: usize = INT8_BLOCK;
/// Values that one thread takes at a time: whole blocks.
pub const CHUNK: usize = 16 * BLOCK;

/// Numbers of a parameter, one for each of its values.
#[derive(Clone, Debug, PartialEq)]
pub enum Moment {
    /// As they are, or rounded by chance.
    Plain(Values),
    /// Block-wise.
    Int8 {
        /// What codes mean.
        map: Map,
        /// A code for each value.
        codes: Vec<u8>,
        /// The largest magnitude of each block.
        scales: Vec<f32>,
    },
}

/// The 256 values of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Map {
    /// From -0.993 to 1.
    Signed,
    /// From 0 to 1.
    Unsigned,
}

/// Some of the numbers.
pub(super) enum Chunk<'a> {
    Float32(&'a mut [f32]),
    Bfloat16(&'a mut [bf16]),
    Int8 { map: Map, codes: &'a mut [u8], scales: &'a mut [f32] },
}

/// Chance for the numbers of one parameter in one step.
#[derive(Clone, Copy)]
pub(super) struct Dice(u64);

struct Table {
    values: [f32; 256],
    /// Half way between a value and the next.
    bounds: [f32; 255],
}

impl Map {
    /// Powers of ten from 10⁻⁶ to 1, each with twice as many values as the one before, in the middles of equal parts of 0.1 to 1 of it; 0 and 1.
    fn table(self) -> &'static Table {
        static TABLES: LazyLock<[Table; 2]> = LazyLock::new(|| {
            [true, false].map(|signed| {
                let mut values = vec![0.0f64, 1.0];
                for exponent in 0..7 {
                    let parts = 1 << (exponent + i32::from(!signed));
                    let middle = |part: i32| 0.1 + 0.9 * (f64::from(part) + 0.5) / f64::from(parts);
                    let positive = (0..parts).map(|part| 10f64.powi(exponent - 6) * middle(part));
                    values.extend(positive.clone());
                    values.extend(positive.filter(|_| signed).map(|value| -value));
                }
                values.sort_unstable_by(f64::total_cmp);
                let values = std::array::from_fn(|code| values[code] as f32);
                Table { values, bounds: std::array::from_fn(|code| 0.5 * (values[code] + values[code + 1])) }
            })
        });
        &TABLES[usize::from(self == Self::Unsigned)]
    }
}

impl Moment {
    /// Zeros for a parameter of `count` values.
    pub(super) fn zeros(count: usize, dtype: StateDtype, map: Map) -> Self {
        match dtype.of(count) {
            StateDtype::Float32 => Self::Plain(Values::zeros(count, Dtype::Float32)),
            StateDtype::Bfloat16 => Self::Plain(Values::zeros(count, Dtype::Bfloat16)),
            StateDtype::Int8 => {
                let zero = map.table().values.iter().position(|value| *value == 0.0).unwrap_or(0) as u8;
                Self::Int8 { map, codes: vec![zero; count], scales: vec![0.0; count.div_ceil(BLOCK)] }
            }
        }
    }

    /// Whether it is kept as `other` is, number by number.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Plain(own), Self::Plain(others)) => (own.dtype(), own.len()) == (others.dtype(), others.len()),
            (Self::Int8 { map, codes, scales }, Self::Int8 { map: other, codes: other_codes, scales: other_scales }) => {
                (map, codes.len(), scales.len()) == (other, other_codes.len(), other_scales.len())
            }
            _ => false,
        }
    }

    /// In order, [`CHUNK`] values each.
    pub(super) fn chunks(&mut self) -> Vec<Chunk<'_>> {
        match self {
            Self::Plain(values) => chunks(values),
            Self::Int8 { map, codes, scales } => {
                let chunks = codes.chunks_mut(CHUNK).zip(scales.chunks_mut(CHUNK / BLOCK));
                chunks.map(|(codes, scales)| Chunk::Int8 { map: *map, codes, scales }).collect()
            }
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

impl Dice {
    pub(super) fn new(seed: u64, step: u64, name: &str, which: u64) -> Self {
        let start = mix(mix(seed ^ mix(step)) ^ which);
        Self(name.bytes().fold(start, |key, byte| mix(key ^ u64::from(byte))))
    }

    /// Up or down to a bf16, up the likelier the nearer it is.
    fn round(self, value: f32, index: usize) -> bf16 {
        if !value.is_finite() {
            return bf16::from_f32(value);
        }
        let chance = mix(self.0 ^ index as u64) as u32 & 0xFFFF;
        bf16::from_bits((value.to_bits().saturating_add(chance) >> 16) as u16)
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014): a function of a counter that looks like chance.
fn mix(counter: u64) -> u64 {
    let mut z = counter.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use carryon_crds::job::SMALL_PARAMETER as SMALL;

    use super::*;

    fn change(moment: &mut Moment, dice: Dice, mut change: impl FnMut(usize, &mut f32)) {
        for (chunk, mut numbers) in moment.chunks().into_iter().enumerate() {
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
