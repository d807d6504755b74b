//! Tenants whose prompts begin alike.

use std::time::Instant;

use crate::answers::{request, times};
use crate::{Bench, print, quantile};

const TENANTS: u32 = 16;
const PREFIX: usize = 400;
const OWN: usize = 8;

/// Seconds to the first token of a tenant, one after the other, median: where all share a prefix that one more tenant has just asked with, and
/// where each has a prefix of its own, so that the pool cannot know it.
pub async fn prefix(bench: &Bench, round: u32) -> anyhow::Result<()> {
    let heads = bench.push_heads(u64::from(TENANTS) + 1).await?;
    // A run's prefixes are all different.
    let seed = |kind: u32| (round * (TENANTS + 2) + kind) << 8;
    let first_token = async |prefix: u32, tenant: u32| {
        let prompt = [bench.tokens(prefix, PREFIX), bench.tokens(seed(0) + 1 + tenant, OWN)].concat();
        let asked = Instant::now();
        let times = times(&bench.client, &request(prompt, 1, Some(&heads[tenant as usize]))).await?;
        Ok::<_, anyhow::Error>(times.first().map_or(f64::NAN, |first| (*first - asked).as_secs_f64()))
    };
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    first_token(seed(0), TENANTS).await?;
    for tenant in 0..TENANTS {
        known.push(first_token(seed(0), tenant).await?);
    }
    for tenant in 0..TENANTS {
        unknown.push(first_token(seed(1 + tenant), tenant).await?);
    }
    print("first_token_known_prefix", quantile(known, 0.5), "s");
    print("first_token_unknown_prefix", quantile(unknown, 0.5), "s");
    Ok(())
}
