//! Room on the output volume. Checkpoints and head come first; the cache of hidden states, which costs no more than time when it is
//! missing, gets a share of what is left, and gives it back when what must be written finds none.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use carryon_crds::common::Taps;
use carryon_crds::job::Training;
use carryon_crds::wire::{HeadShape, TrainConfig};

use crate::exchange::{CacheError, CacheKey, StateCache};
use crate::head::parameters;
use crate::train::cached::CachedPool;
use crate::train::error::TrainError;
use crate::train::output::Places;
use crate::train::plan;
use crate::train::pool::Base;
use crate::train::progress::Console;
use crate::train::report;
use crate::train::sets::Data;

/// Share of the unreserved room that the cache may take: metrics and report need some too, and the volume may be others' as well.
const CACHE_SHARE: f64 = 0.8;
/// What a tensor's entry in a header takes at most, bytes.
const ENTRY_BYTES: u64 = 256;
/// State and settings in a header at most, bytes.
const METADATA_BYTES: u64 = 4096;

/// Bytes of a checkpoint of a head of this shape at most: weights now and at the best evaluation, their average, and what the optimizers
/// remember.
pub fn checkpoint_bytes(shape: &HeadShape, training: &Training) -> u64 {
    let groups = if training.ema_decay.is_some() { 3 } else { 2 };
    let tensor = |dimensions: &Vec<usize>| {
        let values: u64 = dimensions.iter().map(|&length| length as u64).product();
        let (state, tensors) = training.state_bytes(dimensions);
        groups * 4 * values + state + (groups + tensors) * ENTRY_BYTES
    };
    METADATA_BYTES + parameters::of(shape).values().map(tensor).sum::<u64>()
}

/// Bytes of all checkpoints that a run of `steps` steps keeps of each seed, of one more while it is written, and of the head.
fn reserved(shape: &HeadShape, config: &TrainConfig, steps: u64) -> u64 {
    let kept = u64::from(config.checkpoint.save_total_limit).min(steps.div_ceil(config.checkpoint.save_steps) + 1);
    let head = 4 * parameters::count(shape) + METADATA_BYTES + ENTRY_BYTES * parameters::of(shape).len() as u64;
    let seeds = config.training.each_seed().count() as u64;
    (kept * seeds + 1).saturating_mul(checkpoint_bytes(shape, &config.training)).saturating_add(head)
}

/// What the cache may take in all of `available` bytes, of which `reserved` are not for it. The same for every attempt: what an earlier one
/// has written is part of both.
fn quota(available: u64, reserved: u64) -> u64 {
    (available.saturating_sub(reserved) as f64 * CACHE_SHARE) as u64
}

/// The hidden states of all pools behind caches that leave room for what a run of `steps` steps must write.
pub(super) fn open_caches(
    places: &Places,
    data: &Data,
    base: &Base,
    config: &TrainConfig,
    steps: u64,
    console: &Console,
) -> Result<Vec<Arc<CachedPool>>, TrainError> {
    let shared = places.shared_cache.as_ref();
    let keys = keys(data, base, config);
    let needs =
        keys.iter().map(|key| key.estimate(data.sets().flat_map(|data| data.samples.lengths().iter().map(|&length| length as usize))));
    let needs: Vec<u64> = needs.collect();
    let needed: u64 = needs.iter().sum();
    let folders: Vec<PathBuf> = (0..keys.len()).map(|pool| shared.cloned().unwrap_or_else(|| places.cache(pool))).collect();
    folders.iter().try_for_each(|folder| std::fs::create_dir_all(folder).map_err(TrainError::file("create", folder)))?;
    let available = free_bytes(&places.root)? + places.cache_bytes() + places.checkpoint_bytes();
    let reserved = reserved(&data.shape, config, steps);
    let quota = match shared {
        None => quota(available, reserved),
        // What others have written there is no longer free. Where it is another volume, nothing of a run has to fit there.
        Some(folder) => quota(free_bytes(folder)?, if one_volume(folder, &places.root)? { reserved } else { 0 }),
    };
    let open = if shared.is_some() { StateCache::open_shared } else { StateCache::open };
    let share = |need: u64| (quota as f64 * (need as f64 / needed.max(1) as f64)) as u64;
    let mut caches = Vec::new();
    for ((folder, key), need) in folders.iter().zip(keys).zip(needs) {
        caches.push(open(folder, key, share(need)).map_err(cache_error)?);
    }
    let there: u64 = caches.iter().map(StateCache::bytes).sum();
    console.note(&format!("hidden states: {} on disk once all are cached, {} there already", report::bytes(needed), report::bytes(there)));
    if reserved > available {
        let (reserved, available) = (report::bytes(reserved), report::bytes(available));
        console.warn(&format!("checkpoints and head may need {reserved}, the output volume has {available} for them"));
    }
    if needed > quota.saturating_add(if shared.is_some() { there } else { 0 }) {
        console.warn(&format!("the cache may take {} of this disk: the rest is asked for in every epoch", report::bytes(quota)));
    }
    let head_taps = std::iter::once(&data.shape.taps).chain(data.shape.others.iter().map(|other| &other.taps)).map(Taps::count);
    let cached = |((base, cache), head_taps): ((&Base, StateCache), usize)| CachedPool {
        client: base.client.clone(),
        cache,
        head_taps,
        limits: base.description.limits.clone(),
        told_full: AtomicBool::new(false),
    };
    Ok(base.all().zip(caches).zip(head_taps).map(cached).map(Arc::new).collect())
}

/// What is fetched of each base.
fn keys(data: &Data, base: &Base, config: &TrainConfig) -> Vec<CacheKey> {
    let first = CacheKey::new(&base.description, &plan::fetched(&data.shape.taps, config.task), config.hidden_states_dtype);
    let others = base.others.iter().zip(&data.shape.others).zip(&config.other_pools);
    let others = others.map(|((base, read), pool)| CacheKey::new(&base.description, &read.taps, pool.hidden_states_dtype));
    std::iter::once(first).chain(others).collect()
}

/// Bytes that may still be written to the volume of a folder.
fn free_bytes(folder: &Path) -> Result<u64, TrainError> {
    let disk = rustix::fs::statvfs(folder).map_err(|error| TrainError::file("inspect", folder)(error.into()))?;
    Ok(disk.f_bavail * disk.f_frsize)
}

fn one_volume(first: &Path, second: &Path) -> Result<bool, TrainError> {
    let volume = |folder: &Path| std::fs::metadata(folder).map(|metadata| metadata.dev()).map_err(TrainError::file("inspect", folder));
    Ok(volume(first)? == volume(second)?)
}

fn cache_error(error: CacheError) -> TrainError {
    match error {
        CacheError::Io { action, path, source } => TrainError::File { action, path, cause: source },
        error => TrainError::Pool(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quota_is_a_share_of_what_is_not_reserved_and_never_negative() {
        assert_eq!(quota(1000, 500), 400);
        assert_eq!(quota(500, 500), 0);
        assert_eq!(quota(499, 500), 0);
    }
}
