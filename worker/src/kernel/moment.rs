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

use crate::numbers::Values;

/// Values that share a scale.
pub(in crate::kernel) const BLOCK: usize = INT8_BLOCK;

/// Whose chance it is, where a weight is rounded: its moments are 0 and 1.
pub(in crate::kernel) const WEIGHT: u64 = 2;

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

/// Chance for the numbers of one parameter in one step.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct Dice(u64);

pub(in crate::kernel) struct Table {
    pub values: [f32; 256],
    /// Half way between a value and the next.
    pub bounds: [f32; 255],
}

impl Map {
    /// Powers of ten from 10⁻⁶ to 1, each with twice as many values as the one before, in the middles of equal parts of 0.1 to 1 of it; 0 and 1.
    pub(in crate::kernel) fn table(self) -> &'static Table {
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
    pub fn zeros(count: usize, dtype: StateDtype, map: Map) -> Self {
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
    pub fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Plain(own), Self::Plain(others)) => (own.dtype(), own.len()) == (others.dtype(), others.len()),
            (Self::Int8 { map, codes, scales }, Self::Int8 { map: other, codes: other_codes, scales: other_scales }) => {
                (map, codes.len(), scales.len()) == (other, other_codes.len(), other_scales.len())
            }
            _ => false,
        }
    }
}

impl Dice {
    pub fn new(seed: u64, step: u64, name: &str, which: u64) -> Self {
        let start = mix(mix(seed ^ mix(step)) ^ which);
        Self(name.bytes().fold(start, |key, byte| mix(key ^ u64::from(byte))))
    }

    /// Up or down to a bf16, up the likelier the nearer it is.
    pub fn round(self, value: f32, index: usize) -> bf16 {
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
