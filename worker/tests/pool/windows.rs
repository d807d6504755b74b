//! A base that sees the last positions only: what it no longer sees makes room for others.

use carryon_crds::common::Taps;
use carryon_crds::job::Task;
use carryon_crds::pool::Dtype;
use carryon_worker::base::Placement;
use carryon_worker::exchange::wire::{ClassifyRequest, GenerateEvent, GenerateRequest};
use carryon_worker::head::Runner;
use carryon_worker::kernel::PageLayout;
use futures::StreamExt as _;

use crate::common::engine::{class_logits, cpu};
use crate::common::tokens;
use crate::harness::{ENGINE, Pool, checkpoint, tokens_of, with_head};

/// A base with a window of 40 positions and memory for `pages` pages of its own.
async fn pool(pages: u64) -> (Pool, tempfile::TempDir) {
    let folder = checkpoint(7);
    let path = folder.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    (config["model_type"], config["sliding_window"]) = ("mistral".into(), 40.into());
    std::fs::write(&path, config.to_string()).unwrap();
    let page = PageLayout { layers: 3, heads: 2, head_dim: 10, latent: None, dtype: Dtype::Float32 }.bytes() as u64;
    let placement = Placement { kv_cache_bytes: Some(pages * page), ..Placement::cpu(2) };
    (Pool::placed(folder.path(), Dtype::Float32, ENGINE, placement).await, folder)
}

/// Tokens of an answer of 240, and of one of 50 asked for when it has begun: `None` where the first had ended by the time that the second was heard.
async fn side_by_side(pool: &Pool, long: &GenerateRequest, short: &GenerateRequest) -> Option<(Vec<u32>, Vec<u32>)> {
    let mut first = Box::pin(pool.client.generate(None, long).await.unwrap());
    let mut events = vec![first.next().await.unwrap().unwrap()];
    let mut second = tokio::spawn({
        let (client, short) = (pool.client.clone(), short.clone());
        async move { client.generate(None, &short).await.unwrap().map(Result::unwrap).collect::<Vec<_>>().await }
    });
    let beside = loop {
        tokio::select! {
            event = first.next() => match event {
                Some(event) => events.push(event.unwrap()),
                None => break None,
            },
            answer = &mut second => break Some(tokens_of(&answer.unwrap())),
        }
    };
    if beside.is_none() {
        second.await.unwrap();
    }
    let rest: Vec<GenerateEvent> = first.map(Result::unwrap).collect().await;
    events.extend(rest);
    Some((tokens_of(&events), beside?))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_answer_no_longer_sees_makes_room_for_others() {
    let (pool, _folder) = pool(10).await;
    // Eight pages, and four: they do not fit both, before the first has left two behind.
    let (long, short) = (GenerateRequest::greedy(tokens(3, 101, 1), 240), GenerateRequest::greedy(tokens(60, 101, 2), 50));
    // On a busy machine the first may be through before the second is heard: that says nothing, and is done again.
    let mut both = None;
    for _ in 0..20 {
        both = side_by_side(&pool, &long, &short).await;
        if both.is_some() {
            break;
        }
    }
    let (first, second) = both.expect("the short answer ends while the long one runs");
    assert_eq!(first, pool.greedy(&long.prompt, 240, None));
    assert_eq!(second, pool.greedy(&short.prompt, 50, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_and_classifications_see_what_they_saw() {
    let (pool, _folder) = pool(30).await;
    let (head, classifier) = (pool.head(5, Task::CausalLM), pool.head(6, Task::Classification));
    pool.push(&head).await;
    pool.push(&classifier).await;
    let prompt = tokens(130, 101, 3);
    let sequences: Vec<_> = [250, 7, 130, 90].iter().map(|length| tokens(*length, 101, *length as u64)).collect();
    let request = ClassifyRequest { sequences: sequences.clone(), head: classifier.digest.clone() };
    // The second finds the beginning of its prompt, the pages of the first.
    for _ in 0..2 {
        let (answer, scores) =
            tokio::join!(async { pool.answer(&with_head(prompt.clone(), 60, &head)).await }, pool.client.classify(None, &request));
        assert_eq!(answer, pool.greedy(&prompt, 60, Some((&head, 0.75))));
        let runner = Runner::new(&classifier, cpu(1)).unwrap();
        for (sequence, scores) in sequences.iter().zip(scores.unwrap().scores) {
            let states = pool.states(sequence, &Taps { layers: vec![1, 2], final_norm: true });
            let taps: Vec<&[f32]> = states.iter().map(Vec::as_slice).collect();
            assert_eq!(scores, class_logits(&cpu(1), &runner, &taps, &[sequence.len()]));
        }
    }
}
