//! Keys that clients must send.

use reqwest::Method;

use carryon_worker::serve::Settings;
use serde_json::{Value, json};

use crate::clients::answer;
use crate::{Gateway, head, scripted_pool, settings, wait};

impl Gateway {
    /// The status of an answer to a client with this key.
    async fn ask(&self, key: Option<&str>) -> u16 {
        let request = self.request(Method::GET, "/v1/models");
        answer(key.into_iter().fold(request, |request, key| request.bearer_auth(key))).await.0.as_u16()
    }
}

#[tokio::test]
async fn a_key_is_asked_for_where_one_is_set_and_a_new_one_counts_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    let (pool, url) = scripted_pool::start().await;
    let gateway =
        Gateway::begin(pool, |folder| Settings { api_key_files: vec![file.clone()], ..settings(folder, &head("CausalLM", |_| ()), url) })
            .await;
    let states = async || serde_json::from_str::<Value>(&answer(gateway.request(Method::GET, "/status")).await.2).unwrap();
    // Before there is a key, and when it is taken away, nobody may ask; and it takes no other's place before there is one.
    assert_eq!((gateway.ask(None).await, gateway.ask(Some("")).await), (401, 401));
    for (content, state) in [(None, "missing"), (Some(" \n"), "empty"), (Some("a\nb"), "unusable")] {
        content.into_iter().for_each(|content| std::fs::write(&file, content).unwrap());
        wait("its state", async || states().await["api_keys"] == json!([state])).await;
        assert_eq!(answer(gateway.request(Method::GET, "/readyz")).await.0, 503, "{state}");
    }
    std::fs::write(&file, "old\n").unwrap();
    wait("the first key", async || gateway.ask(Some("old")).await == 200).await;
    gateway.ready().await;
    assert_eq!(states().await, json!({"api_keys": ["trimmed"]}));
    assert_eq!((gateway.ask(None).await, gateway.ask(Some("new")).await), (401, 401));
    std::fs::write(&file, "new").unwrap();
    wait("the second key", async || gateway.ask(Some("new")).await == 200).await;
    assert_eq!(gateway.ask(Some("old")).await, 401);
    std::fs::remove_file(&file).unwrap();
    wait("no key", async || gateway.ask(Some("new")).await == 401).await;
}

#[tokio::test]
async fn each_of_several_keys_fits_and_one_may_change_alone() {
    let folder = tempfile::tempdir().unwrap();
    let files = ["anna", "ben"].map(|name| folder.path().join(name));
    files.iter().zip(["sk-anna", "sk-ben"]).for_each(|(file, key)| std::fs::write(file, key).unwrap());
    let gateway = Gateway::start_with("CausalLM", |settings| settings.api_key_files = files.to_vec()).await;
    assert_eq!([gateway.ask(Some("sk-anna")).await, gateway.ask(Some("sk-ben")).await], [200, 200]);
    assert_eq!([gateway.ask(None).await, gateway.ask(Some("sk-annask-ben")).await], [401, 401]);
    std::fs::write(&files[1], "sk-ben-2").unwrap();
    wait("the changed key", async || gateway.ask(Some("sk-ben-2")).await == 200).await;
    assert_eq!([gateway.ask(Some("sk-ben")).await, gateway.ask(Some("sk-anna")).await], [401, 200]);
    std::fs::remove_file(&files[0]).unwrap();
    wait("the end of the other", async || gateway.ask(Some("sk-anna")).await == 401).await;
    assert_eq!(gateway.ask(Some("sk-ben-2")).await, 200, "one that is not there takes none from the others");
    std::fs::remove_file(&files[1]).unwrap();
    wait("no key", async || gateway.ask(Some("sk-ben-2")).await == 401).await;
    assert_eq!(gateway.ask(None).await, 401, "without any, nobody may ask");
}

/// RFC 9110: a scheme has no case (11.1), spaces may be several (11.4), and a 401 names the scheme (15.5.2).
#[tokio::test]
async fn a_key_is_a_bearer_token_in_any_case() {
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    std::fs::write(&key, "sk-1\r\n").unwrap();
    let gateway = Gateway::start_with("CausalLM", |settings| settings.api_key_files = vec![key]).await;
    let ask = async |sent: &str| answer(gateway.request(Method::GET, "/v1/models").header("authorization", sent)).await;
    for sent in ["Bearer sk-1", "bearer sk-1", "BEARER sk-1", "Bearer   sk-1"] {
        assert_eq!(ask(sent).await.0, 200, "{sent}");
    }
    for sent in ["sk-1", "Basic sk-1", "Bearersk-1", "Bearer", "Bearer ", "Bearer sk-12", "Bearer SK-1"] {
        let (status, headers, _) = ask(sent).await;
        assert_eq!((status.as_u16(), &headers["www-authenticate"]), (401, &"Bearer".parse().unwrap()), "{sent}");
    }
}
