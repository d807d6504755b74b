//! Weights in blocks of 8 and 4 bits against bf16 weights of the same file.

use carryon_crds::pool::Dtype;
use carryon_worker::kernel::{Backend, Bits, Stored};
use carryon_worker::model::gguf::Gguf;
use carryon_worker::text::Tokenizer;

use super::common::engine::{Engine, candle, cpu};
use super::{decodes, smollm2, states, vocabulary};

/// English text that does not change.
fn tokens() -> Vec<u32> {
    let text = std::fs::read_to_string("../LICENSE").unwrap();
    let tokenizer = Tokenizer::from_vocabulary(&vocabulary(&Gguf::open(&smollm2()).unwrap())).unwrap();
    tokenizer.encode(&text, false).unwrap()[..896].to_vec()
}

/// Final states and logits of the text, 128 tokens at a time.
fn run<B: Backend>(model: &Engine<B>, tokens: &[u32]) -> (Vec<f32>, Vec<f32>) {
    let finals: Vec<f32> = tokens.chunks(128).flat_map(|tokens| states(model, tokens).pop().unwrap()).collect();
    let logits = model.logits(&finals);
    (finals, logits)
}

/// Mean KL divergence in nats of the second's predictions from the first's, and the share of tokens on whose likeliest successor they agree.
fn divergence(of: &[f32], from: &[f32], vocabulary: usize) -> (f64, f64) {
    let log_sum = |row: &[f32]| row.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln();
    let best = |row: &[f32]| row.iter().enumerate().max_by(|one, other| one.1.total_cmp(other.1)).map(|(index, _)| index);
    let (mut sum, mut same, rows) = (0.0, 0, of.len() / vocabulary);
    for (of, from) in of.chunks(vocabulary).zip(from.chunks(vocabulary)) {
        let (own, other) = (log_sum(of), log_sum(from));
        let logarithms = of.iter().zip(from).map(|(of, from)| (f64::from(*of) - own, f64::from(*from) - other));
        sum += logarithms.map(|(of, from)| of.exp() * (of - from)).sum::<f64>();
        same += usize::from(best(of) == best(from));
    }
    (sum / rows as f64, same as f64 / rows as f64)
}

#[test]
fn smollm2_in_blocks_predicts_what_it_predicts_in_bf16_from_half_and_a_third_of_the_memory() {
    let tokens = tokens();
    let plain = Engine::load(&smollm2(), Dtype::Bfloat16, cpu(2));
    let (_, logits) = run(&plain, &tokens);
    let (memory, vocabulary) = (plain.model.weight_bytes() as f64, plain.model.config.vocab_size);
    for (bits, share, most, least_same) in [(Bits::Q8, 0.55, 1e-2, 0.93), (Bits::Q4, 0.32, 0.15, 0.75)] {
        let model = Engine::load(&smollm2(), Stored::Blocks(bits), cpu(2));
        let used = model.model.weight_bytes() as f64 / memory;
        let (_, found) = run(&model, &tokens);
        let (kl, same) = divergence(&logits, &found, vocabulary);
        println!("{bits:?}: {used:.3} of the memory, KL {kl:.2e} nats, {:.1} % the same token", 100.0 * same);
        assert!(used <= share && kl <= most && same >= least_same, "{bits:?}: {used:.3} of the memory, KL {kl:.2e}, {same:.3} the same");
        decodes(&model, &tokens[..70], &states(&model, &tokens[..70]), 0.0);
        // candle computes with the same numbers.
        let other = Engine::load(&smollm2(), Stored::Blocks(bits), candle());
        let (_, logits) = run(&other, &tokens[..128]);
        let (kl, same) = divergence(&found[..logits.len()], &logits, vocabulary);
        assert!(kl <= 1e-2 && same >= 0.9, "{bits:?} on candle: KL {kl:.2e}, {same:.3} the same");
    }
}
