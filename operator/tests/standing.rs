//! Where pools and deployments stand, as tables: what is observed → Ready, Reconciling or Stalled, with reason and message.
#![allow(clippy::unwrap_used)]

mod common;

use carryon_crds::deployment::HeadStatus;
use carryon_crds::wire::{GatewayStatus, KeyState, ModelDescription};
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use carryon_operator::{deployment, pool, shared::Settings};
use common::{at, example, patched, summary, with};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use serde_json::{Value, json};

fn pod(name: &str, patch: Value) -> Pod {
    let pod = json!({"metadata": {"name": name, "labels": {"app.kubernetes.io/component": "pool"}}, "status": {"containerStatuses": [{"name": "pool", "image": "", "imageID": "", "ready": false, "restartCount": 0}]}});
    serde_json::from_value(patched(pod, &patch)).unwrap()
}

fn crashed(name: &str, code: i32, message: &str) -> Pod {
    let last = json!({"terminated": {"exitCode": code, "message": message}});
    let state = json!({"waiting": {"reason": "CrashLoopBackOff"}});
    let container =
        json!({"name": "pool", "image": "", "imageID": "", "ready": false, "restartCount": 2, "state": state, "lastState": last});
    pod(name, json!({"status": {"containerStatuses": [container]}}))
}

fn model(weights: &str) -> ModelDescription {
    serde_json::from_value(json!({
        "format_version": 1, "name": "SmolLM2", "model_type": "llama", "instance": "i", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152,
        "identity": {"weights": weights, "tokenizer": "t", "chat_template": "", "norm_point": "final_norm"},
        "numerics": {"dtype": "bfloat16", "device": "cpu", "kernel": "k"}, "eos_token_ids": [2],
        "limits": {"max_model_len": 1, "max_sequences": 1, "max_request_tokens": 1, "max_body_bytes": 1}
    }))
    .unwrap()
}

/// A pod that runs since second 100, whose Ready condition is so since another one.
fn since(name: &str, ready: &str, second: i64) -> Pod {
    let container = json!({"name": "pool", "image": "", "imageID": "", "ready": ready == "True", "restartCount": 0, "state": {"running": {"startedAt": at(100)}}});
    let condition = json!({"type": "Ready", "status": ready, "lastTransitionTime": at(second)});
    pod(name, json!({"status": {"containerStatuses": [container], "conditions": [condition]}}))
}

/// Ready and updated pods, pods, models; what the pool says.
type PoolCase = (&'static str, i32, Value, Vec<Pod>, Vec<(&'static str, &'static str)>, &'static str);

#[test]
fn a_pool_says_what_its_pods_do() {
    let unschedulable = json!({"status": {"containerStatuses": null, "conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}]}});
    let pulling = json!({"name": "pool", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}});
    let cases: Vec<PoolCase> = vec![
        ("new", 1, json!({"replicas": 0}), vec![], vec![], "Reconciling PodsStarting: 0 of 1 pods are ready; the others load the model"),
        (
            "no node",
            1,
            json!({"replicas": 1}),
            vec![pod("a", unschedulable)],
            vec![],
            "Reconciling Unschedulable: 0 of 1 pods are ready; pod a has no node: 0/3 nodes are available",
        ),
        (
            "no image",
            1,
            json!({"replicas": 1}),
            vec![pod("a", json!({"status": {"containerStatuses": [pulling]}}))],
            vec![],
            "Reconciling PodWaiting: 0 of 1 pods are ready; pod a waits: ErrImagePull: no such image",
        ),
        (
            "crash",
            1,
            json!({"replicas": 1}),
            vec![crashed("b", 1, "a\nout of memory\n"), pod("c", json!({}))],
            vec![],
            "Reconciling PodCrashing: 0 of 1 pods are ready; pod b ended with exit code 1 and was restarted 2 times; it said: out of memory",
        ),
        (
            "refusal",
            1,
            json!({"replicas": 1}),
            vec![crashed("a", 78, "error: no model.gguf\nhint")],
            vec![],
            "Stalled WorkerRefused: 0 of 1 pods are ready; pod a ended with exit code 78 and was restarted 2 times; it said: error: no model.gguf",
        ),
        (
            "refusal of one",
            2,
            json!({"replicas": 2, "readyReplicas": 1}),
            vec![crashed("a", 78, "bad")],
            vec![],
            "Stalled WorkerRefused: 1 of 2 pods are ready; pod a ended with exit code 78 and was restarted 2 times; it said: bad",
        ),
        (
            "rolling",
            1,
            json!({"replicas": 1, "readyReplicas": 1, "updatedReplicas": 0}),
            vec![],
            vec![],
            "Reconciling PodsRolling: 0 of 1 pods run the present configuration",
        ),
        (
            "not asked yet",
            1,
            json!({"replicas": 1, "readyReplicas": 1, "updatedReplicas": 1}),
            vec![],
            vec![],
            "Reconciling ModelUnknown: the pods are ready; waiting for one to describe its model",
        ),
        (
            "ready",
            1,
            json!({"replicas": 1, "readyReplicas": 1, "updatedReplicas": 1}),
            vec![],
            vec![("a", "w")],
            "Ready PodsReady: 1 of 1 pods serve SmolLM2",
        ),
        (
            "two models",
            2,
            json!({"replicas": 2, "readyReplicas": 2, "updatedReplicas": 2}),
            vec![],
            vec![("a", "w"), ("b", "v")],
            "Stalled ModelsDiffer: pods a and b loaded different models: make the volume's content the same and restart them",
        ),
        (
            "loading",
            2,
            json!({"replicas": 2, "readyReplicas": 1, "updatedReplicas": 2}),
            vec![since("a", "True", 160), since("b", "False", 99)],
            vec![("a", "w")],
            "Reconciling PodsStarting: 1 of 2 pods are ready; the others load the model",
        ),
        (
            "hanging",
            2,
            json!({"replicas": 2, "readyReplicas": 1, "updatedReplicas": 2}),
            vec![since("a", "True", 160), since("b", "False", 200)],
            vec![("a", "w")],
            "Reconciling PodsNotAnswering: 1 of 2 pods are ready; pod b was ready and no longer answers: see its log; it is restarted when that lasts",
        ),
        ("none wanted", 0, json!({"replicas": 0}), vec![], vec![], "Ready ScaledToZero: spec.replicas is 0: no pod runs"),
    ];
    for (name, replicas, status, pods, models, says) in cases {
        let pool: BaseModelPool = with(&example("quickstart/pool.yaml"), json!({"spec": {"replicas": replicas}}));
        let claim = Some(serde_json::from_value(json!({"metadata": {"name": "models"}})).unwrap());
        let models = models.into_iter().map(|(pod, weights)| (pod.to_owned(), model(weights))).collect();
        let observed = pool::Observed { claim, pods, models, ..pool::Observed::default() };
        let validated = pool::validate(&pool, &observed, &Settings::default()).unwrap();
        let applied = pool::Applied { stateful_set: with(&pool::build(&validated).stateful_set, json!({"status": status})) };
        let outcome = Ok((validated, applied));
        let status = pool::status(&pool, &outcome, &observed, &at(0));
        assert_eq!(summary(&status.conditions), says, "{name}");
        assert_eq!(status.observed_generation, Some(1));
        // The same again changes nothing, not even a time.
        let again = BaseModelPool { status: Some(status.clone()), ..pool.clone() };
        assert_eq!(pool::status(&again, &outcome, &observed, &at(9)), status, "{name}");
    }
}

#[test]
fn what_is_said_of_a_pool_s_models_stands_until_all_pods_are_heard() {
    let ready = |name: &str| pod(name, json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}}));
    let mut pool: BaseModelPool = with(&example("quickstart/pool.yaml"), json!({"spec": {"replicas": 2}}));
    let mut observed = pool::Observed {
        claim: Some(serde_json::from_value(json!({"metadata": {"name": "models"}})).unwrap()),
        pods: vec![ready("a"), ready("b")],
        models: [("a", "w"), ("b", "v")].map(|(pod, weights)| (pod.to_owned(), model(weights))).into(),
        ..pool::Observed::default()
    };
    let judge = |pool: &BaseModelPool, observed: &pool::Observed| {
        let validated = pool::validate(pool, observed, &Settings::default()).unwrap();
        let counts = json!({"status": {"replicas": 2, "readyReplicas": 2, "updatedReplicas": 2}});
        let applied = pool::Applied { stateful_set: with(&pool::build(&validated).stateful_set, counts) };
        pool::status(pool, &Ok((validated, applied)), observed, &at(0))
    };
    let differ = judge(&pool, &observed);
    assert!(summary(&differ.conditions).starts_with("Stalled ModelsDiffer: pods a and b"));
    pool.status = Some(differ.clone());
    // Another operator takes over and hears one pod after the other.
    for unheard in ["a", "b"] {
        let mut heard = observed.clone();
        heard.models.remove(unheard);
        assert_eq!(judge(&pool, &heard), differ, "{unheard} is not heard yet");
    }
    observed.models = [("a", "v"), ("b", "v")].map(|(pod, weights)| (pod.to_owned(), model(weights))).into();
    assert!(summary(&judge(&pool, &observed).conditions).starts_with("Ready PodsReady"));
}

#[test]
fn a_pool_without_its_volume_waits() {
    let pool: BaseModelPool = example("quickstart/pool.yaml");
    let observed = pool::Observed::default();
    let refusal = pool::validate(&pool, &observed, &Settings::default()).unwrap_err();
    let status = pool::status(&pool, &Err(refusal), &observed, &at(0));
    let says = "Reconciling ClaimNotFound: PersistentVolumeClaim default/models (spec.model.source) not found: create it";
    assert_eq!(summary(&status.conditions), says);
}

#[test]
fn a_pool_that_its_pods_could_not_run_is_not_started() {
    let engine = |patch: Value| json!({"spec": {"engine": patch, "server": {"resources": {"limits": {"memory": "1Gi"}}}}});
    let gpu = json!({"spec": {"server": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}});
    let no_image = "asks for a GPU, and the operator has no worker image for CUDA: give it one (workerImage.cuda of the chart, \
        --worker-cuda-image), name one in spec.server.image, or set spec.engine.device to cpu";
    let cases = [
        (gpu, format!("Stalled NoCudaImage: spec.server.resources.limits[nvidia.com/gpu] {no_image}")),
        (engine(json!({"device": "cuda"})), format!("Stalled NoCudaImage: spec.engine.device {no_image}")),
        (
            engine(json!({"kvCacheMemory": "1024Mi"})),
            "Stalled KvCacheTooLarge: spec.engine.kvCacheMemory: 1Gi and the weights do not fit into spec.server.resources.limits.memory: 1Gi"
                .to_owned(),
        ),
    ];
    for (patch, says) in cases {
        let pool: BaseModelPool = with(&example("quickstart/pool.yaml"), patch);
        let observed = pool::Observed { claim: Some(claim("models")), ..pool::Observed::default() };
        let refusal = pool::validate(&pool, &observed, &Settings::default()).unwrap_err();
        let status = pool::status(&pool, &Err(refusal), &observed, &at(0));
        assert_eq!((summary(&status.conditions), status.worker_image), (says, None));
    }
}

/// A world in which the deployment can serve.
fn world() -> deployment::Observed {
    let condition = json!({"type": "Complete", "status": "True", "reason": "Complete", "message": "", "lastTransitionTime": at(0)});
    let artifact = json!({"uri": "pvc://out/quickstart/heads/sha256-h", "digest": "sha256:h", "baseModelDigest": "sha256:b"});
    let model = json!({"name": "SmolLM2", "digest": "", "tokenizerDigest": "", "identityDigest": "sha256:b", "hiddenSize": 1, "layers": 1, "vocabSize": 1});
    deployment::Observed {
        pool: Some(with(&example("quickstart/pool.yaml"), json!({"status": {"readyReplicas": 1, "model": model}}))),
        jobs: vec![with(
            &example::<CarryOnJob>("quickstart/job.yaml"),
            json!({"status": {"conditions": [condition], "artifact": artifact}}),
        )],
        claims: vec![claim("out")],
        ..deployment::Observed::default()
    }
}

fn claim(name: &str) -> PersistentVolumeClaim {
    serde_json::from_value(json!({"metadata": {"name": name}})).unwrap()
}

/// A patch: heads by name, each of a job.
fn heads(heads: &[(&str, &str)]) -> Value {
    let heads: Vec<Value> = heads.iter().map(|(name, job)| json!({"name": name, "source": {"jobRef": {"name": job}}})).collect();
    json!({"spec": {"heads": heads}})
}

fn says(deployment: &CarryOnDeployment, observed: &deployment::Observed) -> (String, CarryOnDeployment) {
    let outcome = deployment::validate(deployment, observed, &Settings::default()).map(|validated| {
        let counts = json!({"replicas": 1, "readyReplicas": 1, "updatedReplicas": 1, "observedGeneration": 1});
        let applied = deployment::Applied { deployment: with(&deployment::build(&validated).deployment, json!({"status": counts})) };
        (validated, applied)
    });
    let status = deployment::status(deployment, &outcome, observed, &at(0));
    (summary(&status.conditions), CarryOnDeployment { status: Some(status), ..deployment.clone() })
}

#[test]
fn a_deployment_says_what_it_waits_for() {
    let deployment: CarryOnDeployment = example("quickstart/deployment.yaml");
    let keyed: CarryOnDeployment =
        with(&deployment, json!({"spec": {"api": {"keys": [{"name": "one", "secretRef": {"name": "key", "key": "token"}}]}}}));
    let failed = json!({"type": "Failed", "status": "True", "reason": "DataRefused", "message": "", "lastTransitionTime": at(0)});
    let other_base = json!({"status": {"artifact": {"baseModelDigest": "sha256:other"}}});
    let unmet = json!({"status": {"artifact": {"unmetThresholds": ["loss is 0.5, more than 0.4"]}}});
    let check = |deployment: &CarryOnDeployment, change: &dyn Fn(&mut deployment::Observed), expected: &str| {
        let mut observed = world();
        change(&mut observed);
        assert_eq!(says(deployment, &observed).0, expected);
    };
    check(&deployment, &|_| {}, "Ready Serving: 1 of 1 gateways serve quickstart");
    check(
        &deployment,
        &|world| world.jobs.clear(),
        "Reconciling JobNotFound: CarryOnJob default/quickstart (spec.heads[quickstart].source.jobRef) not found: create it",
    );
    check(
        &deployment,
        &|world| world.jobs[0].status = None,
        "Reconciling JobNotComplete: waiting for CarryOnJob default/quickstart to complete",
    );
    check(
        &deployment,
        &|world| world.jobs[0] = with(&world.jobs[0], json!({"status": {"conditions": [failed]}})),
        "Stalled JobFailed: CarryOnJob default/quickstart has failed: refer to another job",
    );
    check(
        &deployment,
        &|world| world.jobs[0] = with(&world.jobs[0], unmet.clone()),
        "Stalled NotPromotable: head quickstart of CarryOnJob default/quickstart is not promotable: loss is 0.5, more than 0.4",
    );
    check(
        &deployment,
        &|world| world.claims.clear(),
        "Reconciling ClaimNotFound: PersistentVolumeClaim default/out with the head not found: create it",
    );
    check(
        &deployment,
        &|world| world.pool = None,
        "Reconciling PoolNotFound: BaseModelPool default/smollm2 (spec.pools[0]) not found: create it",
    );
    check(
        &deployment,
        &|world| world.jobs[0] = with(&world.jobs[0], other_base.clone()),
        "Stalled BaseModelDiffers: head quickstart was trained on base sha256:other, BaseModelPool default/smollm2 runs sha256:b: name a pool of the same model",
    );
    let serving = "Ready Serving: 1 of 1 gateways serve quickstart";
    check(&keyed, &|_| {}, serving);
    for (state, expected) in [
        (KeyState::Usable, serving),
        (
            KeyState::Trimmed,
            r#"Ready Serving: 1 of 1 gateways serve quickstart; the white space around "token" in Secret default/key is not part of the API key"#,
        ),
        (KeyState::Empty, r#"Reconciling SecretKeyEmpty: Secret default/key holds nothing under "token": give it the API key"#),
        (
            KeyState::Unusable,
            r#"Reconciling SecretKeyUnusable: Secret default/key holds a line break or control character within "token", or too much, which no request can carry: give it one line"#,
        ),
        (
            KeyState::Missing,
            r#"Reconciling SecretKeyNotFound: Secret default/key (spec.api.keys[one].secretRef) or its key "token" not found: create it"#,
        ),
    ] {
        let say = |world: &mut deployment::Observed| {
            world.pods = vec![pod("gateway", json!({})), pod("silent", json!({}))];
            world.said.insert("gateway".to_owned(), GatewayStatus { api_keys: vec![state] });
        };
        check(&keyed, &say, expected);
    }
}

#[test]
fn a_job_reference_is_resolved_once() {
    let mut observed = world();
    let (_, resolved) = says(&example("quickstart/deployment.yaml"), &observed);
    observed.jobs.clear();
    assert_eq!(says(&resolved, &observed).0, "Ready Serving: 1 of 1 gateways serve quickstart");
    let (said, other) = says(&with(&resolved, heads(&[("quickstart", "next")])), &observed);
    assert_eq!(said, "Reconciling JobNotFound: CarryOnJob default/next (spec.heads[quickstart].source.jobRef) not found: create it");
    let head = &other.status.unwrap().heads[0];
    assert_eq!((&head.resolved, head.stable.as_ref().unwrap().digest.as_str()), (&None, "sha256:h"), "what serves is still named");
}

#[test]
fn a_job_made_anew_under_its_name_takes_over_when_it_is_complete() {
    let deployment = example("quickstart/deployment.yaml");
    let (_, first) = says(&deployment, &world());
    let head = |deployment: &CarryOnDeployment| deployment.status.as_ref().unwrap().heads[0].stable.clone().unwrap();
    assert_eq!((head(&first).digest.as_str(), head(&first).job_uid.as_deref()), ("sha256:h", Some("u-1")));
    let mut observed = world();
    let anew = |status: Value| -> CarryOnJob {
        let job = with(&example::<CarryOnJob>("quickstart/job.yaml"), json!({"metadata": {"uid": "u-2"}}));
        with(&job, json!({"status": status}))
    };
    let condition = |type_: &str| json!([{"type": type_, "status": "True", "reason": "", "message": "", "lastTransitionTime": at(0)}]);
    // While it trains, and when it fails, the head of the job before it serves, whatever base the new one is for.
    let artifact = json!({"uri": "pvc://new/quickstart/heads/sha256-i", "digest": "sha256:i", "baseModelDigest": "sha256:other"});
    for status in [Value::Null, json!({"conditions": condition("Failed")}), json!({"artifact": artifact})] {
        observed.jobs = vec![anew(status)];
        let (said, kept) = says(&first, &observed);
        assert_eq!((said.as_str(), head(&kept)), ("Ready Serving: 1 of 1 gateways serve quickstart", head(&first)));
        assert_eq!(deployment::referenced_claims(&first, &observed.jobs), ["out"]);
    }
    let artifact = json!({"uri": "pvc://new/quickstart/heads/sha256-i", "digest": "sha256:i", "baseModelDigest": "sha256:b"});
    observed.jobs = vec![anew(json!({"conditions": condition("Complete"), "artifact": artifact}))];
    observed.claims.push(claim("new"));
    assert_eq!(deployment::referenced_claims(&first, &observed.jobs), ["new", "out"]);
    let (_, second) = says(&first, &observed);
    assert_eq!((head(&second).digest.as_str(), head(&second).job_uid.as_deref()), ("sha256:i", Some("u-2")));
    // It is kept like the first one: when its job is gone, too.
    observed.jobs.clear();
    assert_eq!(head(&says(&second, &observed).1), head(&second));
}

/// Which head of which digest serves, and what is said of each.
fn told(deployment: &CarryOnDeployment) -> Vec<String> {
    let heads = deployment.status.iter().flat_map(|status| &status.heads);
    let stable = |head: &HeadStatus| head.stable.as_ref().map(|head| head.digest.clone()).unwrap_or_default();
    heads.map(|head| format!("{}={} {}", head.name, stable(head), summary(&head.conditions))).collect()
}

#[test]
fn a_head_that_cannot_be_resolved_keeps_none_of_the_others() {
    let mut observed = world();
    let deployment: CarryOnDeployment = with(&example("quickstart/deployment.yaml"), heads(&[("a", "quickstart"), ("b", "next")]));
    let (said, first) = says(&deployment, &observed);
    let missing = "Reconciling JobNotFound: CarryOnJob default/next (spec.heads[b].source.jobRef) not found: create it";
    assert_eq!(said, missing);
    assert_eq!(told(&first), ["a=sha256:h Ready Serving: 1 of 1 gateways serve a".to_owned(), format!("b= {missing}")]);

    // It comes, and goes again; then a third takes its place before that is trained: what served goes on.
    let artifact = json!({"uri": "pvc://out/next/heads/sha256-n", "digest": "sha256:n", "baseModelDigest": "sha256:b"});
    observed.jobs.push(with(&observed.jobs[0], json!({"metadata": {"name": "next", "uid": "u-2"}, "status": {"artifact": artifact}})));
    let (said, both) = says(&first, &observed);
    assert_eq!(said, "Ready Serving: 1 of 1 gateways serve a, b");
    observed.jobs.pop();
    let (still, kept) = says(&both, &observed);
    assert_eq!((still, kept.status), (said, both.status.clone()));
    let third = with(&both, heads(&[("a", "quickstart"), ("b", "third")]));
    let validated = deployment::validate(&third, &observed, &Settings::default()).unwrap();
    assert_eq!(validated.config.heads.iter().map(|head| head.digest.as_str()).collect::<Vec<_>>(), ["sha256:h", "sha256:n"]);
    let waits = "Reconciling JobNotFound: CarryOnJob default/third (spec.heads[b].source.jobRef) not found: create it";
    let (said, third) = says(&third, &observed);
    assert_eq!((said.as_str(), &told(&third)[1]), (waits, &format!("b=sha256:n {waits}")));

    // One that is taken off the list is forgotten.
    let (_, one) = says(&with(&third, heads(&[("a", "quickstart")])), &observed);
    assert_eq!(told(&one), ["a=sha256:h Ready Serving: 1 of 1 gateways serve a"]);
}

#[test]
fn models_of_an_endpoint_have_names_of_their_own() {
    let taken = |heads: Value| {
        let deployment = with(&example("quickstart/deployment.yaml"), json!({"spec": {"heads": heads}}));
        deployment::validate(&deployment, &world(), &Settings::default()).unwrap_err().to_string()
    };
    let head =
        |name: &str, model: Option<&str>| json!({"name": name, "servedModelName": model, "source": {"jobRef": {"name": "quickstart"}}});
    let said = |name: &str, model: &str| format!("spec.heads[{name}]: another model of the endpoint is called {model:?} too");
    assert_eq!(taken(json!([head("a", None), head("b", Some("a"))])), said("b", "a"));
    assert_eq!(taken(json!([head("quickstart-base", None)])), said("quickstart-base", "quickstart-base"));
}
