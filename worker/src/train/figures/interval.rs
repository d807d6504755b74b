//! 95 % intervals: Wilson's for shares of samples, Efron's percentile bootstrap for all else.

use carryon_crds::wire::Figure;

/// Quantile of the normal distribution at 97.5 %.
const Z: f64 = 1.959_963_984_540_054;
/// Resamples of a bootstrap.
const RESAMPLES: usize = 1000;
/// Of large sets at least.
const FEWEST_RESAMPLES: usize = 100;
/// Numbers that all resamples together look at; more of them mean fewer resamples.
const WORK: usize = 1 << 28;

/// `right` of `all`, with the interval of E. B. Wilson (Probable inference, the law of succession, and statistical inference, 1927). None of nothing.
pub fn share(right: u64, all: u64) -> Option<Figure> {
    let (k, n) = (right as f64, all as f64);
    let (middle, half) = ((k + Z * Z / 2.0) / (n + Z * Z), Z / (n + Z * Z) * (k * (n - k) / n + Z * Z / 4.0).sqrt());
    (all > 0).then(|| Figure { value: k / n, low: (middle - half).max(0.0), high: (middle + half).min(1.0) })
}

/// What `measure` finds on all of `samples`, and on resamples of as many drawn with replacement: the interval is from the 2.5th to the 97.5th percentile of
/// these (B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). `measure` is told how often each sample counts; resamples on
/// which it finds nothing are left out. `numbers`: what one call looks at. None where nothing is found on all samples, or on no resample.
pub fn bootstrap(samples: usize, numbers: usize, measure: impl Fn(&[u32]) -> Option<f64>) -> Option<Figure> {
    let value = measure(&vec![1; samples]).filter(|value| value.is_finite())?;
    let mut draws = Draws(0);
    let mut found: Vec<f64> = (0..(WORK / numbers.max(1)).clamp(FEWEST_RESAMPLES, RESAMPLES))
        .filter_map(|_| {
            let mut counts = vec![0; samples];
            (0..samples).for_each(|_| counts[draws.below(samples)] += 1);
            measure(&counts).filter(|value| value.is_finite())
        })
        .collect();
    found.sort_unstable_by(f64::total_cmp);
    (!found.is_empty()).then(|| Figure { value, low: percentile(&found, 0.025), high: percentile(&found, 0.975) })
}

/// Between the two neighbours, in proportion, as numpy's default has it. `sorted` is not empty.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

/// SplitMix64 (G. Steele, D. Lea and C. Flood, Fast splittable pseudorandom number generators, 2014), from seed 0: few lines in any language, so that others
/// can draw the same.
struct Draws(u64);

impl Draws {
    /// A number below `most`, which is not 0.
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((u128::from(z ^ (z >> 31)) * most as u128) >> 64) as usize
    }
}
