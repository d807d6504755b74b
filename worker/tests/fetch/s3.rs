//! A bucket, on moto's S3 server.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use carryon_worker::fetch::part::CHUNK;

use crate::harness::{Fetch, check_content, length, model, until};

struct Moto {
    process: Child,
    url: String,
}

impl Moto {
    async fn start() -> Self {
        let cached = || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/carry-on/venvs/s3/bin/python");
        let python = std::env::var_os("CARRYON_S3_PYTHON").map_or_else(cached, PathBuf::from);
        assert!(python.is_file(), "{python:?} is missing: `make test` installs it, or set CARRYON_S3_PYTHON");
        let address: SocketAddr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut command = Command::new(python);
        command.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &address.port().to_string()]);
        let moto = Self { process: command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap(), url: format!("http://{address}") };
        until("moto listens", || std::net::TcpStream::connect(address).is_ok()).await;
        moto
    }

    async fn put(&self, path: &str, content: axum::body::Bytes) {
        let response = reqwest::Client::new().put(format!("{}/{path}", self.url)).body(content).send().await.unwrap();
        assert!(response.status().is_success(), "{path}: {}", response.status());
    }

    fn fetch(&self, url: &str) -> Fetch {
        let fetch = Fetch::new(&["--url", url]).env("AWS_ENDPOINT_URL", &self.url).env("AWS_ALLOW_HTTP", "true");
        fetch.env("AWS_ACCESS_KEY_ID", "key").env("AWS_SECRET_ACCESS_KEY", "secret").env("AWS_REGION", "us-east-1")
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_s_prefix_or_object_is_fetched_and_gone_on_with() {
    let moto = Moto::start().await;
    let model = model(4 * CHUNK as usize + 77);
    moto.put("bucket", axum::body::Bytes::new()).await;
    for (name, content) in &model {
        moto.put(&format!("bucket/models/m/{name}"), content.clone()).await;
    }
    moto.put("bucket/models/m2/config.json", crate::harness::CONFIG.into()).await;
    let fetch = moto.fetch("s3://bucket/models/m");
    // Killed somewhere, if it has not ended before.
    let mut process = fetch.start();
    let part = fetch.folder.join("model.safetensors.part");
    until("a chunk is there", || length(&part) >= CHUNK || fetch.folder.join("model.safetensors").exists()).await;
    process.kill().unwrap();
    process.wait().unwrap();
    fetch.succeeds().await;
    assert_eq!(fetch.names(), ["config.json", "model.safetensors", "tokenizer.json"]);
    check_content(&fetch, &model[2..5]);
    let single = moto.fetch("s3://bucket/models/m/tokenizer.json");
    single.succeeds().await;
    check_content(&single, &model[3..4]);
    let log = moto.fetch("s3://bucket/nothing/here/").fails(78).await;
    assert!(log.contains("there is nothing beneath s3://bucket/nothing/here/"), "{log}");
    let log = moto.fetch("s3://other/").fails(78).await;
    assert!(log.contains("s3://other") && log.contains("NoSuchBucket") && !log.contains("asking again"), "{log}");
}
