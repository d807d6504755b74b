use carryon_crds::common::Taps;
use carryon_crds::job::Task;
use carryon_crds::pool::{Dtype, Engine};
use carryon_worker::exchange::ClientError;
use carryon_worker::exchange::wire::{ClassifyRequest, ErrorCode, FinishReason, GenerateEvent, GenerateRequest, Sampling, Usage};
use carryon_worker::head::{Artifact, Runner};
use futures::StreamExt as _;
use futures::future::join_all;

use crate::common::engine::{class_logits, cpu};
use crate::common::tiny::Tiny;
use crate::common::{model_path, tokens};
use crate::harness::{ENGINE, Pool, tokens_of, with_head};

#[tokio::test(flavor = "multi_thread")]
async fn greedy_answers_are_those_of_whole_forward_passes() {
    for dtype in [Dtype::Bfloat16, Dtype::Float32] {
        let pool = Pool::tiny(dtype, ENGINE).await;
        // The second prompt is longer than a batch.
        for prompt in [tokens(5, 101, 1), tokens(75, 101, 2)] {
            let expected = pool.greedy(&prompt, 20, None);
            assert_eq!(pool.answer(&GenerateRequest::greedy(prompt, 20)).await, expected);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_beside_each_other_answer_as_alone() {
    let pool = Pool::tiny(Dtype::Bfloat16, ENGINE).await;
    let heads = [pool.head(1, Task::CausalLM), pool.head(2, Task::CausalLM)];
    for head in &heads {
        pool.push(head).await;
    }
    // Beyond the heads' window of 24, in chunks, more requests than places.
    let prompts: Vec<_> = (0..9).map(|seed| tokens(3 + 7 * seed as usize, 101, seed)).collect();
    let requests: Vec<_> = prompts
        .iter()
        .enumerate()
        .map(|(place, prompt)| match place % 3 {
            0 => GenerateRequest::greedy(prompt.clone(), 24),
            kind => with_head(prompt.clone(), 24, &heads[kind - 1]),
        })
        .collect();
    let answers = join_all(requests.iter().map(|request| pool.answer(request))).await;
    for (place, (prompt, answer)) in prompts.iter().zip(&answers).enumerate() {
        let head = (place % 3 > 0).then(|| (&heads[place % 3 - 1], 0.75));
        assert_eq!(*answer, pool.greedy(prompt, 24, head), "request {place}");
    }
    let own = |place: usize, head| pool.greedy(&prompts[place], 24, head);
    assert_ne!(own(1, None), own(1, Some((&heads[0], 0.75))), "the heads do something");
}

#[tokio::test(flavor = "multi_thread")]
async fn zero_alpha_gives_the_bases_bits_and_alpha_scales() {
    let pool = Pool::tiny(Dtype::Bfloat16, ENGINE).await;
    let nan = pool.head_with(1, Task::CausalLM, |_| f32::NAN);
    let head = pool.head(1, Task::CausalLM);
    pool.push(&nan).await;
    pool.push(&head).await;
    let prompt = tokens(12, 101, 3);
    let scored = |request: GenerateRequest| GenerateRequest { prompt_logprobs: Some(2), logprobs: Some(3), ..request };
    let base = pool.events(&scored(GenerateRequest::greedy(prompt.clone(), 10))).await.unwrap();
    let bypassed = GenerateRequest { alpha: Some(0.0), ..with_head(prompt.clone(), 10, &nan) };
    assert_eq!(pool.events(&scored(bypassed)).await.unwrap(), base);
    let scaled = GenerateRequest { alpha: Some(2.0), ..with_head(prompt.clone(), 10, &head) };
    assert_eq!(pool.answer(&scaled).await, pool.greedy(&prompt, 10, Some((&head, 2.0))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_is_not_finite_fails_alone() {
    let pool = Pool::tiny(Dtype::Bfloat16, ENGINE).await;
    let (good, nan) = (pool.head(1, Task::CausalLM), pool.head_with(2, Task::CausalLM, |_| f32::NAN));
    pool.push(&good).await;
    pool.push(&nan).await;
    let prompts: Vec<_> = (0..4).map(|seed| tokens(10, 101, seed)).collect();
    let requests = [
        GenerateRequest::greedy(prompts[0].clone(), 20),
        with_head(prompts[1].clone(), 20, &nan),
        with_head(prompts[2].clone(), 20, &good),
    ];
    let outcomes = join_all(requests.iter().map(|request| pool.events(request))).await;
    match &outcomes[1] {
        Err(ClientError::Refused { status: 500, error, .. }) => assert_eq!(error.code, ErrorCode::HeadNotFinite),
        other => panic!("{other:?}"),
    }
    assert_eq!(tokens_of(outcomes[0].as_ref().unwrap()), pool.greedy(&prompts[0], 20, None));
    assert_eq!(tokens_of(outcomes[2].as_ref().unwrap()), pool.greedy(&prompts[2], 20, Some((&good, 0.75))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_whose_finite_row_has_logits_that_are_not_fails_alone() {
    let pool = Pool::tiny(Dtype::Bfloat16, ENGINE).await;
    let (prompt, other, alpha) = (tokens(10, 101, 1), tokens(10, 101, 2), 64.0);
    let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
    let overflows = |head: &Artifact| {
        let rows = pool.rows(&prompt, Some((head, alpha)));
        let last = &rows[rows.len() - rows.len() / prompt.len()..];
        finite(last) && !finite(&pool.engine.logits(last))
    };
    // Its output goes along a row of the LM head.
    let (_, lm_head) = Tiny::default().tensors().remove("lm_head.weight").unwrap();
    let along = |power: i32| {
        let mut head = pool.head(1, Task::CausalLM);
        let width = head.shape.width as usize;
        let output = head.weights.get_mut("output.weight").unwrap();
        output.values.floats_mut().chunks_exact_mut(width).zip(&lm_head).for_each(|(row, value)| row.fill(value * 2f32.powi(power)));
        Artifact::new(head.shape, head.base, head.weights).unwrap()
    };
    let huge = (100..128).map(along).find(overflows).expect("a row that is finite while its logits are not");
    pool.push(&huge).await;
    let greedy = GenerateRequest { alpha: Some(alpha), ..with_head(prompt.clone(), 20, &huge) };
    let sampled = GenerateRequest { temperature: 1.0, logprobs: Some(2), ..greedy.clone() };
    let base = GenerateRequest::greedy(other.clone(), 20);
    let outcomes = join_all([&greedy, &sampled, &base].map(|request| pool.events(request))).await;
    for outcome in &outcomes[..2] {
        match outcome {
            Err(ClientError::Refused { status: 500, error, .. }) => assert_eq!(error.code, ErrorCode::HeadNotFinite),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(tokens_of(outcomes[2].as_ref().unwrap()), pool.greedy(&other, 20, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_can_be_swapped_between_requests() {
    let pool = Pool::tiny(Dtype::Bfloat16, ENGINE).await;
    let (old, new) = (pool.head(1, Task::CausalLM), pool.head(2, Task::CausalLM));
    let (prompt, endpoint) = (tokens(10, 101, 3), pool.endpoint().await);
    pool.push(&old).await;
    assert_eq!(pool.answer(&with_head(prompt.clone(), 8, &old)).await, pool.greedy(&prompt, 8, Some((&old, 0.75))));
    pool.client.delete_head(&endpoint, &old.digest).await.unwrap();
    assert!(!pool.client.has_head(&endpoint, &old.digest).await.unwrap());
    match pool.events(&with_head(prompt.clone(), 8, &old)).await {
        Err(ClientError::HeadMissing { endpoint: at, .. }) => assert_eq!(at, endpoint),
        other => panic!("{other:?}"),
    }
    pool.push(&new).await;
    assert_eq!(pool.answer(&with_head(prompt.clone(), 8, &new)).await, pool.greedy(&prompt, 8, Some((&new, 0.75))));
}

#[tokio::test(flavor = "multi_thread")]
async fn sampling_depends_on_the_seed_and_not_on_the_batch() {
    let pool = Pool::tiny(Dtype::Bfloat16, ENGINE).await;
    let request =
        |seed| GenerateRequest { temperature: 1.2, top_p: 0.9, seed: Some(seed), ..GenerateRequest::greedy(tokens(8, 101, 1), 30) };
    let alone = pool.answer(&request(5)).await;
    let requests: Vec<_> = (3..8).map(request).collect();
    let together = join_all(requests.iter().map(|request| pool.answer(request))).await;
    assert_eq!(together[2], alone);
    assert_ne!(together[1], alone);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_penalised_greedy_answer_is_that_of_whole_forward_passes() {
    let pool = Pool::tiny(Dtype::Float32, ENGINE).await;
    let prompt = tokens(9, 101, 4);
    for sampling in [
        Sampling { frequency_penalty: 1.5, ..Sampling::default() },
        Sampling { presence_penalty: 2.0, ..Sampling::default() },
        Sampling { repetition_penalty: 1.8, ..Sampling::default() },
        Sampling { repetition_penalty: 1.3, frequency_penalty: 0.4, presence_penalty: 0.3, ..Sampling::default() },
        Sampling { logit_bias: vec![(7, 100.0)], frequency_penalty: 2.0, ..Sampling::default() },
    ] {
        let mut expected = prompt.clone();
        for _ in 0..24 {
            let mut logits = pool.logits(&expected, None).pop().unwrap();
            sampling.logit_bias.iter().for_each(|(token, bias)| logits[*token as usize] += bias);
            // vLLM's `apply_penalties`, by the list.
            for token in 0..101u32 {
                let drawn = expected[prompt.len()..].iter().filter(|other| **other == token).count();
                let logit = &mut logits[token as usize];
                if expected.contains(&token) {
                    *logit = if *logit > 0.0 { *logit / sampling.repetition_penalty } else { *logit * sampling.repetition_penalty };
                }
                *logit -= sampling.frequency_penalty * drawn as f32;
                *logit -= sampling.presence_penalty * drawn.min(1) as f32;
            }
            let best = (0..logits.len()).rev().max_by(|one, other| logits[*one].total_cmp(&logits[*other])).unwrap();
            expected.push(best as u32);
        }
        let request = GenerateRequest { sampling: sampling.clone(), ..GenerateRequest::greedy(prompt.clone(), 24) };
        assert_eq!(pool.answer(&request).await, expected[prompt.len()..], "{sampling:?}");
        assert_ne!(expected[prompt.len()..], pool.greedy(&prompt, 24, None), "{sampling:?} does something");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_to_one_prompt_run_it_once_and_are_those_of_sequences_alone() {
    let pool = Pool::start(&model_path(), Dtype::Bfloat16, Engine { max_num_batched_tokens: 32, ..ENGINE }).await;
    let head = pool.head(3, Task::CausalLM);
    let asked = |prompt: &[u32], head: Option<&_>, seed, longest| GenerateRequest {
        temperature: 1.0,
        seed: Some(seed),
        ..head.map_or_else(|| GenerateRequest::greedy(prompt.to_vec(), longest), |head| with_head(prompt.to_vec(), longest, head))
    };
    let run = async || pool.metric("carryon_tokens_total{class=\"serving\"}").await;
    pool.answer(&GenerateRequest::greedy(vec![1], 1)).await;
    for (own, prompt) in [(Some(&head), tokens(65, 49_152, 5)), (None, tokens(65, 49_152, 6))] {
        pool.push(&head).await;
        let requests: Vec<_> = (0..3).map(|seed| asked(&prompt, own, seed, [3, 1, 2][seed as usize])).collect();
        let before = run().await;
        // The prompt takes three passes: the others come while it runs.
        let together = join_all(requests.iter().map(|request| pool.answer(request))).await;
        // Every answer but the last of its tokens runs; two run the prompt's last token again.
        assert_eq!(run().await - before, f64::from(65 + 2 + 2 + 1), "the prompt ran more than once");
        let before = run().await;
        for (request, answer) in requests.iter().zip(together) {
            assert_eq!(answer, pool.answer(request).await);
        }
        // Who comes later goes on from its blocks.
        assert_eq!(run().await - before, f64::from(3 + 2 + 1), "a prompt that is known ran again");
    }
    // So does another head, from the states that were kept with them.
    let (prompt, other) = (tokens(65, 49_152, 7), pool.head(4, Task::CausalLM));
    pool.push(&other).await;
    let of_first = pool.answer(&with_head(prompt.clone(), 2, &head)).await;
    let before = run().await;
    let of_other = pool.answer(&with_head(prompt.clone(), 2, &other)).await;
    assert_eq!(run().await - before, f64::from(1 + 1), "the base ran again for another head");
    assert_eq!(of_first, pool.greedy(&prompt, 2, Some((&head, 0.75))));
    assert_eq!(of_other, pool.greedy(&prompt, 2, Some((&other, 0.75))));
    // Another head has other keys and values; who scores the prompt, and another prompt, run their own.
    let shorter = GenerateRequest::greedy(prompt[..64].to_vec(), 2);
    let scoring = GenerateRequest { prompt_logprobs: Some(0), ..GenerateRequest::greedy(prompt.clone(), 2) };
    let mixed = [with_head(prompt.clone(), 2, &head), GenerateRequest::greedy(prompt.clone(), 2), shorter, scoring];
    pool.push(&head).await;
    let together = join_all(mixed.iter().map(|request| pool.answer(request))).await;
    for (request, answer) in mixed.iter().zip(together) {
        assert_eq!(answer, pool.answer(request).await);
    }
    // Who scores a prompt shares no block of it; who comes meanwhile goes on from all of its pages.
    let prompt = tokens(100, 49_152, 9);
    let scoring = GenerateRequest { prompt_logprobs: Some(0), ..GenerateRequest::greedy(prompt.clone(), 2) };
    let later = GenerateRequest::greedy(prompt.clone(), 2);
    let (_, answer) = futures::join!(pool.answer(&scoring), pool.answer(&later));
    assert_eq!(answer, pool.greedy(&prompt, 2, None));
    // Whoever runs the prompt may go away before it has run.
    let request = asked(&tokens(65, 49_152, 8), None, 1, 2);
    let gone = tokio::time::timeout(std::time::Duration::from_millis(20), pool.events(&request));
    assert_eq!(futures::join!(gone, pool.answer(&request)).1, pool.answer(&request).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_tokens_end_an_answer_and_are_not_part_of_it() {
    let pool = Pool::tiny(Dtype::Float32, ENGINE).await;
    let prompt = tokens(6, 101, 9);
    let greedy = pool.greedy(&prompt, 12, None);
    let stop = greedy[5];
    let place = greedy.iter().position(|token| *token == stop).unwrap();
    let request = GenerateRequest { stop_token_ids: vec![stop], ..GenerateRequest::greedy(prompt, 12) };
    let events = pool.events(&request).await.unwrap();
    assert_eq!(tokens_of(&events), greedy[..place]);
    let usage = Usage { prompt_tokens: 6, completion_tokens: place as u32 };
    assert_eq!(events.last(), Some(&GenerateEvent::Finish { finish_reason: FinishReason::Stop, usage }));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_ends_at_the_longest_sequence() {
    let pool = Pool::tiny(Dtype::Float32, Engine { max_model_len: 20, ..ENGINE }).await;
    let events = pool.events(&GenerateRequest::greedy(tokens(15, 101, 9), 100)).await.unwrap();
    let usage = Usage { prompt_tokens: 15, completion_tokens: 5 };
    assert_eq!(events.last(), Some(&GenerateEvent::Finish { finish_reason: FinishReason::Length, usage }));
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_are_scored_with_the_head() {
    let pool = Pool::tiny(Dtype::Float32, ENGINE).await;
    let head = pool.head(4, Task::CausalLM);
    pool.push(&head).await;
    for length in [1, 10, 70] {
        let prompt = tokens(length, 101, 11);
        let request = GenerateRequest { prompt_logprobs: Some(1), ..with_head(prompt.clone(), 0, &head) };
        let events = pool.events(&request).await.unwrap();
        let [GenerateEvent::Prompt { prompt_logprobs }, GenerateEvent::Finish { usage, .. }] = events.as_slice() else {
            panic!("{events:?}");
        };
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (length as u32, 0));
        assert_eq!((prompt_logprobs.len(), &prompt_logprobs[0]), (length, &None));
        let logits = pool.logits(&prompt, Some((&head, 0.75)));
        for (place, scored) in prompt_logprobs.iter().enumerate().skip(1) {
            let (scored, logits) = (scored.as_ref().unwrap(), &logits[place - 1]);
            let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
            let expected = f64::from(logits[prompt[place] as usize]) - sum.ln();
            assert_eq!(scored.token, prompt[place]);
            assert!((f64::from(scored.logprob.unwrap()) - expected).abs() < 1e-5, "{scored:?} {expected}");
            assert_eq!(logits.iter().filter(|logit| **logit > logits[scored.top[0].0 as usize]).count(), 0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn classification_is_the_runners() {
    let pool = Pool::tiny(Dtype::Bfloat16, ENGINE).await;
    let head = pool.head(6, Task::Classification);
    pool.push(&head).await;
    let sequences: Vec<_> = [3, 40, 12, 90].iter().map(|length| tokens(*length, 101, *length as u64)).collect();
    let request = ClassifyRequest { sequences: sequences.clone(), head: head.digest.clone() };
    let scores = pool.client.classify(None, &request).await.unwrap().scores;
    let (cpu, runner) = (cpu(1), Runner::new(&head, cpu(1)).unwrap());
    for (sequence, scores) in sequences.iter().zip(&scores) {
        let states = pool.states(sequence, &Taps { layers: vec![1, 2], final_norm: true });
        let taps: Vec<&[f32]> = states.iter().map(Vec::as_slice).collect();
        assert_eq!(*scores, class_logits(&cpu, &runner, &taps, &[sequence.len()]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_frees_its_slot() {
    let pool = Pool::start(&model_path(), Dtype::Bfloat16, Engine { max_num_seqs: 1, ..Engine::default() }).await;
    let prompt = tokens(8, 49_152, 1);
    let mut gone = Box::pin(pool.client.generate(None, &GenerateRequest::greedy(prompt.clone(), 2000)).await.unwrap());
    gone.next().await.unwrap().unwrap();
    drop(gone);
    // The only slot; the answer dropped would have kept it for two thousand steps.
    let answer = pool.answer(&GenerateRequest::greedy(prompt.clone(), 3)).await;
    assert_eq!(answer, pool.greedy(&prompt, 3, None));
    assert!(pool.metric("carryon_tokens_total{class=\"serving\"}").await < 1500.0);
}
