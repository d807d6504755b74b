//! What clients and browsers send around their requests: origins, encodings, bodies that do not come.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};

use crate::scripted_pool::ids;
use crate::{Gateway, user, wait};

const PAGE: &str = "https://app.example.com";

pub async fn answer(request: RequestBuilder) -> (StatusCode, reqwest::header::HeaderMap, String) {
    let response = request.send().await.unwrap();
    (response.status(), response.headers().clone(), response.text().await.unwrap())
}

impl Gateway {
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url))
    }

    /// What Chrome asks before a page of `origin` may post with OpenAI's client.
    fn preflight(&self, origin: &str) -> RequestBuilder {
        self.request(Method::OPTIONS, "/v1/chat/completions")
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type,x-stainless-lang")
    }

    /// A request to the completions whose body of `length` bytes is awaited and does not come; or what it got instead.
    fn half_sent(&self, length: usize) -> Result<TcpStream, String> {
        let mut stream = TcpStream::connect(self.url.strip_prefix("http://").unwrap()).unwrap();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        let mut first = [0; "HTTP/1.1 100 Continue\r\n\r\n".len()];
        stream.read_exact(&mut first).unwrap();
        if first.starts_with(b"HTTP/1.1 100") {
            return Ok(stream);
        }
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        Err(String::from_utf8_lossy(&first).into_owned() + &rest)
    }
}

/// Expected headers: those that the Fetch standard (CORS protocol) asks for; a preflight carries no key.
#[tokio::test]
async fn pages_of_allowed_origins_may_use_the_api_and_no_others() {
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    std::fs::write(&key, "sk-1").unwrap();
    let gateway = Gateway::start_with("CausalLM", |settings| {
        settings.api_key_files = vec![key];
        settings.config.allowed_origins = vec![format!("{PAGE}:443"), "http://localhost:3000".into()];
    })
    .await;
    for origin in [PAGE, "http://localhost:3000"] {
        let (status, headers, _) = answer(gateway.preflight(origin)).await;
        assert_eq!(status, 204);
        assert_eq!((&headers["access-control-allow-origin"], &headers["vary"]), (&origin.parse().unwrap(), &"origin".parse().unwrap()));
        assert_eq!(headers["access-control-allow-headers"], "authorization,content-type,x-stainless-lang");
        assert!(headers["access-control-allow-methods"].to_str().unwrap().contains("POST"));
    }
    // Answers are shown to the page, refusals too.
    let models = || gateway.request(Method::GET, "/v1/models").header("origin", PAGE);
    for (request, expected) in [(models().bearer_auth("sk-1"), 200), (models(), 401)] {
        let (status, headers, _) = answer(request).await;
        assert_eq!((status.as_u16(), &headers["access-control-allow-origin"]), (expected, &PAGE.parse().unwrap()));
        assert_eq!(headers["access-control-expose-headers"], "retry-after");
    }
    for origin in
        ["https://evil.example.com", "https://app.example.com.evil.com", "http://app.example.com", "https://app.example.com:8443", "null"]
    {
        let (status, headers, _) = answer(gateway.preflight(origin)).await;
        assert_eq!((status.as_u16(), headers.get("access-control-allow-origin")), (405, None), "{origin}");
        assert_eq!(headers["vary"], "origin", "a cache must not show it to others");
    }
}

#[tokio::test]
async fn no_page_may_use_the_api_unless_the_deployment_says_so() {
    let gateway = Gateway::start("CausalLM").await;
    let (status, headers, _) = answer(gateway.preflight(PAGE)).await;
    assert_eq!((status.as_u16(), headers.get("access-control-allow-origin"), headers.get("vary")), (405, None, None));
    let any = Gateway::start_with("CausalLM", |settings| settings.config.allowed_origins = vec!["*".into()]).await;
    let (status, headers, _) = answer(any.preflight("http://[::1]:5173")).await;
    assert_eq!((status.as_u16(), &headers["access-control-allow-origin"]), (204, &"http://[::1]:5173".parse().unwrap()));
}

#[tokio::test]
async fn a_compressed_body_is_refused_by_name() {
    let gateway = Gateway::start("CausalLM").await;
    for (encoding, expected) in [("gzip", 415), ("br", 415), ("zstd", 415), ("identity", 200)] {
        let request = gateway.request(Method::POST, "/v1/chat/completions").header("content-encoding", encoding);
        let (status, headers, text) = answer(request.body(user("hi").to_string())).await;
        assert_eq!(status.as_u16(), expected, "{encoding}: {text}");
        if expected == 415 {
            assert_eq!(headers["accept-encoding"], "identity");
            let body: Value = serde_json::from_str(&text).unwrap();
            let message = format!("The request body has Content-Encoding {encoding:?}: send it as it is.");
            assert_eq!((&body["error"]["type"], &body["error"]["message"]), (&json!("invalid_request_error"), &json!(message)));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_do_not_come_fill_one_budget_and_small_requests_go_on() {
    let gateway = Gateway::start("CausalLM").await;
    let mut held = Vec::new();
    let refused = loop {
        match gateway.half_sent(4 << 20) {
            Ok(stream) => held.push(stream),
            Err(refused) => break refused,
        }
    };
    assert_eq!(held.len(), 16, "64 MiB");
    assert!(
        refused.starts_with("HTTP/1.1 429") && refused.contains("retry-after: 1\r\n") && refused.contains("rate_limit_exceeded"),
        "{refused}"
    );
    assert_eq!(gateway.post("/v1/chat/completions", user("hi")).await.0, 200);
    drop(held);
    wait("room", async || gateway.half_sent(4 << 20).is_ok()).await;
}

#[tokio::test]
async fn a_model_whose_name_has_slashes_is_found() {
    let gateway = Gateway::start_with("CausalLM", |settings| {
        settings.config.heads[0].served_model_name = "org/team/maths".into();
        settings.config.base_model_name = "org/team/base".into();
    })
    .await;
    for path in ["/v1/models/org/team/maths", "/v1/models/org%2Fteam%2Fbase"] {
        let (status, _, text) = answer(gateway.request(Method::GET, path)).await;
        assert_eq!((status.as_u16(), text.contains("\"id\":\"org/team/")), (200, true), "{path}: {text}");
    }
    assert_eq!(answer(gateway.request(Method::GET, "/v1/models/org/other")).await.0, 404);
}

#[tokio::test]
async fn a_byte_order_mark_before_the_json_is_dropped() {
    let gateway = Gateway::start("CausalLM").await;
    let request = gateway.request(Method::POST, "/v1/chat/completions").body(format!("\u{feff}{}", user("hi")));
    assert_eq!(answer(request).await.0, 200);
}

#[tokio::test]
async fn hints_are_taken_by_every_route() {
    let hints =
        json!({"user": "anna", "safety_identifier": "5f4d", "prompt_cache_key": "k", "metadata": {"a": "b"}, "service_tier": "auto"});
    let with_hints = |mut body: Value| {
        body.as_object_mut().unwrap().extend(hints.as_object().unwrap().clone());
        body
    };
    let gateway = Gateway::start("CausalLM").await;
    let plain = gateway.post("/v1/chat/completions", user("hi")).await.1;
    let (status, hinted) = gateway.post("/v1/chat/completions", with_hints(user("hi"))).await;
    assert_eq!((status, &hinted["choices"]), (200, &plain["choices"]), "{hinted}");
    assert_eq!(gateway.post("/v1/completions", with_hints(json!({"model": "maths", "prompt": "a"}))).await.0, 200);
    let classifier = Gateway::start("Classification").await;
    assert_eq!(classifier.post("/v1/classify", with_hints(json!({"input": "a"}))).await.0, 200);
}

/// As `apply_chat_template` of transformers 5.23 renders the scripted pool's template; both flags at once are refused there and by vLLM.
#[tokio::test]
async fn an_assistants_last_turn_goes_on_where_the_request_says_so() {
    let gateway = Gateway::start("CausalLM").await;
    let (end, question) = ([256], [ids("user: Q"), vec![256]].concat());
    let turns =
        |last: &str| json!({"model": "maths", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": last}]});
    for (last, flags, prompt) in [
        ("The sky", json!({"continue_final_message": true, "add_generation_prompt": false}), ids("assistant: The sky")),
        ("The sky ", json!({"continue_final_message": true, "add_generation_prompt": false}), ids("assistant: The sky ")),
        ("\n\nQ", json!({"continue_final_message": true, "add_generation_prompt": false}), ids("assistant: \n\nQ")),
        ("", json!({"continue_final_message": true, "add_generation_prompt": false}), ids("assistant: ")),
        ("The sky", json!({"add_generation_prompt": false}), [&ids("assistant: The sky")[..], &end].concat()),
        ("The sky", json!({"continue_final_message": false}), [&ids("assistant: The sky")[..], &end, &ids("A:")].concat()),
        ("The sky", json!({}), [&ids("assistant: The sky")[..], &end, &ids("A:")].concat()),
    ] {
        let mut body = turns(last);
        body.as_object_mut().unwrap().extend(flags.as_object().unwrap().clone());
        let (status, answer) = gateway.post("/v1/chat/completions", body).await;
        assert_eq!(status, 200, "{answer}");
        let asked = gateway.pool.asked.lock().unwrap().pop().unwrap().prompt;
        assert_eq!(asked, [question.clone(), prompt].concat(), "{last:?} {flags}");
    }
    for (flags, parameter) in [
        (json!({"continue_final_message": true}), "continue_final_message"),
        (json!({"continue_final_message": true, "add_generation_prompt": true}), "continue_final_message"),
        (json!({"continue_final_message": 1}), "continue_final_message"),
        (json!({"add_generation_prompt": "no"}), "add_generation_prompt"),
    ] {
        let mut body = turns("x");
        body.as_object_mut().unwrap().extend(flags.as_object().unwrap().clone());
        assert_eq!(gateway.post("/v1/chat/completions", body).await.1["error"]["param"], parameter, "{flags}");
    }
}
