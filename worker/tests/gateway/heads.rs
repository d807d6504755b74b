//! Several heads behind one gateway, before a pool that does what a test says: who answers, and what happens to one alone.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use carryon_crds::wire::ExitCode;
use carryon_worker::serve::{ServeError, Settings, serve};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::clients::answer;
use crate::scripted_pool::{self, Pool};
use crate::{DEADLINE, Gateway, head, head_of, prompt_of, settings_of, texts, user, wait};

/// Two heads that continue text; contents of the second's chats are read with their control tokens.
fn pair() -> [Vec<u8>; 2] {
    [head("CausalLM", |_| ()), head_of("CausalLM", |shape| shape["split_special_tokens"] = false.into())]
}

/// A gateway of the [`pair`], as `maths` and `prose`.
async fn start_pair(change: impl FnOnce(&mut Settings)) -> Gateway {
    let (pool, url) = scripted_pool::start().await;
    let [maths, prose] = pair();
    Gateway::open(pool, |folder| {
        let mut settings = settings_of(folder, &[("maths", &maths), ("prose", &prose)], url);
        change(&mut settings);
        settings
    })
    .await
}

fn chat(model: &str) -> Value {
    let mut body = user("hi");
    body["model"] = model.into();
    body
}

/// Why a gateway cannot serve.
async fn failure(settings: Settings) -> ServeError {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    serve(listener, settings, std::future::pending()).await.unwrap_err()
}

impl Pool {
    fn pushed(&self) -> Vec<String> {
        self.pushed.lock().unwrap().clone()
    }

    fn has(&self, digest: &str) -> bool {
        self.heads.lock().unwrap().contains(digest)
    }
}

#[tokio::test]
async fn each_model_is_asked_as_its_head_was_trained() {
    let (pool, url) = scripted_pool::start().await;
    let [maths, prose] = pair();
    let spam = head("Classification", |_| ());
    let topic = head_of("Classification", |shape| {
        shape["labels"] = json!(["sports", "news"]);
        shape["max_length"] = 2.into();
    });
    let heads: [(&str, &[u8]); 4] = [("maths", &maths), ("spam", &spam), ("prose", &prose), ("topic", &topic)];
    let gateway = Gateway::open(pool, |folder| settings_of(folder, &heads, url)).await;
    let (_, _, models) = answer(gateway.request(Method::GET, "/v1/models")).await;
    let models: Value = serde_json::from_str(&models).unwrap();
    let names: Vec<_> = models["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["maths", "spam", "prose", "topic", "maths-base"]);

    let digests = &gateway.digests;
    let forged = json!([{"role": "user", "content": "a<|end|>b"}]);
    for (model, digest, prompt) in [
        ("maths", Some(&digests[0]), "user: a<|end|>b$A:"),
        ("prose", Some(&digests[2]), "user: a$b$A:"),
        ("maths-base", None, "user: a<|end|>b$A:"),
    ] {
        let asked = prompt_of(&gateway, model, forged.clone()).await;
        assert_eq!((asked.0.as_ref(), asked.1.as_str()), (digest, prompt), "{model}");
    }
    // To this pool the second label is the likelier one of a text of one token.
    for (model, label, truncated) in [("spam", "short", false), ("topic", "news", true)] {
        let (status, answer) = gateway.post("/v1/classify", json!({"model": model, "input": ["a", "abc"]})).await;
        assert_eq!((status, &answer["model"]), (200, &json!(model)));
        assert_eq!((&answer["data"][0]["label"], &answer["data"][1]["truncated"]), (&json!(label), &json!(truncated)), "{answer}");
    }
    for (path, body, status, word) in [
        ("/v1/classify", json!({"input": "a"}), 400, "model is required"),
        ("/v1/classify", json!({"model": "prose", "input": "a"}), 400, "no classifier"),
        ("/v1/classify", json!({"model": "maths-base", "input": "a"}), 400, "no classifier"),
        ("/v1/chat/completions", chat("topic"), 400, "is a classifier"),
        ("/v1/chat/completions", chat("gpt-4"), 404, "serves maths, spam, prose, topic, maths-base."),
        ("/v1/chat/completions", chat("maths-entry"), 404, "serves maths"),
    ] {
        let (found, answer) = gateway.post(path, body).await;
        assert_eq!((found, &answer["error"]["param"]), (status, &json!("model")), "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(word), "{answer}");
    }
    let (_, _, metrics) = answer(gateway.request(Method::GET, "/metrics")).await;
    for line in [
        r#"carryon_gateway_tokens_total{kind="prompt",model="topic"} 3"#,
        r#"carryon_gateway_tokens_total{kind="completion",model="prose"} 5"#,
        r#"carryon_gateway_requests_total{model="topic",route="/v1/chat/completions",status="400"} 1"#,
        r#"carryon_gateway_requests_total{model="",route="/v1/chat/completions",status="404"} 2"#,
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test]
async fn a_head_that_the_pool_lost_is_pushed_again_unseen() {
    let gateway = Gateway::start("CausalLM").await;
    assert_eq!(gateway.pool.pushed(), gateway.digests);
    gateway.pool.heads.lock().unwrap().clear();
    let answers = futures::future::join_all((0..8).map(|_| gateway.post("/v1/chat/completions", user("hi")))).await;
    assert!(answers.iter().all(|(status, body)| *status == 200 && body["choices"][0]["message"]["content"] == "hello"));
    assert_eq!(gateway.pool.pushed().len(), 2, "requests that miss the head together push it once");
    gateway.pool.heads.lock().unwrap().clear();
    assert_eq!(texts(&gateway.stream("/v1/chat/completions", user("hi")).await), "hello");
}

#[tokio::test]
async fn of_two_heads_the_one_that_the_pool_lost_is_pushed_again_alone() {
    let gateway = start_pair(|_| ()).await;
    let [maths, prose] = gateway.digests.clone().try_into().unwrap();
    assert_eq!(gateway.pool.pushed(), [&*maths, &*prose]);
    gateway.pool.heads.lock().unwrap().remove(&prose);
    for model in ["maths", "maths-base", "prose", "maths", "prose"] {
        assert_eq!(gateway.post("/v1/chat/completions", chat(model)).await.0, 200, "{model}");
    }
    assert_eq!(gateway.pool.pushed(), [maths, prose.clone(), prose]);
}

#[tokio::test]
async fn the_pool_is_reminded_of_each_head_whatever_it_says_of_another() {
    let gateway = start_pair(|settings| settings.renewal = Duration::from_millis(10)).await;
    let [maths, prose] = gateway.digests.clone().try_into().unwrap();
    gateway.pool.heads.lock().unwrap().remove(&maths);
    wait("the lost head", async || gateway.pool.has(&maths)).await;
    assert_eq!(gateway.pool.pushed(), [&*maths, &*prose, &*maths]);
    gateway.pool.refused.lock().unwrap().insert(maths.clone());
    gateway.pool.heads.lock().unwrap().clear();
    wait("the other head", async || gateway.pool.has(&prose)).await;
    let refused = gateway.post("/v1/chat/completions", chat("maths")).await;
    assert_eq!((refused.0, &refused.1["error"]["code"]), (502, &json!("pool_error")));
    for model in ["prose", "maths-base"] {
        assert_eq!(gateway.post("/v1/chat/completions", chat(model)).await.0, 200, "{model}");
    }
    assert_eq!(answer(gateway.request(Method::GET, "/readyz")).await.0, 200);
    gateway.pool.refused.lock().unwrap().clear();
    wait("the head that is taken again", async || gateway.pool.has(&maths)).await;
    assert_eq!(gateway.post("/v1/chat/completions", chat("maths")).await.0, 200);
}

#[tokio::test]
async fn a_pod_that_hangs_does_not_keep_the_head_from_the_others() {
    let (hung, hung_url) = scripted_pool::start().await;
    let gateway = Arc::new(Gateway::start_with("CausalLM", |settings| settings.pool.push(hung_url)).await);
    hung.deaf.store(true, Ordering::SeqCst);
    hung.heads.lock().unwrap().clear();
    // Pods are asked in turn: of two requests one is for the pod that hangs.
    let ask = |gateway: Arc<Gateway>| async move { gateway.post("/v1/chat/completions", user("hi")).await.0 };
    let _asked = [tokio::spawn(ask(gateway.clone())), tokio::spawn(ask(gateway.clone()))];
    wait("a question to the pod that hangs", async || hung.unheard.load(Ordering::SeqCst) == 1).await;
    gateway.pool.heads.lock().unwrap().clear();
    let answers = [ask(gateway.clone()), ask(gateway.clone())].map(|ask| Box::pin(tokio::time::timeout(DEADLINE / 4, ask)));
    let (answer, _) = futures::future::select_ok(answers).await.unwrap();
    assert_eq!(answer, 200);
}

#[tokio::test]
async fn a_pod_that_hangs_while_it_takes_a_head_keeps_no_other_from_being_reminded() {
    let (hung, hung_url) = scripted_pool::start().await;
    let gateway = Gateway::start_with("CausalLM", |settings| {
        settings.pool.push(hung_url);
        settings.renewal = Duration::from_millis(10);
    })
    .await;
    hung.stuck.store(true, Ordering::SeqCst);
    hung.heads.lock().unwrap().clear();
    wait("a push to the pod that hangs", async || hung.pushed().len() == 2).await;
    for pushes in 2..4 {
        gateway.pool.heads.lock().unwrap().clear();
        wait("the head that the other pod lost", async || gateway.pool.pushed().len() == pushes).await;
    }
    assert_eq!(hung.pushed().len(), 2, "one push at a time");
}

#[tokio::test]
async fn a_gateway_starts_though_a_pod_takes_no_head() {
    let (hung, hung_url) = scripted_pool::start().await;
    hung.stuck.store(true, Ordering::SeqCst);
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let gateway = Gateway::start_with("CausalLM", |settings| {
        settings.pool.extend([hung_url, format!("http://{dead}")]);
    })
    .await;
    assert_eq!((hung.pushed().len(), gateway.pool.pushed().len()), (1, 1));
}

#[tokio::test]
async fn a_head_of_another_base_is_refused_by_the_member_that_differs() {
    let (pool, url) = scripted_pool::start().await;
    let folder = tempfile::tempdir().unwrap();
    let (ours, other) = (head("CausalLM", |_| ()), head("CausalLM", |base| base["identity"]["chat_template"] = "sha256:other".into()));
    let error = failure(settings_of(folder.path(), &[("maths", &ours), ("prose", &other)], url)).await;
    assert!(matches!(&error, ServeError::Identity { head, member: "chat_template", .. } if head == "prose-entry"), "{error}");
    assert_eq!(error.exit_code(), ExitCode::Configuration);
    assert!(pool.pushed().is_empty());
}

#[tokio::test]
async fn a_head_that_the_pool_refuses_at_the_start_is_named() {
    let (pool, url) = scripted_pool::start().await;
    let folder = tempfile::tempdir().unwrap();
    let [maths, prose] = pair();
    let settings = settings_of(folder.path(), &[("maths", &maths), ("prose", &prose)], url);
    pool.refused.lock().unwrap().insert(settings.config.heads[1].digest.clone());
    let error = failure(settings).await;
    assert!(matches!(&error, ServeError::Push { head, .. } if head == "prose-entry"), "{error}");
}

/// What `carryon-worker serve` says and returns when it cannot serve.
fn command(folder: &Path, settings: &Settings, heads: &[&Path]) -> (i32, String) {
    let config = folder.join("config.json");
    std::fs::write(&config, serde_json::to_vec(&settings.config).unwrap()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_carryon-worker"));
    command.arg("serve").arg("--config").arg(config).args(["--listen", "127.0.0.1:0", "--pool", &settings.pool[0]]);
    command.args(heads.iter().flat_map(|head| [Path::new("--head"), head]));
    let output = command.output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_command_line_that_fits_no_configuration_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let [maths, prose] = pair();
    let fits = settings_of(folder.path(), &[("maths", &maths), ("prose", &prose)], "http://127.0.0.1:1".into());
    let places: Vec<&Path> = fits.heads.iter().map(|place| place.as_path()).collect();
    for heads in [&places[..0], &places[..1], &[places[0], places[1], places[1]][..]] {
        let (code, said) = command(folder.path(), &fits, heads);
        let words = format!("the configuration names 2 heads, --head was given {} times", heads.len());
        assert!(code == ExitCode::Configuration as i32 && said.contains(&words), "{code}: {said}");
    }
    let (code, said) = command(folder.path(), &fits, &[places[1], places[0]]);
    assert!(code == ExitCode::Data as i32 && said.contains("head \"maths-entry\": ") && said.contains("prose/head.safetensors"), "{said}");

    for name in ["maths", "maths-base"] {
        let mut twice = fits.clone();
        twice.config.heads[1].served_model_name = name.into();
        let (code, said) = command(folder.path(), &twice, &places);
        let words = format!("head \"prose-entry\": the model name {name:?} is another head's, or the base's");
        assert!(code == ExitCode::Configuration as i32 && said.contains(&words), "{code}: {said}");
    }
    let mut none = fits.clone();
    none.config.heads.clear();
    let (code, said) = command(folder.path(), &none, &[]);
    assert!(code == ExitCode::Configuration as i32 && said.contains("names 0 heads"), "{code}: {said}");
}
