//! Figures that depend on order alone. Each sample counts as often as it is told to. Pure.

/// Samples in the order of a score.
pub struct Ranked {
    order: Vec<u32>,
    /// Whether the sample at this place has another score than the one before it.
    new: Vec<bool>,
}

impl Ranked {
    /// By `scores`, none of which is NaN.
    pub fn new(scores: &[f64]) -> Self {
        let mut order: Vec<u32> = (0..scores.len() as u32).collect();
        order.sort_by(|&left, &right| scores[left as usize].total_cmp(&scores[right as usize]));
        let differs = |place: usize| place == 0 || scores[order[place] as usize] != scores[order[place - 1] as usize];
        Self { new: (0..order.len()).map(differs).collect(), order }
    }

    /// Groups of equal scores, ascending.
    fn groups(&self) -> impl Iterator<Item = &[u32]> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let rest = self.new.get(start + 1..)?;
            let end = start + 1 + rest.iter().position(|new| *new).unwrap_or(rest.len());
            let group = &self.order[start..end];
            start = end;
            (!group.is_empty()).then_some(group)
        })
    }

    /// Area under the ROC curve: how often a sample that is `positive` ranks above one that is not, ties counting half. None without both kinds.
    pub fn auc(&self, counts: &[u32], positive: impl Fn(usize) -> bool) -> Option<f64> {
        let (mut positives, mut negatives, mut above) = (0.0, 0.0, 0.0);
        for group in self.groups() {
            let (mut good, mut bad) = (0.0, 0.0);
            for &sample in group {
                let count = f64::from(counts[sample as usize]);
                *(if positive(sample as usize) { &mut good } else { &mut bad }) += count;
            }
            above += good * (negatives + bad / 2.0);
            positives += good;
            negatives += bad;
        }
        (positives > 0.0 && negatives > 0.0).then(|| above / (positives * negatives))
    }

    /// Rank of each sample, those of equal scores sharing their mean.
    fn ranks(&self, counts: &[u32]) -> Vec<f64> {
        let (mut ranks, mut below) = (vec![0.0; self.order.len()], 0.0);
        for group in self.groups() {
            let here: f64 = group.iter().map(|&sample| f64::from(counts[sample as usize])).sum();
            group.iter().for_each(|&sample| ranks[sample as usize] = below + (here + 1.0) / 2.0);
            below += here;
        }
        ranks
    }
}

/// Spearman's rank correlation. None where one side has no order.
pub fn spearman(left: &Ranked, right: &Ranked, counts: &[u32]) -> Option<f64> {
    let (left, right) = (left.ranks(counts), right.ranks(counts));
    let all: f64 = counts.iter().map(|&count| f64::from(count)).sum();
    // Ranks have this mean on both sides.
    let mean = (all + 1.0) / 2.0;
    let (mut both, mut lefts, mut rights) = (0.0, 0.0, 0.0);
    for ((left, right), &count) in left.iter().zip(&right).zip(counts) {
        let (count, left, right) = (f64::from(count), left - mean, right - mean);
        both += count * left * right;
        lefts += count * left * left;
        rights += count * right * right;
    }
    (lefts > 0.0 && rights > 0.0).then(|| both / (lefts * rights).sqrt())
}
