//! 20,000 Secrets and ConfigMaps that are nobody's business here, and the quick start beside them.

use carryon_crds::CarryOnJob;
use carryon_tests::cluster::{Object, TestCluster};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Api;
use kube::api::PostParams;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Bench, NAMESPACES, peak_rss_mb};

/// Of each of the two types.
const OBJECTS: usize = 10_000;
const BYTES: usize = 50_000;
/// Sent at once.
const SENT: usize = 16;
const TRAINING: std::time::Duration = std::time::Duration::from_secs(1);

#[derive(Debug, Serialize)]
pub struct Report {
    foreign_objects: usize,
    foreign_mb: f64,
    jobs: usize,
    /// The most the operator ever held.
    rss_mb: f64,
}

pub fn run() -> Report {
    let mut bench = Bench::start_beside(TRAINING, |cluster| {
        cluster.kubectl(&["create", "namespace", "foreign"]);
        fill::<ConfigMap>(cluster, "data");
        fill::<Secret>(cluster, "stringData");
    });
    bench.pools();
    bench.jobs(1);
    bench.until::<CarryOnJob>("Complete", |job| job.status.as_ref().map(|status| status.conditions.as_slice()));
    let foreign_objects = 2 * OBJECTS;
    let foreign_mb = (foreign_objects * BYTES) as f64 / 1e6;
    Report { foreign_objects, foreign_mb, jobs: NAMESPACES, rss_mb: peak_rss_mb(bench.operator.0.id()) }
}

fn fill<K: Object>(cluster: &TestCluster, member: &str) {
    eprintln!("{OBJECTS} {} of {BYTES} bytes", K::plural(&()));
    let api = Api::<K>::namespaced(cluster.client(), "foreign");
    let create = |number: usize| {
        let object: Value = json!({ "metadata": { "name": format!("foreign-{number}") }, member: { "key": "x".repeat(BYTES) } });
        let api = api.clone();
        async move {
            let object: K = serde_json::from_value(object).unwrap();
            api.create(&PostParams::default(), &object).await.unwrap();
        }
    };
    cluster.block_on(futures::stream::iter(0..OBJECTS).for_each_concurrent(SENT, create));
}
