//! Another release of the operator takes over, and a head that cannot start is rolled out.

use carryon_crds::condition::types::READY;
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob, names, wire};
use carryon_operator::shared::revision::name_in;
use carryon_tests::cluster::Object;
use carryon_tests::cluster::hollow::Fate;
use carryon_tests::operator::{Operator, Options};
use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, PodTemplateSpec};
use kube::ResourceExt as _;
use kube::api::{DeleteParams, PostParams};
use serde_json::{Value, json};

use super::world::World;

const NEXT: &str = "example.org/worker:next";

fn image(template: &PodTemplateSpec) -> &str {
    template.spec.as_ref().unwrap().containers[0].image.as_deref().unwrap()
}

fn args(template: &PodTemplateSpec) -> &[String] {
    template.spec.as_ref().unwrap().containers[0].args.as_ref().unwrap()
}

fn delete<K: Object>(world: &World, space: &str, name: &str) {
    world.cluster.block_on(world.api::<K>(space).delete(name, &DeleteParams::default())).unwrap();
}

/// The revision is replaced by what an older build would have kept: with an argument that this build does not render, and without a field
/// that has a default since. The workload is of that revision, as the older build would have left it.
fn as_an_older_build_left_it<K: Object>(world: &World, space: &str, name: &str, template: &PodTemplateSpec, unknown_yet: &str) {
    let current = name_in(template).unwrap();
    let old = format!("{}-1234567890", current.rsplit_once('-').unwrap().0);
    let mut revision: ControllerRevision = world.get(space, current);
    let mut config: ConfigMap = world.get(space, current);
    delete::<ControllerRevision>(world, space, current);
    delete::<ConfigMap>(world, space, current);
    let mut pods: Value = serde_json::from_str(revision.data.as_ref().unwrap().0["pods"].as_str().unwrap()).unwrap();
    pods["template"]["spec"]["containers"][0]["args"].as_array_mut().unwrap().push(json!("--retired"));
    let pods = pods.to_string();
    let digest = wire::digest(pods.as_bytes());
    revision.data.as_mut().unwrap().0 = json!({ "pods": pods });
    let source = revision.annotations_mut().get_mut(names::RENDERED_FROM_ANNOTATION).unwrap();
    let mut fields: Value = serde_json::from_str(source).unwrap();
    let spec = fields["spec"].as_object_mut().or(None);
    match spec {
        Some(spec) => drop(spec.remove(unknown_yet).unwrap()),
        // Of a deployment, the spec and its head.
        None => drop(fields["spec"][0].as_object_mut().unwrap().remove(unknown_yet).unwrap()),
    }
    *source = fields.to_string();
    for metadata in [&mut revision.metadata, &mut config.metadata] {
        metadata.name = Some(old.clone());
        metadata.resource_version = None;
        metadata.uid = None;
        metadata.managed_fields = None;
    }
    world.cluster.block_on(world.api(space).create(&PostParams::default(), &revision)).unwrap();
    world.cluster.block_on(world.api(space).create(&PostParams::default(), &config)).unwrap();
    let mut template = json!(template);
    template["metadata"]["annotations"][names::CONFIG_DIGEST_ANNOTATION] = json!(digest);
    template["spec"]["containers"][0]["args"].as_array_mut().unwrap().push(json!("--retired"));
    let volumes = template["spec"]["volumes"].as_array_mut().unwrap();
    volumes.iter_mut().filter(|volume| volume["name"] == "config").for_each(|volume| volume["configMap"]["name"] = json!(old));
    world.patch::<K>(space, name, json!({ "spec": { "template": template } }));
}

#[test]
fn an_operator_that_renders_otherwise_rolls_nothing_until_it_is_asked_to() {
    let Some(world) = World::within(&["upgrade"]) else { return };
    let space = "upgrade";
    world.hollow.fate(space, "quickstart", Fate::Runs);
    world.quickstart(space);
    let operator = world.operate();
    world.until::<CarryOnJob>(space, "quickstart", READY, "True", "Running");
    world.cluster.apply(space, &artifact());
    world.until::<CarryOnDeployment>(space, "served", READY, "True", "Serving");
    world.quiet();
    drop(operator);

    let set = || world.get::<StatefulSet>(space, "smollm2-pool");
    let gateway = || world.get::<Deployment>(space, "served-gateway");
    as_an_older_build_left_it::<StatefulSet>(&world, space, "smollm2-pool", &set().spec.unwrap().template, "dtype");
    as_an_older_build_left_it::<Deployment>(&world, space, "served-gateway", &gateway().spec.unwrap().template, "api");
    let before = (set().spec.unwrap().template, gateway().spec.unwrap().template);
    assert_eq!(args(&before.0).last().unwrap(), "--retired");

    let next = Operator::start_with(&world.cluster, Options { namespaces: &[space], worker_image: Some(NEXT), ..Options::default() });
    // It has looked at everything once it has changed how many there are to be.
    world.patch::<BaseModelPool>(space, "smollm2", json!({ "spec": { "replicas": 2 } }));
    world.patch::<CarryOnDeployment>(space, "served", json!({ "spec": { "replicas": 2 } }));
    world.until_is::<StatefulSet>(space, "smollm2-pool", "has two pods", &|set| set.spec.as_ref().unwrap().replicas == Some(2));
    world.until_is::<Deployment>(space, "served-gateway", "has two pods", &|gateway| gateway.spec.as_ref().unwrap().replicas == Some(2));
    world.until::<CarryOnDeployment>(space, "served", READY, "True", "Serving");
    world.quiet();
    assert!((set().spec.unwrap().template, gateway().spec.unwrap().template) == before, "something rolled");

    // Another attempt is what the first was, whoever starts it.
    let first = world.get::<Job>(space, "quickstart-1").spec.unwrap().template;
    world.patch::<CarryOnJob>(space, "quickstart", json!({ "spec": { "suspend": true } }));
    world.until::<CarryOnJob>(space, "quickstart", READY, "True", "Suspended");
    world.patch::<CarryOnJob>(space, "quickstart", json!({ "spec": { "suspend": false } }));
    let second = world.until_is::<Job>(space, "quickstart-2", "is made", &|_| true).spec.unwrap().template;
    assert_eq!((image(&second), args(&second), name_in(&second)), (image(&first), args(&first), name_in(&first)));

    let release = json!({ "metadata": { "annotations": { names::UPGRADE_ANNOTATION: "next" } } });
    world.patch::<BaseModelPool>(space, "smollm2", release.clone());
    world.patch::<CarryOnDeployment>(space, "served", release);
    let renewed = |template: &PodTemplateSpec| image(template) == NEXT && !args(template).contains(&"--retired".to_owned());
    world.until_is::<StatefulSet>(space, "smollm2-pool", "is of the next release", &|set| renewed(&set.spec.as_ref().unwrap().template));
    world.until_is::<Deployment>(space, "served-gateway", "is of the next release", &|set| renewed(&set.spec.as_ref().unwrap().template));
    world.until_is::<CarryOnDeployment>(space, "served", "says so", &|served| {
        served.status.as_ref().is_some_and(|status| status.worker_image.as_deref() == Some(NEXT))
    });
    // What no pod is of any more goes.
    for template in [set().spec.unwrap().template, gateway().spec.unwrap().template] {
        only(&world, space, name_in(&template).unwrap());
    }
    world.no_refused_writes();
    drop(next);
}

/// Waits until `name` is the only revision and the only configuration of its child.
fn only(world: &World, space: &str, name: &str) {
    let child = name.rsplit_once('-').unwrap().0.to_owned();
    world.cluster.eventually(&format!("{name} alone is left"), async || {
        let revisions = world.api::<ControllerRevision>(space).list(&Default::default()).await.ok()?.items;
        let configs = world.api::<ConfigMap>(space).list(&Default::default()).await.ok()?.items;
        let ours = |labels: &std::collections::BTreeMap<String, String>| {
            labels.get("app.kubernetes.io/component").is_some_and(|c| c == names::REVISION)
        };
        let revisions = revisions.iter().filter(|revision| ours(revision.labels())).map(|revision| revision.name_any());
        let all = revisions.chain(configs.iter().map(|config| config.name_any()));
        let of_child: Vec<String> = all.filter(|other| other.rsplit_once('-').is_some_and(|(prefix, _)| prefix == child)).collect();
        (of_child == [name, name]).then_some(())
    });
}

fn heads(digest: &str) -> Value {
    let source = json!({ "persistentVolumeClaim": { "claimName": "quickstart-output", "path": "head" } });
    json!([{ "name": "served", "source": { "artifact": { "source": source, "digest": digest } } }])
}

fn artifact() -> String {
    json!({ "apiVersion": "carryon.dev/v1alpha1", "kind": "CarryOnDeployment", "metadata": { "name": "served" },
        "spec": { "pools": [{ "name": "smollm2" }], "heads": heads(&digest("1")) } })
    .to_string()
}

fn digest(letter: &str) -> String {
    format!("sha256:{}", letter.repeat(64))
}

#[test]
fn a_gateway_of_before_finds_its_own_configuration_while_a_bad_head_is_rolled_out() {
    let Some(world) = World::within(&["rollout"]) else { return };
    let space = "rollout";
    world.volumes(space);
    world.cluster.apply(space, &carryon_tests::example("quickstart/pool.yaml"));
    world.cluster.apply(space, &artifact());
    let _operator = world.operate();
    world.until::<CarryOnDeployment>(space, "served", READY, "True", "Serving");
    let stable = world.get::<Deployment>(space, "served-gateway").spec.unwrap().template;
    let of_stable = name_in(&stable).unwrap().to_owned();

    world.hollow.fate(space, "served", Fate::Waits("the new gateway does not become ready".to_owned()));
    let bad = json!({ "spec": { "heads": heads(&digest("2")) } });
    world.patch::<CarryOnDeployment>(space, "served", bad);
    world.until_is::<Deployment>(space, "served-gateway", "rolls", &|gateway| {
        name_in(&gateway.spec.as_ref().unwrap().template) != Some(&of_stable)
    });
    world.quiet();

    // The node of the old gateway is drained.
    let gateways = || world.list::<Pod>(space).into_iter().filter(|pod| pod.name_any().starts_with("served-gateway")).collect::<Vec<_>>();
    let config_of = |pod: &Pod| {
        let template = PodTemplateSpec { spec: pod.spec.clone(), metadata: None };
        name_in(&template).unwrap().to_owned()
    };
    let old = gateways().into_iter().find(|pod| config_of(pod) == of_stable).unwrap();
    let delete_now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    world.cluster.block_on(world.api::<Pod>(space).delete(&old.name_any(), &delete_now)).unwrap();
    let api = world.api::<Pod>(space);
    let back = world.cluster.eventually("the old gateway is back", async || {
        let pods = api.list(&Default::default()).await.ok()?.items;
        pods.into_iter().find(|pod| pod.name_any().starts_with("served-gateway") && pod.uid() != old.uid() && config_of(pod) == of_stable)
    });
    let config: ConfigMap = world.get(space, &config_of(&back));
    let text = &config.data.as_ref().unwrap()[names::CONFIG_FILE];
    assert!(text.contains(&digest("1")) && !text.contains(&digest("2")), "{text}");
    assert_eq!(config.immutable, Some(true));

    // Once the new one serves, nobody reads the old.
    world.hollow.fate(space, "served", Fate::Runs);
    let now = world.get::<Deployment>(space, "served-gateway").spec.unwrap().template;
    only(&world, space, name_in(&now).unwrap());
    world.no_refused_writes();
}
