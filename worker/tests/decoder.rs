//! A sequence's states do not depend on its neighbours, on how it is cut, or on the number of threads: equal bits.

#![allow(clippy::unwrap_used)]

mod common;

use std::ops::ControlFlow;
use std::path::Path;

use carryon_crds::pool::Dtype;
use carryon_worker::kernel::{Backend as _, Cpu, PAGE, PageTable};
use common::engine::{Engine, load};
use common::tiny::Tiny;
use common::{model_path, tokens};

type Model = Engine<Cpu>;

/// Cuts rows of every tap, one sequence after the other, into the bits of each sequence.
fn cut(states: &[Vec<f32>], sequences: &[&[u32]]) -> Vec<Vec<Vec<u32>>> {
    let width = states[0].len() / sequences.iter().map(|tokens| tokens.len()).sum::<usize>();
    let mut first = 0;
    let one = |tokens: &&[u32]| {
        let rows = first * width..(first + tokens.len()) * width;
        first += tokens.len();
        states.iter().map(|tap| tap[rows.clone()].iter().map(|value| value.to_bits()).collect()).collect()
    };
    sequences.iter().map(one).collect()
}

/// Runs `sequences`, each continuing its table, and returns per sequence, per tap, the bits of its rows.
fn states(model: &Model, sequences: &[&[u32]], tables: &mut [PageTable]) -> Vec<Vec<Vec<u32>>> {
    cut(&model.states(sequences, tables, &model.all_taps()), sequences)
}

fn alone(model: &Model, tokens: &[u32]) -> Vec<Vec<u32>> {
    states(model, &[tokens], &mut [PageTable::default()]).remove(0)
}

/// Runs `tokens` cut at `cuts`, joined again.
fn chunked(model: &Model, tokens: &[u32], lengths: impl Iterator<Item = usize>) -> Vec<Vec<u32>> {
    let mut caches = [PageTable::default()];
    let mut joined = vec![Vec::new(); model.all_taps().count()];
    let mut first = 0;
    for length in lengths {
        let end = (first + length).min(tokens.len());
        let part = states(model, &[&tokens[first..end]], &mut caches).remove(0);
        joined.iter_mut().zip(part).for_each(|(joined, part)| joined.extend(part));
        first = end;
    }
    assert_eq!((first, caches[0].length), (tokens.len(), tokens.len()));
    joined
}

fn check_invariant(path: &Path, dtype: Dtype, length: usize) {
    let model = load(path, dtype, 2);
    let vocabulary = model.model.config.vocab_size;
    let [one, two, three] = [tokens(length, vocabulary, 1), tokens(length / 3, vocabulary, 2), tokens(1, vocabulary, 3)];
    let reference = alone(&model, &one);
    assert!(reference.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()));

    assert_eq!(reference, alone(&load(path, dtype, 1), &one), "one thread");
    assert_eq!(reference, alone(&load(path, dtype, 5), &one), "five threads");
    assert_eq!(reference, chunked(&model, &one, [7, 32, 1, 24, length].into_iter()), "chunked");
    assert_eq!(reference, chunked(&model, &one, std::iter::repeat_n(1, length)), "token by token");

    let company: [&[u32]; 4] = [&two, &one, &three, &one];
    let ragged = states(&model, &company, &mut [(); 4].map(|()| PageTable::default()));
    assert_eq!(reference, ragged[1], "ragged");
    assert_eq!(reference, ragged[3], "ragged, last");
    for rows in [usize::MAX, 64, 7] {
        let whole = model.whole(&company, &model.all_taps(), rows, &mut || ControlFlow::Continue(())).unwrap();
        assert_eq!(ragged, cut(&whole, &company), "pages of one layer, pieces of {rows} rows");
    }
    assert_eq!(alone(&model, &two), ragged[0], "its neighbour");
    assert_eq!(alone(&model, &three), ragged[2], "its one-token neighbour");

    // Decoding two sequences together, from different positions.
    let mut caches = [(); 2].map(|()| PageTable::default());
    states(&model, &[&one[..length - 3], &two[..2]], &mut caches);
    let width = model.model.config.hidden_size;
    for step in 0..3 {
        let position = length - 3 + step;
        let both = states(&model, &[&one[position..=position], &two[2 + step..3 + step]], &mut caches);
        for (tap, whole) in both[0].iter().zip(&reference) {
            assert_eq!(tap, &whole[position * width..(position + 1) * width], "decode beside another");
        }
    }
    // Another sequence goes on from the page of this one's beginning.
    let mut shared = [PageTable { pages: caches[0].pages[..1].to_vec(), length: PAGE }];
    let rest = states(&model, &[&one[PAGE..]], &mut shared).remove(0);
    assert!(rest.iter().zip(&reference).all(|(rest, whole)| rest[..] == whole[PAGE * width..]), "from a shared page");
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
    assert_ne!(left.model.weights_digest(), right.model.weights_digest());
}

#[test]
fn another_pass_may_run_between_two_pieces_and_a_pass_may_be_given_up() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    let model = load(folder.path(), Dtype::Bfloat16, 2);
    let tokens = tokens(60, model.model.config.vocab_size, 1);
    let reference = alone(&model, &tokens);
    for last in [2, usize::MAX] {
        let mut calls = 0;
        let mut pause = || {
            calls += 1;
            assert_eq!(alone(&model, &tokens), reference);
            if calls == last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let whole = model.whole(&[&tokens], &model.all_taps(), 25, &mut pause);
        // Three layers of three pieces.
        assert_eq!(calls, last.min(8));
        assert_eq!(whole.is_none(), last == 2);
        assert!(whole.is_none_or(|whole| cut(&whole, &[&tokens])[0] == reference));
    }
}

#[test]
fn states_are_rounded_to_the_dtype_and_logits_are_those_of_the_rounded_rows() {
    let folder = tempfile::tempdir().unwrap();
    Tiny { tied: true, ..Tiny::default() }.write(folder.path());
    let model = load(folder.path(), Dtype::Bfloat16, 2);
    let tokens = tokens(9, model.model.config.vocab_size, 1);
    let states = alone(&model, &tokens);
    assert!(states.iter().flatten().all(|bits| bits & 0xffff == 0));
    let final_states: Vec<f32> = states.last().unwrap().iter().map(|bits| f32::from_bits(*bits)).collect();
    let (logits, width, vocabulary) = (model.logits(&final_states), model.model.config.hidden_size, model.model.config.vocab_size);
    let weight = model.model.backend.read_matrix(model.model.lm_head().forward(), 0..vocabulary).unwrap();
    let weight: Vec<f32> = weight.as_chunks::<2>().0.iter().map(|half| half::bf16::from_le_bytes(*half).to_f32()).collect();
    for (index, logit) in logits.iter().enumerate() {
        let row = &weight[index % vocabulary * width..][..width];
        let state = &final_states[index / vocabulary * width..][..width];
        let exact: f64 = row.iter().zip(state).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        assert!((exact - f64::from(*logit)).abs() < 1e-4, "{exact} {logit}");
    }
    assert_eq!(Cpu::shape(model.model.lm_head().backward()), (width, vocabulary));
}
