//! Figures of embeddings. Pure.

/// How many of all positives are nearer to each anchor, by their cosine, than its own. `outputs` are `[2 · pairs, dimensions]`: anchor, positive, and so on.
pub fn ranks(outputs: &[f32], dimensions: usize) -> Vec<usize> {
    let units: Vec<Vec<f32>> = outputs.chunks_exact(dimensions).map(unit).collect();
    let pairs = units.as_chunks::<2>().0;
    let cosine = |anchor: &[f32], positive: &[f32]| anchor.iter().zip(positive).map(|(left, right)| left * right).sum::<f32>();
    let rank = |[anchor, own]: &[Vec<f32>; 2]| {
        let own = cosine(anchor, own);
        pairs.iter().filter(|[_, positive]| cosine(anchor, positive) > own).count()
    };
    pairs.iter().map(rank).collect()
}

/// Of length 1.
fn unit(row: &[f32]) -> Vec<f32> {
    let length = row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt().max(1e-12);
    row.iter().map(|value| (f64::from(*value) / length) as f32).collect()
}
