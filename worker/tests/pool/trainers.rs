use carryon_crds::common::{TapPreset, Taps};
use carryon_crds::job::HiddenStatesDtype;
use carryon_crds::pool::{Dtype, Engine};
use carryon_worker::base::Placement;
use carryon_worker::exchange::wire::HiddenStatesRequest;
use carryon_worker::exchange::{LossRequest, SequenceStates};
use carryon_worker::head::loss::{Against, LossWeights, lm_loss};
use carryon_worker::kernel::Backend as _;
use carryon_worker::numbers::{RowFormat, from_bytes, into_bytes, to_bytes};
use futures::StreamExt as _;

use crate::common::{model_path, tiny::Random, tokens};
use crate::harness::{ENGINE, Pool, checkpoint};

async fn fetch(pool: &Pool, sequences: &[Vec<u32>], taps: &Taps) -> Vec<SequenceStates> {
    let request = HiddenStatesRequest::new(sequences.to_vec(), taps.clone());
    let mut states: Vec<_> = pool.client.hidden_states(request).map(Result::unwrap).collect().await;
    states.sort_by_key(|states| states.index);
    states
}

#[tokio::test(flavor = "multi_thread")]
async fn hidden_states_are_the_models_bits() {
    for dtype in [Dtype::Bfloat16, Dtype::Float32] {
        let pool = Pool::tiny(dtype, ENGINE).await;
        let taps = Taps { layers: vec![3, 0, 2], final_norm: true };
        // Ragged, more than a batch, one longer than a batch.
        let sequences: Vec<_> = [5, 17, 1, 70, 20, 31].iter().map(|length| tokens(*length, 101, *length as u64)).collect();
        let states = fetch(&pool, &sequences, &taps).await;
        assert_eq!(states.len(), sequences.len());
        for (sequence, states) in sequences.iter().zip(&states) {
            assert_eq!((states.tokens, &states.formats), (sequence.len(), &vec![RowFormat::Plain(dtype); taps.count()]));
            let alone = pool.states(sequence, &taps);
            for (tap, rows) in alone.iter().enumerate() {
                assert_eq!(states.taps[tap], to_bytes(rows, dtype), "tap {tap} of {} tokens", sequence.len());
                assert_eq!(&states.tap(tap), rows, "the wire loses nothing");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_travel_in_eight_bits_where_a_trainer_asks_for_it_and_final_as_it_is() {
    let (pool, taps) = (Pool::tiny(Dtype::Bfloat16, ENGINE).await, Taps { layers: vec![0, 3], final_norm: true });
    let sequences: Vec<_> = [5, 70, 20].iter().map(|length| tokens(*length, 101, *length as u64)).collect();
    let plain = fetch(&pool, &sequences, &taps).await;
    let request = HiddenStatesRequest { dtype: HiddenStatesDtype::Float8E4M3, ..HiddenStatesRequest::new(sequences, taps) };
    let mut small: Vec<SequenceStates> = pool.client.hidden_states(request).map(Result::unwrap).collect().await;
    small.sort_by_key(|states| states.index);
    let width = pool.engine.model.config.hidden_size;
    for (small, plain) in small.iter().zip(&plain) {
        for (tap, format) in [RowFormat::Float8, RowFormat::Float8, RowFormat::Plain(Dtype::Bfloat16)].into_iter().enumerate() {
            assert_eq!((small.formats[tap], &small.taps[tap]), (format, &format.convert(plain.taps[tap].clone(), Dtype::Bfloat16, width)));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_say_how_long_they_are_before_they_come() {
    let pool = Pool::tiny(Dtype::Bfloat16, ENGINE).await;
    let rows = to_bytes(&vec![0.5; 3 * 40], Dtype::Bfloat16);
    let loss = LossRequest { hidden_size: 40, dtype: Dtype::Bfloat16, x: rows, delta: None, targets: Some(vec![1, 2, 3]), gradient: true };
    let http = reqwest::Client::new();
    let states = |dtype| HiddenStatesRequest {
        dtype,
        ..HiddenStatesRequest::new(vec![vec![1; 50], vec![2; 3]], Taps { layers: vec![1, 2], final_norm: true })
    };
    for request in [
        http.post(format!("{}/v1/hidden-states", pool.url)).json(&states(HiddenStatesDtype::Model)),
        http.post(format!("{}/v1/hidden-states", pool.url)).json(&states(HiddenStatesDtype::Float8E4M3)),
        http.post(format!("{}/v1/loss", pool.url)).body(loss.encode().concat()),
        http.get(format!("{}/v1/lm-head", pool.url)),
    ] {
        let answer = request.send().await.unwrap();
        let (told, url) = (answer.content_length(), answer.url().clone());
        assert_eq!(told, Some(answer.bytes().await.unwrap().len() as u64), "{url}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hidden_states_of_the_real_model_are_its_bits() {
    let pool = Pool::start(&model_path(), Dtype::Bfloat16, Engine::default()).await;
    let taps = Taps::of(TapPreset::Balanced, 30);
    let sequences = [tokens(24, 49_152, 1), tokens(9, 49_152, 2)];
    for (sequence, states) in sequences.iter().zip(fetch(&pool, &sequences, &taps).await) {
        for (rows, tap) in pool.states(sequence, &taps).iter().zip(0..) {
            assert_eq!(&states.tap(tap), rows);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_remote_loss_is_the_local_loss() {
    for dtype in [Dtype::Bfloat16, Dtype::Float32] {
        let pool = Pool::tiny(dtype, ENGINE).await;
        let (rows, width) = (401, 40);
        let mut random = Random(3);
        let mut numbers = |scale: f32| (0..rows * width).map(|_| random.unit() * scale).collect::<Vec<_>>();
        let (x, delta) = (to_bytes(&numbers(2.0), dtype), numbers(0.3));
        let mut plain = vec![0.0; rows * width];
        from_bytes(&x, dtype, &mut plain);
        let targets = tokens(rows, 101, 4);
        let model = &pool.engine.model;
        let head = model.lm_head();
        let weights = LossWeights { forward: head.forward(), backward: Some(head.backward()), dtype, softcap: None };
        for (delta, targets) in [(None, Some(&targets)), (Some(&delta), Some(&targets)), (Some(&delta), None)] {
            let output = delta.map(|delta| (delta.as_slice(), 1.0));
            let against = targets.map_or(Against::Base, |targets| Against::Tokens(targets));
            let local = lm_loss(&model.backend, &weights, &plain, output, against).unwrap();
            let delta = delta.cloned().map(into_bytes);
            let request = LossRequest { hidden_size: width, dtype, x: x.clone(), delta, targets: targets.cloned(), gradient: true };
            let remote = pool.client.loss(&request).await.unwrap();
            assert_eq!(remote.loss, local.loss);
            assert_eq!(remote.gradient.unwrap(), local.gradient);
            let without = pool.client.loss(&LossRequest { gradient: false, ..request }).await.unwrap();
            assert_eq!((without.loss, without.gradient), (local.loss, None));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lm_head_that_is_handed_out_is_the_models() {
    for dtype in [Dtype::Bfloat16, Dtype::Float32] {
        let pool = Pool::tiny(dtype, ENGINE).await;
        let bytes = pool.client.lm_head(&pool.description).await.unwrap();
        let model = &pool.engine.model;
        assert_eq!(bytes, model.backend.read_matrix(model.lm_head().forward(), 0..101).unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_is_slow_or_gone_does_not_stop_the_pool() {
    // States of 38 megabytes: more than sockets hold beside a reader's part of the least room, 16 MiB.
    let folder = checkpoint(7);
    let (engine, placement) =
        (Engine { max_num_batched_tokens: 4096, ..ENGINE }, Placement { memory_limit: Some(1 << 30), ..Placement::cpu(2) });
    let pool = Pool::placed(folder.path(), Dtype::Float32, engine, placement).await;
    let taps = Taps { layers: vec![0, 1, 2, 3], final_norm: true };
    let sequences: Vec<_> = (0..400).map(|seed| tokens(120, 101, seed)).collect();
    let mut slow = Box::pin(pool.client.hidden_states(HiddenStatesRequest::new(sequences.clone(), taps.clone())));
    let first = slow.next().await.unwrap().unwrap();
    assert_eq!(first.tokens, 120);
    // Not all of them were computed, and others are served meanwhile.
    assert!(pool.metric("carryon_tokens_total{class=\"training\"}").await < 48_000.0);
    assert_eq!(fetch(&pool, &sequences[..3], &taps).await.len(), 3);
    // It goes on when it reads on, and loses nothing.
    let rest: Vec<_> = slow.map(|states| states.unwrap().index).collect().await;
    assert_eq!(rest.len(), 399);
    // One that goes away leaves nothing behind.
    let mut gone = Box::pin(pool.client.hidden_states(HiddenStatesRequest::new(sequences, taps)));
    gone.next().await.unwrap().unwrap();
    drop(gone);
    pool.wait_for("carryon_queue_length{state=\"training\"}", 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn serving_runs_between_the_layers_of_a_training_batch() {
    let pool = Pool::tiny(Dtype::Float32, Engine { max_num_batched_tokens: 256, ..ENGINE }).await;
    let taps = Taps { layers: vec![1], final_norm: true };
    let sequences: Vec<_> = (0..100).map(|seed| tokens(32, 101, seed)).collect();
    let prompt = tokens(9, 101, 5);
    let expected = pool.greedy(&prompt, 30, None);
    let request = carryon_worker::exchange::wire::GenerateRequest::greedy(prompt, 30);
    let (states, answer) = tokio::join!(fetch(&pool, &sequences, &taps), pool.answer(&request));
    assert_eq!(answer, expected);
    let alone = pool.states(&sequences[50], &taps);
    assert_eq!(states[50].tap(0), alone[0]);
}
