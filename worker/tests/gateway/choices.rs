//! Several answers to a request, and the parameters that say how tokens are drawn.

use std::sync::atomic::Ordering;

use carryon_worker::exchange::wire::{ErrorCode, Sampling};
use serde_json::{Value, json};

use crate::scripted_pool::{Act, ids};
use crate::{DEADLINE, Gateway, user, wait};

/// Index, text and reason of each choice.
fn choices(answer: &Value) -> Vec<(u64, &str, &str)> {
    let choices = answer["choices"].as_array().unwrap();
    choices
        .iter()
        .map(|choice| {
            let text = choice["text"].as_str().or_else(|| choice["message"]["content"].as_str()).unwrap();
            (choice["index"].as_u64().unwrap(), text, choice["finish_reason"].as_str().unwrap())
        })
        .collect()
}

/// What a stream said: per choice its texts, joined, and its reasons; and the usage at its end.
fn streamed(events: &[String]) -> (Vec<(String, Vec<String>)>, Value) {
    let (done, chunks) = events.split_last().unwrap();
    assert_eq!(done, "[DONE]");
    let (mut choices, mut usage) = (Vec::new(), Value::Null);
    for chunk in chunks.iter().map(|event| serde_json::from_str::<Value>(event).unwrap()) {
        assert_eq!(usage, Value::Null, "usage comes last");
        usage = chunk["usage"].clone();
        for choice in chunk["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            choices.resize_with(choices.len().max(index + 1), || (String::new(), Vec::new()));
            let text = choice["text"].as_str().or_else(|| choice["delta"]["content"].as_str()).unwrap_or_default();
            choices[index].0.push_str(text);
            choices[index].1.extend(choice["finish_reason"].as_str().map(str::to_owned));
        }
    }
    (choices, usage)
}

#[tokio::test]
async fn every_prompt_has_n_answers_in_order_each_with_its_own_seed() {
    let gateway = Gateway::start("CausalLM").await;
    gateway.pool.then([Act::Repeat]);
    let mut body = json!({"model": "maths", "prompt": ["aa", "xbb", "cc"], "n": 2, "best_of": 2, "seed": 8, "max_tokens": 9});
    let (status, whole) = gateway.post("/v1/completions", body.clone()).await;
    assert_eq!(status, 200, "{whole}");
    // vLLM's seeds: the request's and the ones after it, for each prompt anew.
    let expected = ["aa8", "aa9", "bb8", "bb9", "cc8", "cc9"];
    assert_eq!(choices(&whole), expected.iter().zip(0..).map(|(text, index)| (index, *text, "stop")).collect::<Vec<_>>());
    let usage = json!({"prompt_tokens": 7, "completion_tokens": 18, "total_tokens": 25});
    assert_eq!(whole["usage"], usage, "a prompt counts once");

    body["stream_options"] = json!({"include_usage": true});
    let (answers, told) = streamed(&gateway.stream("/v1/completions", body).await);
    let whole: Vec<_> = expected.iter().map(|text| ((*text).to_owned(), vec!["stop".to_owned()])).collect();
    assert_eq!((answers, told), (whole, usage));

    let mut body = user("hi");
    body["n"] = 3.into();
    body["seed"] = (-1).into();
    let (_, whole) = gateway.post("/v1/chat/completions", body.clone()).await;
    let last = u64::MAX.to_string();
    let expected = [format!("A:{last}"), "A:0".to_owned(), "A:1".to_owned()];
    assert_eq!(choices(&whole), expected.iter().zip(0..).map(|(text, index)| (index, text.as_str(), "stop")).collect::<Vec<_>>());
    let (answers, _) = streamed(&gateway.stream("/v1/chat/completions", body).await);
    assert_eq!(answers.into_iter().map(|(text, _)| text).collect::<Vec<_>>(), expected);

    let mut unseeded = user("hi");
    unseeded["n"] = 2.into();
    let (_, whole) = gateway.post("/v1/chat/completions", unseeded).await;
    assert_eq!(choices(&whole), [(0, "A:?", "stop"), (1, "A:?", "stop")], "the pool draws a seed for each");
}

#[tokio::test]
async fn streamed_answers_do_not_wait_for_each_other() {
    let gateway = Gateway::start("CausalLM").await;
    gateway.pool.then([Act::Hang(ids("a")), Act::Say(ids("b"))]);
    let body = json!({"model": "maths", "prompt": "x", "n": 2, "stream": true});
    let mut response = gateway.http.post(format!("{}/v1/completions", gateway.url)).body(body.to_string()).send().await.unwrap();
    let mut text = String::new();
    while !text.contains("\"finish_reason\":\"stop\",\"index\":1") {
        text.push_str(std::str::from_utf8(&response.chunk().await.unwrap().unwrap()).unwrap());
    }
    assert!(text.contains("\"index\":0") && !text.contains("\"finish_reason\":\"stop\",\"index\":0"), "{text}");
    drop(response);
    wait("the end of the first", async || gateway.pool.abandoned.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn a_request_takes_no_more_of_the_pool_than_its_share() {
    let gateway = Gateway::start("CausalLM").await;
    gateway.pool.then([Act::Hang(ids("a"))]);
    for stream in [true, false] {
        gateway.pool.asked.lock().unwrap().clear();
        gateway.pool.abandoned.store(0, Ordering::SeqCst);
        let body = json!({"model": "maths", "prompt": vec!["x"; 9], "stream": stream});
        let http = gateway.http.clone();
        let request = http.post(format!("{}/v1/completions", gateway.url)).body(body.to_string());
        let asking = tokio::spawn(async move { request.send().await.unwrap().text().await });
        wait("the first four", async || gateway.pool.asked.lock().unwrap().len() == 4).await;
        asking.abort();
        wait("their end", async || gateway.pool.abandoned.load(Ordering::SeqCst) == 4).await;
        assert_eq!(gateway.pool.asked.lock().unwrap().len(), 4, "the others were not asked for");
    }
}

#[tokio::test]
async fn a_request_of_which_the_pool_has_answered_a_part_waits_for_its_turn() {
    let gateway = Gateway::start("CausalLM").await;
    let (answers, busy) = (std::iter::repeat_n(Act::Say(ids("ok")), 4), std::iter::repeat_n(Act::Refuse(ErrorCode::Busy), 40));
    gateway.pool.then(answers.chain(busy).chain([Act::Say(ids("late"))]));
    let (status, whole) = gateway.post("/v1/completions", json!({"model": "maths", "prompt": vec!["x"; 9]})).await;
    assert_eq!(status, 200, "{whole}");
    let texts: Vec<&str> = choices(&whole).into_iter().map(|(_, text, _)| text).collect();
    assert_eq!(texts, ["ok", "ok", "ok", "ok", "late", "late", "late", "late", "late"]);
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_begun_again_alone() {
    let gateway = Gateway::start("CausalLM").await;
    gateway.pool.then([Act::Break(ids("o")), Act::Say(ids("ok"))]);
    let (status, whole) = gateway.post("/v1/completions", json!({"model": "maths", "prompt": ["a", "b", "c"]})).await;
    assert_eq!((status, choices(&whole)), (200, vec![(0, "ok", "stop"), (1, "ok", "stop"), (2, "ok", "stop")]));
    assert_eq!(gateway.pool.asked.lock().unwrap().len(), 4);
    gateway.pool.then([Act::Say(ids("ok")), Act::Fail(ids("o"))]);
    let events = gateway.stream("/v1/completions", json!({"model": "maths", "prompt": "a", "n": 2})).await;
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "head_not_finite", "{events:?}");
}

#[tokio::test]
async fn an_answer_that_breaks_off_again_and_again_is_given_up() {
    let gateway = Gateway::start_with("CausalLM", |settings| settings.patience = DEADLINE).await;
    gateway.pool.then((0..6).map(|_| Act::Break(ids("o"))));
    let (status, refused) = gateway.post("/v1/completions", json!({"model": "maths", "prompt": "a"})).await;
    assert!(status >= 500, "{refused}");
    assert_eq!(gateway.pool.asked.lock().unwrap().len(), 6);
}

#[tokio::test]
async fn too_many_answers_are_refused_by_name() {
    let gateway = Gateway::start("CausalLM").await;
    for (change, parameter, word) in [
        (json!({"n": 129}), "n", "between 1 and 128"),
        (json!({"prompt": ["a", "b"], "n": 65}), "n", "2 prompts with n = 65 are 130 answers, more than 128"),
        (json!({"prompt": vec!["a"; 129]}), "prompt", "129 prompts"),
        (json!({"prompt": ["a", ""]}), "prompt[1]", "is empty"),
        (json!({"prompt": ["a", "x".repeat(65)]}), "prompt[1]", "65 tokens"),
        (json!({"best_of": 2}), "best_of", "must be n, which is 1"),
        (json!({"n": 2, "best_of": 3}), "best_of", "must be n, which is 2"),
        (json!({"logit_bias": {"257": 1}}), "logit_bias", "no token id below 257"),
        (json!({"top_k": -2}), "top_k", "between -1"),
    ] {
        let mut body = json!({"model": "maths", "prompt": "a"});
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let (status, answer) = gateway.post("/v1/completions", body.clone()).await;
        let message = answer["error"]["message"].as_str().unwrap();
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(parameter)), "{body}: {answer}");
        assert!(message.contains(word), "{body}: {message}");
    }
}

#[tokio::test]
async fn a_stop_string_that_names_a_control_token_ends_the_answer_there() {
    let gateway = Gateway::start("CausalLM").await;
    for (stop, shown) in [
        (json!("<|end|>"), "ab"),
        (json!(["z", "<|end|>"]), "ab"),
        (json!("b<|end|>c"), "a"),
        (json!("<|end|>d"), "abcd"),
        (json!(["<|end|>", "a"]), ""),
    ] {
        gateway.pool.then([Act::Say([ids("ab"), vec![256], ids("cd")].concat())]);
        let mut body = user("hi");
        body["stop"] = stop.clone();
        let (_, whole) = gateway.post("/v1/chat/completions", body.clone()).await;
        assert_eq!(choices(&whole), [(0, shown, "stop")], "{stop}");
        let (answers, _) = streamed(&gateway.stream("/v1/chat/completions", body).await);
        assert_eq!(answers, [(shown.to_owned(), vec!["stop".to_owned()])], "{stop}");
    }
}

// lm-eval's `local-completions` takes the log probabilities of `echo` but the last one, which is the generated token's.
#[tokio::test]
async fn log_probabilities_tell_of_the_token_that_ends_an_answer() {
    let gateway = Gateway::start("CausalLM").await;
    gateway.pool.then([Act::Say(vec![256, 97])]);
    let body = json!({"model": "maths", "prompt": [[97, 98], [98]], "max_tokens": 1, "echo": true, "logprobs": 1, "temperature": 0});
    let (_, whole) = gateway.post("/v1/completions", body.clone()).await;
    assert_eq!(choices(&whole), [(0, "ab", "stop"), (1, "b", "stop")]);
    let logprobs = &whole["choices"][0]["logprobs"];
    assert_eq!(logprobs["token_logprobs"], json!([null, -0.25, -0.5]));
    assert_eq!((&logprobs["tokens"], &logprobs["text_offset"]), (&json!(["a", "b", "<|end|>"]), &json!([0, 1, 2])));
    let (answers, _) = streamed(&gateway.stream("/v1/completions", body).await);
    assert_eq!(answers[0], ("ab".to_owned(), vec!["stop".to_owned()]));
}

#[tokio::test]
async fn what_an_earlier_pool_would_ignore_is_refused_by_name() {
    let gateway = Gateway::start("CausalLM").await;
    let members = json!({
        "logit_bias": {"98": -100}, "repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": -0.5, "min_p": 0.25, "top_k": 40,
    });
    for (name, value) in members.as_object().unwrap() {
        let mut body = user("hi");
        body[name] = value.clone();
        let (status, answer) = gateway.post("/v1/chat/completions", body).await;
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(name.as_str())), "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains("earlier version"), "{answer}");
    }
    wait("the end of what was asked", async || gateway.pool.asked.lock().unwrap().len() == 6).await;
    let mut nothing = user("hi");
    nothing["top_k"] = 0.into();
    nothing["n"] = 2.into();
    assert_eq!(gateway.post("/v1/chat/completions", nothing).await.0, 200, "what asks for nothing, and n, go to every pool");

    gateway.pool.knows_sampling.store(true, Ordering::SeqCst);
    let mut body = user("hi");
    body.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
    assert_eq!(gateway.post("/v1/chat/completions", body).await.0, 200);
    let expected = Sampling {
        logit_bias: vec![(98, -100.0)],
        repetition_penalty: 1.5,
        frequency_penalty: 0.5,
        presence_penalty: -0.5,
        min_p: 0.25,
        top_k: 40,
    };
    assert_eq!(gateway.pool.asked.lock().unwrap().last().unwrap().sampling, expected);
}
