//! What uses a pool of another namespace, while it is shared, when it no longer is, and when it is again.
#![allow(clippy::unwrap_used)]

mod common;

use carryon_crds::job::AttemptResult;
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use carryon_operator::local::store::Store;
use carryon_operator::local::{folders::Folders, polls::Polls, reconcile::World};
use carryon_operator::shared::Settings;
use carryon_operator::{deployment, job};
use common::scene::{Scene, named, pool};
use common::{at, example, raw, summary, with};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, PersistentVolumeClaim};
use serde_json::{Value, json};

/// Names the quick start's pool in a namespace of the platform's.
fn elsewhere() -> Value {
    json!({"spec": {"pools": [{"name": "smollm2", "namespace": "platform"}]}})
}

#[test]
fn a_trainer_ends_with_a_checkpoint_when_its_pool_is_withdrawn_and_the_next_goes_on_when_it_is_back() {
    let mut scene = Scene::running(elsewhere());
    scene.reconcile();
    assert_eq!(scene.says(), "Ready Running: attempt 1 on BaseModelPool platform/smollm2: its pod runs");
    let pod = scene.observed.attempt.as_ref().unwrap().spec.as_ref().unwrap().template.spec.as_ref().unwrap();
    assert!(pod.containers[0].args.as_ref().unwrap().contains(&"http://smollm2-pool.platform.svc:8080".to_owned()));

    let missing =
        "Reconciling PoolNotFound: BaseModelPool platform/smollm2 (spec.pools[0]) not found: create it, or share it with namespace default";
    scene.observed.pool = None;
    assert_eq!(scene.reconcile(), (None, Some("quickstart-1".to_owned())));
    assert_eq!(scene.says(), missing);
    // It writes its checkpoint.
    scene.deleted(120);
    assert_eq!(scene.reconcile(), (None, Some("quickstart-1".to_owned())));
    assert_eq!(scene.says(), missing);
    scene.now = 5;
    scene.observed.pods = vec![scene.ended(75, "checkpointed", 5)];
    assert_eq!((scene.reconcile(), scene.says().as_str()), ((None, None), missing));
    let status = scene.job.status.clone().unwrap();
    assert_eq!((scene.last().result, status.failures), (Some(AttemptResult::Resumable), 0));

    scene.observed.pool = Some(pool(30));
    assert_eq!(scene.reconcile(), named("quickstart-2"));
}

#[test]
fn a_job_that_is_not_to_wait_fails_when_its_pool_is_withdrawn_for_long() {
    let policy = json!({"spec": {"poolUnavailablePolicy": "Fail", "poolUnavailableGraceSeconds": 60}});
    let mut scene = Scene::running(common::patched(elsewhere(), &policy));
    scene.observed.pool = None;
    assert_eq!(scene.reconcile(), (None, Some("quickstart-1".to_owned())));
    scene.now = 60;
    scene.reconcile();
    let says = "Stalled+Failed PoolUnavailable: BaseModelPool platform/smollm2 has been missing or not ready for 60 s, and spec.poolUnavailablePolicy is Fail";
    assert_eq!(scene.says(), says);
}

/// A local mode with a pool in `platform`, and in `team` a job that trains on it and the deployment of an artifact.
struct Local {
    store: Store,
    folders: Folders,
    polls: Polls,
}

impl Local {
    fn new(folder: &std::path::Path) -> Self {
        let folders = Folders::create(folder).unwrap();
        let mut local = Self { store: Store::open(&folders.root).unwrap(), folders, polls: Polls::new().unwrap() };
        let claim = |namespace: &str, name: &str| -> PersistentVolumeClaim {
            serde_json::from_value(json!({"metadata": {"namespace": namespace, "name": name}})).unwrap()
        };
        for (namespace, name) in [("platform", "models"), ("team", "quickstart-data"), ("team", "quickstart-output")] {
            local.store.apply(&claim(namespace, name), &at(0)).unwrap();
        }
        let team = json!({"metadata": {"namespace": "team"}});
        let artifact = json!({"digest": format!("sha256:{}", "0".repeat(64)), "source": {"persistentVolumeClaim": {"claimName": "quickstart-output"}}});
        let heads = json!({"spec": {"heads": [{"name": "quickstart", "source": {"artifact": artifact}}]}});
        local.share(json!({}));
        local.store.apply(&with(&with(&example::<CarryOnJob>("quickstart/job.yaml"), team.clone()), elsewhere()), &at(0)).unwrap();
        let deployment = with(&with(&example::<CarryOnDeployment>("quickstart/deployment.yaml"), team), heads);
        local.store.apply(&with(&deployment, elsewhere()), &at(0)).unwrap();
        local
    }

    fn share(&mut self, namespaces: Value) {
        let pool: BaseModelPool = serde_json::from_value(raw("quickstart/pool.yaml")).unwrap();
        let patch = json!({"metadata": {"namespace": "platform"}, "spec": {"sharing": {"namespaces": namespaces}}});
        self.store.apply(&with(&pool, patch), &at(0)).unwrap();
    }

    fn label(&mut self, labels: Value) {
        let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": "team", "labels": labels}})).unwrap();
        self.store.apply(&namespace, &at(0)).unwrap();
    }

    /// The pool that the deployment names from now on.
    fn name(&mut self, pool: &str) {
        let deployment: CarryOnDeployment = self.store.get("team", "quickstart").unwrap();
        let other = with(&deployment, json!({"spec": {"pools": [{"name": pool, "namespace": "platform"}]}}));
        self.store.apply(&other, &at(0)).unwrap();
    }

    /// Reasons of the job and of the deployment after a round, and the gateways that are wanted.
    fn round(&mut self) -> (String, String, Option<i32>) {
        let (store, folders, polls, settings) = (&mut self.store, &self.folders, &mut self.polls, &Settings::default());
        World { store, folders, polls, settings, now: at(0) }.tick().unwrap();
        let job: CarryOnJob = self.store.get("team", "quickstart").unwrap();
        let deployment: CarryOnDeployment = self.store.get("team", "quickstart").unwrap();
        let reason = |said: String| said.split(':').next().unwrap().split(' ').nth(1).unwrap().to_owned();
        let gateways: Option<Deployment> = self.store.get("team", "quickstart-gateway");
        let wanted = gateways.map(|gateways| gateways.spec.unwrap().replicas.unwrap_or(1));
        (reason(summary(&job.status.unwrap().conditions)), reason(summary(&deployment.status.unwrap().conditions)), wanted)
    }
}

#[tokio::test]
async fn local_mode_knows_a_namespace_by_its_name_and_by_its_manifest() {
    let folder = tempfile::tempdir().unwrap();
    let mut local = Local::new(folder.path());
    let missing = |gateways| ("PoolNotFound".to_owned(), "PoolNotFound".to_owned(), gateways);
    let there = ("PoolNotReady".to_owned(), "GatewayStarting".to_owned(), Some(1));
    assert_eq!(local.round(), missing(None));
    local.share(json!({"from": "Selector", "selector": {"matchLabels": {"kubernetes.io/metadata.name": "team"}}}));
    assert_eq!(local.round(), there);
    local.share(json!({"from": "Selector", "selector": {"matchLabels": {"base": "smollm2"}}}));
    assert_eq!(local.round(), missing(Some(0)));
    local.label(json!({"base": "smollm2"}));
    assert_eq!(local.round(), there);
    local.label(json!({}));
    assert_eq!(local.round(), missing(Some(0)));
    local.share(json!({"from": "All"}));
    assert_eq!(local.round(), there);
    // Another pool that is not there takes nothing away, but does not hold on to one that is taken away, either.
    local.name("none");
    assert_eq!(local.round(), ("PoolNotReady".to_owned(), "PoolNotFound".to_owned(), Some(1)));
    local.share(json!({}));
    assert_eq!(local.round(), missing(Some(0)));
}

#[test]
fn a_pool_that_is_there_is_named_with_its_namespace() {
    let job = with(&example::<CarryOnJob>("quickstart/job.yaml"), elsewhere());
    let unready = job::Observed { pool: Some(example("quickstart/pool.yaml")), ..job::Observed::default() };
    let refusal = job::validate(&job, &unready, &Settings::default(), &at(0)).unwrap_err();
    assert_eq!(refusal.message, "waiting for BaseModelPool platform/smollm2 to be ready");
    let deployment = with(&example::<CarryOnDeployment>("quickstart/deployment.yaml"), elsewhere());
    let claim = json!({"metadata": {"name": "out", "namespace": "default"}});
    let artifact = json!({"digest": format!("sha256:{}", "0".repeat(64)), "source": {"persistentVolumeClaim": {"claimName": "out"}}});
    let deployment = with(&deployment, json!({"spec": {"heads": [{"name": "a", "source": {"artifact": artifact}}]}}));
    let observed = deployment::Observed {
        claims: vec![serde_json::from_value(claim).unwrap()],
        pool: unready.pool,
        ..deployment::Observed::default()
    };
    let gateway = deployment::build(&deployment::validate(&deployment, &observed, &Settings::default()).unwrap()).deployment;
    let args = gateway.spec.unwrap().template.spec.unwrap().containers[0].args.clone().unwrap();
    assert!(args.contains(&"http://smollm2-pool.platform.svc:8080".to_owned()), "{args:?}");
}

/// A deployment of a head that reads two bases, of which the second is in `platform`, and the world around it.
fn of_two() -> (CarryOnDeployment, deployment::Observed) {
    let deployment = with(
        &example::<CarryOnDeployment>("quickstart/deployment.yaml"),
        json!({"spec": {"pools": [{"name": "smollm2"}, {"name": "other", "namespace": "platform"}]}}),
    );
    let artifact = json!({"digest": "sha256:h", "uri": "pvc://quickstart-output/heads/h", "baseModelDigest": "sha256:one", "otherBaseModelDigests": ["sha256:two"]});
    let complete = json!({"type": "Complete", "status": "True", "reason": "", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let job = with(
        &example::<CarryOnJob>("quickstart/job.yaml"),
        json!({"metadata": {"uid": "u"}, "status": {"conditions": [complete], "artifact": artifact}}),
    );
    let claim = json!({"metadata": {"name": "quickstart-output", "namespace": "default"}});
    let (mut one, mut other) = (pool(30), pool(30));
    one.status.as_mut().unwrap().model.as_mut().unwrap().identity_digest = "sha256:one".to_owned();
    other.status.as_mut().unwrap().model.as_mut().unwrap().identity_digest = "sha256:two".to_owned();
    let observed = deployment::Observed {
        pool: Some(one),
        other_pools: vec![Some(other)],
        jobs: vec![job],
        claims: vec![serde_json::from_value(claim).unwrap()],
        ..deployment::Observed::default()
    };
    (deployment, observed)
}

#[test]
fn a_head_of_two_bases_is_served_from_two_pools_or_told_what_it_lacks() {
    let (deployment, observed) = of_two();
    let validated = |deployment: &CarryOnDeployment, observed: &deployment::Observed| {
        let refused = |refusal: carryon_operator::shared::Refusal| format!("{}: {}", refusal.reason, refusal.message);
        deployment::validate(deployment, observed, &Settings::default()).map_err(refused)
    };
    let gateway = deployment::build(&validated(&deployment, &observed).unwrap()).deployment;
    let told: Vec<String> = deployment::pools(&gateway, &[]).iter().map(ToString::to_string).collect();
    assert_eq!(told, ["default/smollm2", "platform/other"]);
    let args = gateway.spec.unwrap().template.spec.unwrap().containers[0].args.clone().unwrap();
    let urls = ["--pool", "http://smollm2-pool.default.svc:8080", "--other-pool", "http://other-pool.platform.svc:8080"];
    assert!(args.windows(4).any(|args| args == urls), "{args:?}");

    let missing = "head quickstart reads 2 bases, spec.pools names 1: name the pools of its job, in their order";
    let alone = with(&deployment, json!({"spec": {"pools": [{"name": "smollm2"}]}}));
    assert_eq!(validated(&alone, &observed).unwrap_err(), format!("PoolsMissing: {missing}"));
    let mut swapped = observed.clone();
    swapped.other_pools = vec![observed.pool.clone()];
    let differs = "BaseModelDiffers: head quickstart was trained on base sha256:two, BaseModelPool platform/other runs sha256:one: name a pool of the same model";
    assert_eq!(validated(&deployment, &swapped).unwrap_err(), differs);
    let withdrawn = deployment::Observed { other_pools: vec![None], ..observed };
    let lacks = "PoolNotFound: BaseModelPool platform/other (spec.pools[1]) not found: create it, or share it with namespace default";
    assert_eq!(validated(&deployment, &withdrawn).unwrap_err(), lacks);
}

#[tokio::test]
async fn gateways_end_when_a_further_pool_of_theirs_is_withdrawn() {
    let folder = tempfile::tempdir().unwrap();
    let mut local = Local::new(folder.path());
    local.share(json!({"from": "All"}));
    let own: BaseModelPool =
        with(&serde_json::from_value(raw("quickstart/pool.yaml")).unwrap(), json!({"metadata": {"name": "own", "namespace": "team"}}));
    local.store.apply(&own, &at(0)).unwrap();
    let pools = json!([{"name": "own"}, {"name": "smollm2", "namespace": "platform"}]);
    let deployment: CarryOnDeployment = local.store.get("team", "quickstart").unwrap();
    local.store.apply(&with(&deployment, json!({"spec": {"pools": pools}})), &at(0)).unwrap();
    assert_eq!(local.round().2, Some(1));
    local.share(json!({}));
    let (_, said, wanted) = local.round();
    assert_eq!((said.as_str(), wanted), ("PoolNotFound", Some(0)));
}
