//! A sequence's states do not depend on its neighbours, on how it is cut, or on the number of threads: equal bits.

#![allow(clippy::unwrap_used)]

mod common;

use std::ops::ControlFlow;
use std::path::Path;

use carryon_crds::common::Taps;
use carryon_crds::pool::Dtype;
use carryon_worker::kernel::Threads;
use carryon_worker::model::{Kv, Model, Slot};
use common::tiny::Tiny;
use common::{model_path, tokens};

fn load(path: &Path, dtype: Dtype, threads: usize) -> Model {
    Model::load(path, dtype, Threads::new(threads)).unwrap()
}

fn all_taps(model: &Model) -> Taps {
    Taps { layers: (0..=model.config.num_hidden_layers as u32).collect(), final_norm: true }
}

/// Runs `sequences`, each continuing its cache, and returns per sequence, per tap, the bits of its rows.
fn states(model: &Model, sequences: &[&[u32]], caches: &mut [Kv]) -> Vec<Vec<Vec<u32>>> {
    let mut slots: Vec<_> = sequences.iter().zip(caches).map(|(tokens, kv)| Slot { tokens, kv }).collect();
    let states = model.forward(&mut slots, &all_taps(model), &mut || ControlFlow::Continue(())).unwrap();
    assert_eq!(states.rows, sequences.iter().map(|tokens| tokens.len()).sum::<usize>());
    let width = model.config.hidden_size;
    let mut first = 0;
    let mut parts = Vec::new();
    for tokens in sequences {
        let rows = first * width..(first + tokens.len()) * width;
        parts.push(states.taps.iter().map(|tap| tap[rows.clone()].iter().map(|value| value.to_bits()).collect()).collect());
        first += tokens.len();
    }
    parts
}

fn alone(model: &Model, tokens: &[u32]) -> Vec<Vec<u32>> {
    states(model, &[tokens], &mut [model.new_kv()]).remove(0)
}

/// Runs `tokens` cut at `cuts`, joined again.
fn chunked(model: &Model, tokens: &[u32], lengths: impl Iterator<Item = usize>) -> Vec<Vec<u32>> {
    let mut caches = [model.new_kv()];
    let mut joined = vec![Vec::new(); model.config.num_hidden_layers + 2];
    let mut first = 0;
    for length in lengths {
        let end = (first + length).min(tokens.len());
        let part = states(model, &[&tokens[first..end]], &mut caches).remove(0);
        joined.iter_mut().zip(part).for_each(|(joined, part)| joined.extend(part));
        first = end;
    }
    assert_eq!((first, caches[0].len()), (tokens.len(), tokens.len()));
    joined
}

fn check_invariant(path: &Path, dtype: Dtype, length: usize) {
    let model = load(path, dtype, 2);
    let vocabulary = model.config.vocab_size;
    let [one, two, three] = [tokens(length, vocabulary, 1), tokens(length / 3, vocabulary, 2), tokens(1, vocabulary, 3)];
    let reference = alone(&model, &one);
    assert!(reference.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()));

    assert_eq!(reference, alone(&load(path, dtype, 1), &one), "one thread");
    assert_eq!(reference, alone(&load(path, dtype, 5), &one), "five threads");
    assert_eq!(reference, chunked(&model, &one, [7, 32, 1, 24, length].into_iter()), "chunked");
    assert_eq!(reference, chunked(&model, &one, std::iter::repeat_n(1, length)), "token by token");

    let mut caches = [model.new_kv(), model.single_pass_kv(), model.new_kv(), model.new_kv()];
    let ragged = states(&model, &[&two, &one, &three, &one], &mut caches);
    assert_eq!(reference, ragged[1], "ragged, single pass");
    assert_eq!(reference, ragged[3], "ragged");
    assert_eq!(alone(&model, &two), ragged[0], "its neighbour");
    assert_eq!(alone(&model, &three), ragged[2], "its one-token neighbour");

    // Decoding two sequences together, from different positions.
    let mut caches = [model.new_kv(), model.new_kv()];
    states(&model, &[&one[..length - 3], &two[..2]], &mut caches);
    let width = model.config.hidden_size;
    for step in 0..3 {
        let position = length - 3 + step;
        let both = states(&model, &[&one[position..=position], &two[2 + step..3 + step]], &mut caches);
        for (tap, whole) in both[0].iter().zip(&reference) {
            assert_eq!(tap, &whole[position * width..(position + 1) * width], "decode beside another");
        }
    }
    caches[0].truncate(10);
    let again = states(&model, &[&one[10..]], &mut caches[..1]).remove(0);
    assert!(again.iter().zip(&reference).all(|(again, whole)| again[..] == whole[10 * width..]), "after forgetting positions");
}

#[test]
fn tiny_llama_is_row_invariant() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    check_invariant(folder.path(), Dtype::Bfloat16, 100);
    check_invariant(folder.path(), Dtype::Float32, 100);
}

#[test]
fn mistral_with_a_window_is_row_invariant() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = Tiny { tied: true, ..Tiny::default() };
    tiny.write(folder.path());
    let mut config = tiny.config();
    config["model_type"] = "mistral".into();
    config["sliding_window"] = 37.into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    check_invariant(folder.path(), Dtype::Bfloat16, 100);
    check_invariant(folder.path(), Dtype::Float32, 100);
}

#[test]
fn smollm2_is_row_invariant() {
    check_invariant(&model_path(), Dtype::Bfloat16, 80);
}

#[test]
fn gguf_and_safetensors_of_one_model_give_equal_bits() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tiny.gguf");
    let tiny = Tiny::default();
    tiny.write(folder.path());
    std::fs::write(&file, tiny.gguf()).unwrap();
    let tokens = tokens(50, tiny.vocabulary, 1);
    let (left, right) = (load(folder.path(), Dtype::Float32, 2), load(&file, Dtype::Float32, 2));
    assert_eq!(alone(&left, &tokens), alone(&right, &tokens));
    assert_ne!(left.weights_digest(), right.weights_digest());
}

#[test]
fn cancelling_between_layers_leaves_the_cache_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    let model = load(folder.path(), Dtype::Bfloat16, 2);
    let tokens = tokens(60, model.config.vocab_size, 1);
    let reference = alone(&model, &tokens);
    let mut caches = [model.new_kv()];
    states(&model, &[&tokens[..20]], &mut caches);
    let mut calls = 0;
    let mut pause = || {
        calls += 1;
        // Another pass may run meanwhile.
        assert_eq!(alone(&model, &tokens), reference);
        if calls == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let cancelled = model.forward(&mut [Slot { tokens: &tokens[20..], kv: &mut caches[0] }], &all_taps(&model), &mut pause);
    assert!(cancelled.is_none() && calls == 2 && caches[0].len() == 20);
    let width = model.config.hidden_size;
    let rest = states(&model, &[&tokens[20..]], &mut caches).remove(0);
    assert!(rest.iter().zip(&reference).all(|(rest, whole)| rest[..] == whole[20 * width..]));
}

#[test]
fn states_are_rounded_to_the_dtype_and_logits_are_those_of_the_rounded_rows() {
    let folder = tempfile::tempdir().unwrap();
    Tiny { tied: true, ..Tiny::default() }.write(folder.path());
    let model = load(folder.path(), Dtype::Bfloat16, 2);
    let tokens = tokens(9, model.config.vocab_size, 1);
    let states = alone(&model, &tokens);
    assert!(states.iter().flatten().all(|bits| bits & 0xffff == 0));
    let final_states: Vec<f32> = states.last().unwrap().iter().map(|bits| f32::from_bits(*bits)).collect();
    let (logits, width) = (model.lm_head().logits(&final_states), model.config.hidden_size);
    let mut row = vec![0.0; width];
    for (index, logit) in logits.iter().enumerate() {
        model.lm_head().row(index % model.config.vocab_size, &mut row);
        let state = &final_states[index / model.config.vocab_size * width..][..width];
        let exact: f64 = row.iter().zip(state).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        assert!((exact - f64::from(*logit)).abs() < 1e-4, "{exact} {logit}");
    }
    assert_eq!((model.lm_head().backward().rows(), model.lm_head().backward().cols()), (width, model.config.vocab_size));
}
