use std::os::unix::fs::FileExt as _;

use carryon_crds::common::Taps;
use carryon_crds::job::HiddenStatesDtype;
use carryon_crds::pool::Dtype;
use carryon_crds::wire::{Identity, Numerics};
use sha2::{Digest as _, Sha256};

use super::record::HEADER_BYTES;
use super::*;
use crate::numbers::{RowFormat, to_bytes};

fn key() -> CacheKey {
    let text = |text: &str| text.to_owned();
    CacheKey {
        identity: Identity { weights: text("w"), tokenizer: text("t"), chat_template: text("c"), norm_point: text("final_norm") },
        numerics: Numerics { dtype: Dtype::Float32, device: text("cpu"), kernel: text("portable") },
        taps: Taps { layers: vec![1], final_norm: true },
        hidden_size: 8,
        dtype: HiddenStatesDtype::Model,
    }
}

fn states(tokens: usize, start: f32) -> SequenceStates {
    let rows = |offset: f32| to_bytes(&(0..tokens * 8).map(|at| start + offset + at as f32).collect::<Vec<_>>(), Dtype::Float32);
    SequenceStates { index: 0, tokens, formats: vec![RowFormat::Plain(Dtype::Float32); 2], taps: vec![rows(0.0), rows(0.5)] }
}

fn sample(number: u32) -> SampleKey {
    SampleKey::of(&[number, 1, 2])
}

fn open(folder: &tempfile::TempDir) -> StateCache {
    StateCache::open(folder.path(), key(), 1 << 20).unwrap()
}

fn overwrite(path: &Path, offset: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[0xAB], offset).unwrap();
}

#[test]
fn what_was_put_is_read_after_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(&folder);
    cache.put_all(&[(sample(0), &states(3, 0.0)), (sample(1), &states(200, 7.0))]).unwrap();
    cache.put(&sample(2), &states(1, 9.0)).unwrap();
    let bytes = cache.bytes();
    assert_eq!(bytes, key().estimate([3, 200, 1]));
    drop(cache);
    let cache = open(&folder);
    assert_eq!((cache.len(), cache.bytes(), cache.damaged()), (3, bytes, 0));
    assert_eq!(cache.get(&sample(1)).unwrap().unwrap(), states(200, 7.0));
    assert_eq!(cache.get(&sample(2)).unwrap().unwrap(), states(1, 9.0));
    assert!(cache.get(&sample(3)).unwrap().is_none());
}

#[test]
fn a_damaged_record_is_named_once_then_missing_then_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(&folder);
    cache.put_all(&[(sample(0), &states(3, 0.0)), (sample(1), &states(3, 7.0))]).unwrap();
    overwrite(&cache.path, HEADER_BYTES as u64 + 5);
    let error = cache.get(&sample(0)).unwrap_err();
    assert!(matches!(error, CacheError::Damaged { offset: 0, tokens: 3, .. }), "{error}");
    assert!(cache.get(&sample(0)).unwrap().is_none());
    assert!(!cache.contains(&sample(0)));
    assert_eq!(cache.damaged(), 1);
    cache.put(&sample(0), &states(3, 0.0)).unwrap();
    drop(cache);
    let cache = open(&folder);
    assert_eq!(cache.get(&sample(0)).unwrap().unwrap(), states(3, 0.0));
    assert_eq!(cache.get(&sample(1)).unwrap().unwrap(), states(3, 7.0));
}

#[test]
fn a_damaged_header_costs_one_record() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(&folder);
    cache.put_all(&[(sample(0), &states(200, 0.0)), (sample(1), &states(3, 7.0))]).unwrap();
    overwrite(&cache.path, 9);
    drop(cache);
    let cache = open(&folder);
    assert!(!cache.contains(&sample(0)));
    assert!(cache.damaged() > 0);
    assert_eq!(cache.get(&sample(1)).unwrap().unwrap(), states(3, 7.0));
}

#[test]
fn every_cut_of_the_file_leaves_whole_records_and_room_to_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(&folder);
    for number in 0..3 {
        cache.put(&sample(number), &states(100, number as f32)).unwrap();
    }
    let (path, length) = (cache.path.clone(), cache.bytes());
    drop(cache);
    for cut in (0..length).rev().step_by(1777) {
        OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
        let cache = open(&folder);
        assert_eq!(cache.len() as u64, cut / key().estimate([100]));
        assert_eq!(cache.damaged(), 0, "a torn tail is not damage");
        for number in 0..cache.len() as u32 {
            assert_eq!(cache.get(&sample(number)).unwrap().unwrap(), states(100, number as f32));
        }
    }
    let cache = open(&folder);
    cache.put(&sample(5), &states(2, 5.0)).unwrap();
    drop(cache);
    assert_eq!(open(&folder).get(&sample(5)).unwrap().unwrap(), states(2, 5.0));
}

#[test]
fn the_quota_refuses_by_name_and_keeps_what_fits() {
    let folder = tempfile::tempdir().unwrap();
    let cache = StateCache::open(folder.path(), key(), 3 * ALIGNMENT).unwrap();
    let small = states(3, 0.0);
    let records: Vec<_> = (0..4).map(|number| (sample(number), &small)).collect();
    let error = cache.put_all(&records).unwrap_err();
    assert!(matches!(error, CacheError::Full { needed: 16384, quota: 12288, .. }), "{error}");
    assert_eq!(cache.len(), 3);
}

#[test]
fn a_smaller_quota_drops_the_records_beyond_it() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(&folder);
    (0..4).for_each(|number| cache.put(&sample(number), &states(3, number as f32)).unwrap());
    drop(cache);
    let cache = StateCache::open(folder.path(), key(), 2 * ALIGNMENT + 1).unwrap();
    assert_eq!((cache.len(), cache.bytes(), fs::metadata(&cache.path).unwrap().len()), (2, 2 * ALIGNMENT, 2 * ALIGNMENT));
    assert_eq!(cache.get(&sample(1)).unwrap().unwrap(), states(3, 1.0));
    assert!(matches!(cache.put(&sample(2), &states(3, 2.0)), Err(CacheError::Full { .. })));
    drop(cache);
    assert!(StateCache::open(folder.path(), key(), 0).unwrap().is_empty());
}

#[test]
fn a_cache_that_gave_way_takes_no_room_and_is_used_again_when_it_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(&folder);
    assert!(!cache.give_way(), "an empty one has nothing to give");
    drop(cache);
    let cache = open(&folder);
    cache.put(&sample(0), &states(200, 0.0)).unwrap();
    assert!(cache.give_way());
    assert_eq!((cache.len(), cache.bytes(), fs::metadata(&cache.path).unwrap().len()), (0, 0, 0));
    assert!(cache.get(&sample(0)).unwrap().is_none());
    assert!(matches!(cache.put(&sample(0), &states(3, 0.0)), Err(CacheError::Full { quota: 0, .. })));
    assert!(!cache.give_way());
    drop(cache);
    open(&folder).put(&sample(0), &states(3, 0.0)).unwrap();
}

#[test]
fn another_shape_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut wrong = states(3, 0.0);
    wrong.taps.pop();
    assert!(matches!(open(&folder).put(&sample(0), &wrong), Err(CacheError::Shape { expected: 192, found: 96 })));
}

#[test]
fn a_cache_is_open_once_and_another_key_clears_it() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(&folder);
    cache.put(&sample(0), &states(3, 0.0)).unwrap();
    assert!(matches!(StateCache::open(folder.path(), key(), 1 << 20), Err(CacheError::InUse(_))));
    let mut other = key();
    other.numerics.kernel = "avx2_f32".to_owned();
    assert!(StateCache::open(folder.path(), other.clone(), 1 << 20).unwrap().is_empty());
    assert!(cache.path.exists(), "a cache in use is left alone");
    drop(cache);
    StateCache::open(folder.path(), other, 1 << 20).unwrap();
    assert!(open(&folder).is_empty());
}

/// The layout of the version before: 88 bytes of header, eight zeros, and the SHA-256 of these 96.
fn forget_the_quick_checksum(path: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, offset).unwrap();
    assert_ne!(header[88..96], [0; 8]);
    header[88..96].fill(0);
    let own = Sha256::digest(&header[..96]);
    header[96..].copy_from_slice(&own);
    file.write_all_at(&header, offset).unwrap();
}

#[test]
fn records_of_the_version_before_are_read_and_their_damage_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(&folder);
    cache.put_all(&[(sample(0), &states(3, 0.0)), (sample(1), &states(3, 7.0))]).unwrap();
    let path = cache.path.clone();
    drop(cache);
    forget_the_quick_checksum(&path, 0);
    forget_the_quick_checksum(&path, ALIGNMENT);
    overwrite(&path, ALIGNMENT + HEADER_BYTES as u64 + 5);
    let cache = open(&folder);
    assert_eq!(cache.get(&sample(0)).unwrap().unwrap(), states(3, 0.0));
    assert!(matches!(cache.get(&sample(1)), Err(CacheError::Damaged { offset: ALIGNMENT, .. })));
}

/// As the version before reads them.
#[test]
fn records_are_such_as_the_version_before_reads() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(&folder);
    let states = states(3, 7.0);
    cache.put(&sample(1), &states).unwrap();
    let bytes = fs::read(&cache.path).unwrap();
    assert_eq!((&bytes[..8], &bytes[8..40], &bytes[40..44]), (&b"carryon1"[..], &sample(1).0[..], &3u32.to_le_bytes()[..]));
    let rows = states.taps.concat();
    assert_eq!((&bytes[48..56], &bytes[56..88]), (&(rows.len() as u64).to_le_bytes()[..], &Sha256::digest(&rows)[..]));
    assert_eq!(bytes[96..128], Sha256::digest(&bytes[..96])[..]);
    assert_eq!(bytes[128..][..rows.len()], rows);
}

fn open_shared(folder: &tempfile::TempDir, key: CacheKey) -> StateCache {
    StateCache::open_shared(folder.path(), key, 1 << 20).unwrap()
}

fn turn(cache: &StateCache, number: u32) -> Turn {
    cache.get_or_claim(&sample(number), Duration::ZERO).unwrap_err()
}

#[test]
fn processes_of_a_shared_cache_read_each_other_s_states_and_take_turns() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (open_shared(&folder, key()), open_shared(&folder, key()));
    let Turn::Ours(claim) = turn(&first, 0) else { panic!("nobody else has it") };
    assert!(matches!(turn(&second, 0), Turn::Theirs) && matches!(turn(&first, 0), Turn::Theirs));
    assert!(matches!(turn(&second, 1), Turn::Ours(_)), "each sequence has its own");
    first.put(&sample(0), &states(200, 7.0)).unwrap();
    drop(claim);
    assert_eq!(second.get_or_claim(&sample(0), Duration::ZERO).unwrap(), states(200, 7.0));
    drop((first, second));
    let third = open_shared(&folder, key());
    assert_eq!((third.len(), third.bytes()), (1, key().estimate([200])));
    assert_eq!(third.get(&sample(0)).unwrap().unwrap(), states(200, 7.0));
    let path = third.path.clone();
    drop(third);
    assert!(!path.exists(), "who added nothing leaves nothing");
}

#[test]
fn claims_of_a_process_that_is_gone_or_was_waited_for_too_long_are_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (open_shared(&folder, key()), open_shared(&folder, key()));
    let Turn::Ours(claim) = turn(&first, 0) else { panic!("nobody else has it") };
    let Err(Turn::Ours(taken)) = second.get_or_claim(&sample(0), shared::CLAIM_PATIENCE) else { panic!("not waited for longer") };
    drop(claim);
    assert!(matches!(turn(&first, 0), Turn::Theirs), "a claim that was taken over is not given back by who had it");
    drop(taken);
    let Turn::Ours(claim) = turn(&first, 0) else { panic!("free again") };
    first.put(&sample(5), &states(3, 0.0)).unwrap();
    // As a kill leaves it: the claim is there, its holder's lock is not.
    std::mem::forget(claim);
    drop(first);
    assert!(matches!(turn(&second, 0), Turn::Ours(_)));
}

#[test]
fn states_of_more_taps_serve_a_sweep_over_fewer_and_never_the_other_way() {
    let folder = tempfile::tempdir().unwrap();
    let wide = open_shared(&folder, key());
    let narrow = open_shared(&folder, CacheKey { taps: Taps { layers: vec![], final_norm: true }, ..key() });
    let Turn::Ours(claim) = turn(&wide, 0) else { panic!("nobody else has it") };
    narrow.refresh();
    assert!(matches!(turn(&narrow, 0), Turn::Theirs));
    wide.put(&sample(0), &states(3, 7.0)).unwrap();
    drop(claim);
    let mut expected = states(3, 7.0);
    expected.taps.remove(0);
    expected.formats.remove(0);
    assert_eq!(narrow.get_or_claim(&sample(0), Duration::ZERO).unwrap(), expected);
    narrow
        .put(
            &sample(1),
            &SequenceStates {
                formats: vec![RowFormat::Plain(Dtype::Float32)],
                taps: vec![states(2, 0.0).taps[1].clone()],
                ..states(2, 0.0)
            },
        )
        .unwrap();
    assert!(matches!(turn(&wide, 1), Turn::Ours(_)));
    let other = CacheKey { numerics: Numerics { kernel: "avx2_f32".to_owned(), ..key().numerics }, ..key() };
    assert!(open_shared(&folder, other).is_empty());
}

#[test]
fn every_cut_of_another_process_s_file_leaves_whole_records() {
    let folder = tempfile::tempdir().unwrap();
    let writer = open_shared(&folder, key());
    (0..3).for_each(|number| writer.put(&sample(number), &states(100, number as f32)).unwrap());
    let (path, length) = (writer.path.clone(), writer.bytes());
    for cut in (0..length).rev().step_by(1777) {
        let reader = open_shared(&folder, key());
        OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
        let whole = (cut / key().estimate([100])) as u32;
        assert!((0..whole).all(|number| reader.get(&sample(number)).unwrap().unwrap() == states(100, number as f32)));
        assert_eq!(open_shared(&folder, key()).len() as u32, whole);
    }
}

#[test]
fn a_record_that_fills_its_pages_is_seen_when_its_header_has_come() {
    let folder = tempfile::tempdir().unwrap();
    let writer = open_shared(&folder, key());
    writer.put(&sample(0), &states(62, 0.0)).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&writer.path).unwrap();
    let mut header = [0; HEADER_BYTES];
    assert_eq!(file.metadata().unwrap().len(), ALIGNMENT, "no byte is left over");
    file.read_exact_at(&mut header, 0).unwrap();
    // As while it is written: the rows first.
    file.write_all_at(&[0; HEADER_BYTES], 0).unwrap();
    let reader = open_shared(&folder, key());
    assert!(reader.is_empty());
    file.write_all_at(&header, 0).unwrap();
    assert_eq!(reader.get_or_claim(&sample(0), Duration::ZERO).unwrap(), states(62, 0.0));
}
