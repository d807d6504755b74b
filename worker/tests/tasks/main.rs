//! Each task from data to answers: trained on SmolLM2's hidden states of texts that people have judged, evaluated, and served. What the
//! gateway answers must be as good as the figures in head.json say.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod world;

use carryon_crds::job::{Balanced, ClassWeights, Generation, Metric, Task, Threshold};
use serde_json::{Value, json};
use world::{World, eval};

/// Bits differ between states on the wire and states in the pool, and with them a decision in a hundred.
const NEAR: f64 = 0.02;

fn share(right: impl Iterator<Item = bool>) -> f64 {
    let right: Vec<bool> = right.collect();
    right.iter().filter(|right| **right).count() as f64 / right.len() as f64
}

fn near(found: f64, expected: f64) {
    assert!((found - expected).abs() <= NEAR, "{found}, head.json says {expected}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_of_sentences_are_classified_the_rare_one_too() {
    let world = World::train("classes", Task::Classification, |config| {
        config.head.labels = Some(["editorial", "movie", "product", "tweet"].map(String::from).to_vec());
        config.training.class_weights = Some(ClassWeights { balanced: Some(Balanced {}), values: None });
    })
    .await;
    let figures = world.figures();
    assert!(figures["accuracy"].low > 0.7 && figures["macro_f1"].low > 0.5 && figures["roc_auc"].low > 0.8, "{figures:?}");
    let rows = eval("classes");
    let answers = world.classify(&rows).await;
    near(share(answers.iter().zip(&rows).map(|(answer, row)| answer["label"] == row["label"])), figures["accuracy"].value);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sentence_may_have_several_labels() {
    let labels = ["blame", "editorial", "movie", "praise", "product", "tweet"];
    let world = World::train("labels", Task::MultiLabelClassification, |config| {
        config.head.labels = Some(labels.map(String::from).to_vec());
    })
    .await;
    let figures = world.figures();
    assert!(figures["roc_auc"].low > 0.75 && figures["macro_f1"].low > 0.4, "{figures:?}");
    let rows = eval("labels");
    let answers = world.classify(&rows).await;
    let sorted = |value: &Value| {
        let mut names: Vec<String> = serde_json::from_value(value.clone()).unwrap();
        names.sort();
        names
    };
    near(
        share(answers.iter().zip(&rows).map(|(answer, row)| sorted(&answer["labels"]) == sorted(&row["label"]))),
        figures["accuracy"].value,
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_of_sentences_are_predicted_as_numbers() {
    let world = World::train("regression", Task::Regression, |_| ()).await;
    let figures = world.figures();
    assert!(figures["spearman"].low > 0.2, "{figures:?}");
    let rows = eval("regression");
    let answers = world.classify(&rows).await;
    let error = |(answer, row): (&Value, &Value)| (answer["score"].as_f64().unwrap() - row["label"].as_f64().unwrap()).powi(2);
    let error = answers.iter().zip(&rows).map(error).sum::<f64>() / rows.len() as f64;
    near(error / figures["mean_squared_error"].value, 1.0);
    let (status, refused) = world.post("/v1/completions", json!({"model": "head", "prompt": "a"})).await;
    assert_eq!((status, &refused["error"]["message"]), (400, &json!("This model scores texts: use /v1/classify.")));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sentence_that_people_prefer_scores_higher() {
    let world = World::train("reward", Task::Reward, |_| ()).await;
    let accuracy = world.figures()["accuracy"];
    assert!(accuracy.low > 0.55, "{accuracy:?}");
    let rows = eval("reward");
    let scores = async |field: &str| {
        let texts: Vec<Value> = rows.iter().map(|row| json!({"text": row[field]})).collect();
        world.classify(&texts).await.iter().map(|answer| answer["score"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let (chosen, rejected) = (scores("chosen").await, scores("rejected").await);
    near(share(chosen.iter().zip(&rejected).map(|(chosen, rejected)| chosen > rejected)), accuracy.value);
    let messages = json!([{"role": "user", "content": "How was it?"}, {"role": "assistant", "content": "I loved it!"}]);
    let (status, answer) = world.post("/v1/classify", json!({"messages": messages})).await;
    assert!(status == 200 && answer["data"][0]["score"].is_f64(), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_that_people_prefer_becomes_likelier() {
    let world = World::train("dpo", Task::Dpo, |config| {
        config.evaluation.metric = Metric::Accuracy;
        config.max_length = 160;
    })
    .await;
    let accuracy = world.figures()["accuracy"];
    assert!(accuracy.low > 0.55, "{accuracy:?}");
    let rows = eval("dpo");
    let mut gains = Vec::new();
    for field in ["chosen", "rejected"] {
        let (head, base) = (world.likelihoods("head", &rows, field).await, world.likelihoods("base", &rows, field).await);
        gains.push(head.iter().zip(&base).map(|(head, base)| head - base).collect::<Vec<f64>>());
    }
    near(share(gains[0].iter().zip(&gains[1]).map(|(chosen, rejected)| chosen > rejected)), accuracy.value);
    let said = async |model: &str| {
        let messages = json!([{"role": "user", "content": rows[0]["prompt"]}]);
        let (status, answer) =
            world.post("/v1/chat/completions", json!({"model": model, "messages": messages, "max_tokens": 16, "temperature": 0})).await;
        assert_eq!(status, 200, "{answer}");
        answer["choices"][0]["message"]["content"].clone()
    };
    assert_ne!(said("head").await, said("base").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_counted_that_a_client_would_get() {
    let least = |metric, min| Threshold { metric, min: Some(min), max: None };
    let world = World::train("answers", Task::CausalLM, |config| {
        config.max_length = 192;
        config.training.num_train_epochs = 3;
        let json_field = Some("/source".to_owned());
        config.evaluation.generation = Some(Generation { regex: None, json_field, max_new_tokens: 16, max_samples: 60 });
        let most = Threshold { metric: Metric::Loss, min: None, max: Some(1e-6) };
        config.evaluation.thresholds = vec![least(Metric::ExactMatch, 0.5), most];
    })
    .await;
    let share_told = world.figures()["exact_match"];
    assert!(share_told.low > 0.5, "{share_told:?}");
    let [unmet] = &world.metrics().unmet_thresholds[..] else { panic!("{:?}", world.metrics()) };
    assert!(unmet.starts_with("loss is 0.") && unmet.ends_with(", more than 0.000001"), "{unmet}");
    let rows = eval("answers");
    let mut right = Vec::new();
    for row in (0..60).map(|index| &rows[index * rows.len() / 60]) {
        let messages = json!([{"role": "user", "content": row["prompt"]}]);
        let body = json!({"model": "head", "messages": messages, "max_tokens": 16, "temperature": 0});
        let (status, answer) = world.post("/v1/chat/completions", body).await;
        assert_eq!(status, 200, "{answer}");
        let said = |text: &Value| serde_json::from_str::<Value>(text.as_str().unwrap()).ok()?.get("source").cloned();
        let answered = said(&answer["choices"][0]["message"]["content"]);
        right.push(answered.is_some() && answered == said(&row["completion"]));
    }
    near(share(right.into_iter()), share_told.value);
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_lie_near_their_answers() {
    let world = World::train("embedding", Task::Embedding, |config| {
        config.head.dimensions = Some(48);
        config.training.per_device_train_batch_size = 16;
        config.training.num_train_epochs = 8;
    })
    .await;
    let figures = world.figures();
    assert!(figures["recall_at_10"].low > 0.3, "{figures:?}");
    let rows = eval("embedding");
    let embed = async |field: &str| -> Vec<Vec<f64>> {
        let texts: Vec<&Value> = rows.iter().map(|row| &row[field]).collect();
        let (status, answer) = world.post("/v1/embeddings", json!({"input": texts, "dimensions": 48})).await;
        assert_eq!(status, 200, "{answer}");
        answer["data"].as_array().unwrap().iter().map(|found| serde_json::from_value(found["embedding"].clone()).unwrap()).collect()
    };
    let cosine = |left: &[f64], right: &[f64]| left.iter().zip(right).map(|(left, right)| left * right).sum::<f64>();
    let (anchors, positives) = (embed("anchor").await, embed("positive").await);
    assert!(anchors.iter().all(|row| row.len() == 48 && (cosine(row, row) - 1.0).abs() < 1e-5));
    for k in [1, 5, 10] {
        let near_enough = |own: usize| {
            let nearer = |positive: &&Vec<f64>| cosine(&anchors[own], positive) > cosine(&anchors[own], &positives[own]);
            positives.iter().filter(nearer).count() < k
        };
        near(share((0..rows.len()).map(near_enough)), figures[&format!("recall_at_{k}")].value);
    }
    let (_, answer) = world.post("/v1/embeddings", json!({"input": rows[0]["anchor"], "encoding_format": "base64"})).await;
    assert_eq!(answer["data"][0]["embedding"].as_str().unwrap().len(), 256, "48 numbers of 4 bytes");
    let (status, refused) = world.post("/v1/embeddings", json!({"input": "a", "dimensions": 8})).await;
    assert_eq!((status, &refused["error"]["param"]), (400, &json!("dimensions")));
    let (status, refused) = world.post("/v1/classify", json!({"input": "a"})).await;
    assert_eq!((status, &refused["error"]["message"]), (400, &json!("This model embeds texts: use /v1/embeddings.")));
}
