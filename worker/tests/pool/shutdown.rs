use std::time::Duration;

use carryon_crds::pool::Dtype;
use carryon_crds::wire::{BaseConfig, ExitCode};
use carryon_worker::base;
use carryon_worker::exchange::wire::GenerateRequest;
use carryon_worker::exchange::{ClientError, PoolClient};
use futures::StreamExt as _;
use tokio::net::TcpListener;

use crate::common::tokens;
use crate::harness::{ENGINE, Pool};

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_began_are_finished_before_the_end() {
    let mut pool = Pool::tiny(Dtype::Float32, ENGINE).await;
    let prompt = tokens(5, 101, 1);
    let mut events = Box::pin(pool.client.generate(None, &GenerateRequest::greedy(prompt.clone(), 200)).await.unwrap());
    events.next().await.unwrap().unwrap();
    pool.end.take().unwrap().send(()).unwrap();
    let rest: Vec<_> = events.map(Result::unwrap).collect().await;
    assert_eq!(rest.len(), 200, "199 tokens and the end");
    pool.server.take().unwrap().await.unwrap().unwrap();
    let impatient = PoolClient::connect(std::slice::from_ref(&pool.url), Duration::ZERO).unwrap();
    assert!(matches!(impatient.describe().await, Err(ClientError::Unreachable { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_cannot_load_ends_with_a_named_error() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = BaseConfig { name: "test".to_owned(), dtype: Dtype::Float32, engine: ENGINE, text_only: false };
    let error = base::serve(
        listener,
        config,
        "/nowhere/model.gguf".into(),
        base::Placement::cpu(1),
        std::time::Duration::ZERO,
        std::future::pending(),
    )
    .await
    .unwrap_err();
    assert!(error.to_string().contains("/nowhere/model.gguf"), "{error}");
    assert_eq!(error.exit_code(), ExitCode::Retryable);
}
