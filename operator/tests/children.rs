//! Rendered children of the examples, as reviewed snapshots. `UPDATE_SNAPSHOTS=1 cargo test` writes them anew.
#![allow(clippy::unwrap_used)]

mod common;

use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use carryon_operator::shared::{Settings, network_policy::Peers};
use carryon_operator::{deployment, job, pool};
use common::{at, example, patched, repository};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use serde::{Deserialize as _, Serialize};
use serde_json::json;

fn claim(name: &str) -> PersistentVolumeClaim {
    serde_json::from_value(json!({"metadata": {"name": name, "namespace": "default"}})).unwrap()
}

fn settings() -> Settings {
    Settings {
        worker_image: "example.org/worker:1".to_owned(),
        worker_cuda_image: Some("example.org/worker-cuda:1".to_owned()),
        peers: Some(peers()),
        ..Settings::default()
    }
}

/// As the chart names them.
fn peers() -> Peers {
    let path = repository().join("tests/chart/rendered.yaml");
    let chart = std::fs::read_to_string(&path).unwrap();
    let documents = serde_yaml::Deserializer::from_str(&chart).map(|document| serde_json::Value::deserialize(document).unwrap());
    let operator = documents.into_iter().find(|document| document["kind"] == "Deployment").unwrap();
    let mut arguments = operator["spec"]["template"]["spec"]["containers"][0]["args"].as_array().unwrap().iter();
    arguments.find(|argument| *argument == "--network-policies").unwrap();
    arguments.next().unwrap().as_str().unwrap().parse().unwrap()
}

fn loaded_pool() -> BaseModelPool {
    let pool = serde_json::to_value(example::<BaseModelPool>("quickstart/pool.yaml")).unwrap();
    let model = json!({"name": "SmolLM2", "digest": "sha256:w", "tokenizerDigest": "sha256:t", "identityDigest": "sha256:i",
        "hiddenSize": 576, "layers": 30, "vocabSize": 49152});
    serde_json::from_value(patched(pool, &json!({"status": {"readyReplicas": 1, "model": model}}))).unwrap()
}

/// Compares documents with `tests/snapshots/NAME.yaml`.
fn snapshot(name: &str, documents: &[serde_json::Value]) {
    let text: String = documents.iter().map(|document| format!("---\n{}", serde_yaml::to_string(document).unwrap())).collect();
    let path = repository().join(format!("operator/tests/snapshots/{name}.yaml"));
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let known = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(known == text, "{} differs; look at the change with UPDATE_SNAPSHOTS=1 and git diff", path.display());
}

fn value(object: &impl Serialize) -> serde_json::Value {
    serde_json::to_value(object).unwrap()
}

#[test]
fn children_of_a_pool() {
    let observed = pool::Observed { claim: Some(claim("models")), ..pool::Observed::default() };
    let validated = pool::validate(&example("quickstart/pool.yaml"), &observed, &settings()).unwrap();
    let pool::Children { revision: _, config_map, commit, service, network_policy, stateful_set, disruption_budget } =
        pool::build(&validated);
    assert_eq!(commit, None);
    snapshot(
        "pool",
        &[value(&config_map), value(&service), value(&network_policy.unwrap()), value(&stateful_set), value(&disruption_budget)],
    );
}

#[test]
fn a_pool_is_open_to_its_users_wherever_it_is_shared() {
    let labels = json!({"matchLabels": {"team": "blue"}});
    let expressions = json!({"matchExpressions": [{"key": "team", "operator": "Exists"}]});
    let cases = [
        (json!({"from": "Same"}), vec![]),
        (json!({"from": "All"}), vec![json!({})]),
        (json!({"from": "Selector", "selector": labels}), vec![labels]),
        (json!({"from": "Selector", "selector": expressions}), vec![expressions]),
    ];
    let policy = |patch: serde_json::Value, settings: Settings| {
        let patch = json!({"spec": {"sharing": {"namespaces": patch}}});
        let pool = serde_json::from_value(patched(value(&example::<BaseModelPool>("quickstart/pool.yaml")), &patch)).unwrap();
        let observed = pool::Observed { claim: Some(claim("models")), ..pool::Observed::default() };
        pool::build(&pool::validate(&pool, &observed, &settings).unwrap()).network_policy
    };
    for (sharing, namespaces) in cases {
        let from = value(&policy(sharing, settings()).unwrap())["spec"]["ingress"][0]["from"].take();
        let users = |peer: &&serde_json::Value| peer["podSelector"]["matchExpressions"][0]["values"] == json!(["trainer", "gateway"]);
        let users: Vec<_> = from.as_array().unwrap().iter().filter(users).map(|peer| peer.get("namespaceSelector")).collect();
        let expected = [None].into_iter().chain(namespaces.iter().map(Some));
        assert_eq!(users, expected.collect::<Vec<_>>());
        assert_eq!(from.as_array().unwrap().len(), users.len() + 2, "the operator and Prometheus: {from}");
    }
    assert_eq!(policy(json!({}), Settings { peers: None, ..settings() }), None);
}

#[test]
fn a_gateway_is_open_to_everybody_until_clients_are_named() {
    let open: Peers = json!({"operator": {}, "scrapers": [{"ipBlock": {"cidr": "10.0.0.1/32"}}]}).to_string().parse().unwrap();
    let clients = vec![serde_json::from_value(json!({"podSelector": {}})).unwrap()];
    let named = Peers { clients, ..open.clone() };
    for (peers, from) in [(open, json!(null)), (named, json!([{"podSelector": {}}, {}, {"ipBlock": {"cidr": "10.0.0.1/32"}}]))] {
        let policy = value(&gateway(Settings { peers: Some(peers), ..settings() }).network_policy);
        assert_eq!(policy["spec"]["ingress"][0]["from"], from);
    }
    let unknown = r#"{"operator": {}, "scraper": []}"#.parse::<Peers>();
    assert!(unknown.unwrap_err().to_string().contains("unknown field `scraper`"));
}

#[test]
fn a_model_in_an_image_is_copied_or_mounted() {
    let mut pods = Vec::new();
    for mount in ["Copy", "Volume"] {
        let image = json!({"reference": "example.org/model@sha256:m", "path": "models/smollm2", "mount": mount});
        let patch = json!({"spec": {"model": {"source": {"persistentVolumeClaim": null, "image": image}},
            "server": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}});
        let pool = serde_json::from_value(patched(value(&example::<BaseModelPool>("quickstart/pool.yaml")), &patch)).unwrap();
        let validated = pool::validate(&pool, &pool::Observed::default(), &settings()).unwrap();
        let pod = value(&pool::build(&validated).stateful_set)["spec"]["template"]["spec"].take();
        let worker = &pod["containers"][0];
        pods.push(json!({"args": worker["args"], "volumeMounts": worker["volumeMounts"], "initContainers": pod["initContainers"], "volumes": pod["volumes"]}));
    }
    snapshot("model-in-image", &pods);
}

#[test]
fn a_model_elsewhere_is_fetched_before_the_worker_starts() {
    let hub = json!({"repository": "acme/base-7b", "revision": "v2", "tokenSecretRef": {"name": "hf", "key": "token"},
        "endpoint": "https://hub.example.com", "files": ["*.safetensors", "config.json"]});
    let models = [
        json!({"source": {"huggingFace": hub}, "cache": {"persistentVolumeClaim": {"claimName": "models", "path": "hub"}},
            "caBundle": {"configMapKeyRef": {"name": "authorities"}}}),
        json!({"source": {"objectStore": {"url": "s3://bucket/models/base-7b/", "secretRef": {"name": "s3"}}}, "cache": {"hostPath": {"path": "/var/models"}},
            "caBundle": {"secretKeyRef": {"name": "authorities", "key": "root.pem"}}}),
        json!({"source": {"objectStore": {"url": "https://files.example.com/base.Q8_0.gguf?signature=x"}}, "cache": {"emptyDir": {"sizeLimit": "20Gi"}}}),
        json!({"source": {"huggingFace": {"repository": "acme/base-7b", "revision": "0123456789abcdef0123456789abcdef01234567"}}}),
    ];
    let pods = models.map(|mut model| {
        model["source"]["persistentVolumeClaim"] = json!(null);
        let server = json!({"env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}, {"name": "HF_TOKEN", "value": "other"}],
            "resources": {"limits": {"memory": "8Gi"}}});
        let patch = json!({"spec": {"model": model, "server": server, "replicas": 3}});
        let pool = serde_json::from_value(patched(value(&example::<BaseModelPool>("quickstart/pool.yaml")), &patch)).unwrap();
        let observed = pool::Observed { claim: Some(claim("models")), ..pool::Observed::default() };
        let children = pool::build(&pool::validate(&pool, &observed, &settings()).unwrap());
        let mut set = value(&children.stateful_set)["spec"].take();
        let pod = set["template"]["spec"].take();
        let worker = &pod["containers"][0];
        json!({"replicas": set["replicas"], "args": worker["args"], "env": worker["env"], "volumeMounts": worker["volumeMounts"],
            "initContainers": pod["initContainers"], "volumes": pod["volumes"], "securityContext": pod["securityContext"]})
    });
    snapshot("model-fetched", &pods);
}

/// A pod's parts that a GPU is asked for by, and those that it decides on.
#[test]
fn a_pool_that_asks_for_a_gpu_is_started_with_the_image_for_cuda() {
    let limit = |name: &str| json!({"resources": {"limits": {name: 1, "memory": "8Gi"}}});
    let claims = json!({"scheduling": {"resourceClaims": [{"name": "card", "resourceClaimTemplateName": "h100"}]}});
    let own = json!({"image": "example.org/mine:1", "env": [{"name": "CARRYON_MEMORY_LIMIT", "value": "1000000000"}]});
    let cases = [
        (json!({"kvCacheMemory": "2Gi"}), json!({"resources": {"limits": {"memory": "8Gi"}}})),
        (json!({"kvCacheMemory": "60Gi"}), limit("nvidia.com/gpu")),
        (json!({}), limit("nvidia.com/mig-3g.40gb")),
        (json!({}), claims),
        (json!({"device": "cuda:1"}), json!({"scheduling": {"runtimeClassName": "nvidia"}})),
        (json!({"device": "cpu"}), limit("nvidia.com/gpu")),
        (json!({"device": "cuda"}), own),
    ];
    let pods = cases.map(|(engine, server)| {
        let patch = json!({"spec": {"engine": engine, "server": server}});
        let pool = serde_json::from_value(patched(value(&example::<BaseModelPool>("quickstart/pool.yaml")), &patch)).unwrap();
        let observed = pool::Observed { claim: Some(claim("models")), ..pool::Observed::default() };
        let pool::Children { config_map, stateful_set, .. } = pool::build(&pool::validate(&pool, &observed, &settings()).unwrap());
        let config: serde_json::Value = serde_json::from_str(&config_map.data.unwrap()["config.json"]).unwrap();
        let pod = value(&stateful_set)["spec"]["template"]["spec"].take();
        let worker = &pod["containers"][0];
        json!({"engine": config["engine"], "image": worker["image"], "env": worker["env"], "resources": worker["resources"],
            "resourceClaims": pod["resourceClaims"], "runtimeClassName": pod["runtimeClassName"]})
    });
    snapshot("gpu", &pods);
}

#[test]
fn a_job_that_asks_for_a_gpu_is_trained_on_it_with_the_image_for_cuda() {
    let limit = |name: &str| json!({"resources": {"limits": {name: 1, "memory": "8Gi"}}});
    let claims = json!({"scheduling": {"resourceClaims": [{"name": "card", "resourceClaimTemplateName": "h100"}]}});
    let own = json!({"image": "example.org/mine:1", "resources": {"limits": {"nvidia.com/gpu": 1}}});
    let observed = job::Observed {
        pool: Some(loaded_pool()),
        claims: vec![claim("quickstart-data"), claim("quickstart-output")],
        ..job::Observed::default()
    };
    let built = |trainer: &serde_json::Value, settings: &Settings| {
        let patch = json!({"spec": {"trainer": trainer}});
        let job: CarryOnJob = serde_json::from_value(patched(value(&example::<CarryOnJob>("quickstart/job.yaml")), &patch)).unwrap();
        job::validate(&job, &observed, settings, &at(0)).map(|validated| job::build(&validated))
    };
    let pods = [limit("cpu"), limit("nvidia.com/gpu"), limit("nvidia.com/mig-1g.10gb"), claims, own].map(|trainer| {
        let attempt = built(&trainer, &settings()).unwrap().attempt.unwrap();
        let worker = value(&attempt)["spec"]["template"]["spec"]["containers"][0].take();
        json!({"image": worker["image"], "args": worker["args"], "resources": worker["resources"]})
    });
    snapshot("job-gpu", &pods);
    let refused = built(&limit("nvidia.com/gpu"), &Settings { worker_cuda_image: None, ..settings() }).unwrap_err();
    assert!(
        refused
            .message
            .starts_with("spec.trainer.resources.limits[nvidia.com/gpu] asks for a GPU, and the operator has no worker image for CUDA")
    );
}

#[test]
fn children_of_a_job() {
    let claims = vec![claim("quickstart-data"), claim("quickstart-output")];
    let observed = job::Observed { pool: Some(loaded_pool()), claims, ..job::Observed::default() };
    let job: CarryOnJob = example("quickstart/job.yaml");
    let validated = job::validate(&job, &observed, &settings(), &at(0)).unwrap();
    let job::Children { revision: _, config_map, network_policy, attempt, stop } = job::build(&validated);
    assert!(stop.is_empty());
    snapshot("job", &[value(&config_map.unwrap()), value(&network_policy.unwrap()), value(&attempt.unwrap())]);
}

#[test]
fn what_a_job_says_of_its_data_reaches_its_trainer() {
    let claims = vec![claim("quickstart-data"), claim("quickstart-output")];
    let observed = job::Observed { pool: Some(loaded_pool()), claims, ..job::Observed::default() };
    let patch = json!({"spec": {"data": {"targets": "LastAssistant", "addEosToken": true, "splitSpecialTokens": false}}});
    let job = serde_json::from_value(patched(value(&example::<CarryOnJob>("quickstart/job.yaml")), &patch)).unwrap();
    let config_map = job::build(&job::validate(&job, &observed, &settings(), &at(0)).unwrap()).config_map.unwrap();
    let config: serde_json::Value = serde_json::from_str(&config_map.data.unwrap()["config.json"]).unwrap();
    assert_eq!(
        (&config["targets"], &config["addEosToken"], &config["splitSpecialTokens"]),
        (&json!("LastAssistant"), &json!(true), &json!(false))
    );
}

fn gateway(settings: Settings) -> deployment::Children {
    let artifact = json!({"uri": "pvc://quickstart-output/quickstart/heads/sha256-h", "digest": "sha256:h", "baseModelDigest": "sha256:i"});
    let complete = json!({"type": "Complete", "status": "True", "reason": "Complete", "message": "", "lastTransitionTime": at(0)});
    let job = value(&example::<CarryOnJob>("quickstart/job.yaml"));
    let job: CarryOnJob =
        serde_json::from_value(patched(job, &json!({"status": {"conditions": [complete], "artifact": artifact}}))).unwrap();
    let observed = deployment::Observed {
        pool: Some(loaded_pool()),
        jobs: vec![job],
        claims: vec![claim("quickstart-output")],
        ..deployment::Observed::default()
    };
    let patch = json!({"spec": {"api": {"keys": [{"name": "one", "secretRef": {"name": "key", "key": "token"}}], "allowedOrigins": ["https://app.example.com"]}, "gateway": {"resources": {"limits": {"cpu": "1500m"}}}}});
    let deployment = value(&example::<CarryOnDeployment>("quickstart/deployment.yaml"));
    let deployment: CarryOnDeployment = serde_json::from_value(patched(deployment, &patch)).unwrap();
    deployment::build(&deployment::validate(&deployment, &observed, &settings).unwrap())
}

#[test]
fn children_of_a_deployment() {
    let deployment::Children { revision: _, config_map, service, network_policy, deployment, disruption_budget } = gateway(settings());
    let children = [value(&config_map), value(&service), value(&network_policy.unwrap()), value(&deployment), value(&disruption_budget)];
    snapshot("deployment", &children);
}
