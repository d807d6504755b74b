//! What a real API server says of objects, and that `local` says the same: verdicts, field paths, defaults; and how `kubectl` shows the three kinds.

#![allow(clippy::unwrap_used)] // a test may fail by panicking, in its helpers too

use std::collections::BTreeSet;

use carryon_crds::CarryOnJob;
use carryon_operator::admission::{Admission, api_version};
use carryon_operator::local::{manifest, store::Store};
use carryon_tests::cluster::TestCluster;
use carryon_tests::{example, repository};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Case {
    name: String,
    kind: String,
    old: Option<Value>,
    patch: Value,
}

/// A cluster that knows the three kinds.
fn cluster() -> Option<TestCluster> {
    let cluster = TestCluster::api_server()?;
    let file = repository().join("crds/crds.yaml");
    cluster.kubectl(&["apply", "--server-side", "--filename", file.to_str().unwrap()]);
    cluster.kubectl(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"]);
    Some(cluster)
}

fn documents(text: &str) -> Vec<Value> {
    serde_yaml::Deserializer::from_str(text).map(|document| Value::deserialize(document).unwrap()).collect()
}

fn merged(mut object: Value, patch: &Value) -> Value {
    json_patch::merge(&mut object, patch);
    object
}

/// Creates an object, or replaces the one of its name, as `kubectl` does: unknown fields are errors. The object as the server has it, or the fields at fault.
fn submit(cluster: &TestCluster, object: &Value, stored: Option<&Value>, parameters: &str) -> Result<Value, BTreeSet<String>> {
    let plural = format!("{}s", object["kind"].as_str().unwrap().to_lowercase());
    let mut object = object.clone();
    let (method, name) = match stored {
        None => ("POST", String::new()),
        Some(stored) => {
            object["metadata"]["resourceVersion"] = stored["metadata"]["resourceVersion"].clone();
            ("PUT", format!("/{}", stored["metadata"]["name"].as_str().unwrap()))
        }
    };
    let uri = format!("/apis/{}/namespaces/default/{plural}{name}?fieldValidation=Strict{parameters}", api_version());
    let request = http::Request::builder().method(method).uri(uri).header("content-type", "application/json");
    let request = request.body(serde_json::to_vec(&object).unwrap()).unwrap();
    match cluster.block_on(cluster.client().request::<Value>(request)) {
        Ok(object) => Ok(object),
        Err(kube::Error::Api(status)) => Err(fields(&status)),
        Err(error) => panic!("{error}"),
    }
}

/// The object with a status, as its controller writes it.
fn set_status(cluster: &TestCluster, object: &Value, status: &Value) -> Value {
    let (kind, name) = (object["kind"].as_str().unwrap(), object["metadata"]["name"].as_str().unwrap());
    let patch = json!({ "status": status }).to_string();
    let patched = ["patch", kind, name, "--subresource=status", "--type=merge", "--patch", &patch, "--output=json"];
    serde_json::from_str(&cluster.kubectl(&patched)).unwrap()
}

/// The fields that a refusal names.
fn fields(status: &kube::core::Status) -> BTreeSet<String> {
    // Strict decoding names its fields in the message alone.
    if let Some((_, unknown)) = status.message.split_once("strict decoding error: ") {
        return unknown.split(", ").map(|one| one.split('"').nth(1).unwrap_or(one).to_owned()).collect();
    }
    // So does decoding of what every object has, by the name of its Go type.
    if status.message.contains("into Go struct field ObjectMeta.") {
        return ["metadata".to_owned()].into();
    }
    let causes = status.details.iter().flat_map(|details| &details.causes);
    // What is said of no field is of the name, or says that more would be looked at once the rest is mended. `.spec.replicas` is said by
    // the scale subresource beside the schema.
    let field = |cause: &kube::core::response::StatusCause| match cause.field.as_str() {
        "<nil>" | "" => cause.message.contains("name must be").then(|| "metadata.name".to_owned()),
        field => Some(field.trim_start_matches('.').to_owned()),
    };
    let fields: BTreeSet<String> = causes.filter_map(field).collect();
    assert!(!fields.is_empty(), "{status:?}");
    fields
}

/// The same value with every number as JSON's one kind of number: the server writes `1.0` as `1`.
fn plain(value: &Value) -> Value {
    match value {
        Value::Number(number) => json!(number.as_f64()),
        Value::Array(items) => items.iter().map(plain).collect(),
        Value::Object(members) => members.iter().map(|(name, value)| (name.clone(), plain(value))).collect(),
        other => other.clone(),
    }
}

#[test]
fn an_api_server_and_local_mode_give_the_same_verdict_of_the_same_fields_and_the_same_defaults() {
    let Some(cluster) = cluster() else { return };
    let admission = Admission::new().unwrap();
    let cases = std::fs::read_to_string(repository().join("operator/tests/fixtures/bad_specs.yaml")).unwrap();
    let cases: Vec<Case> = serde_yaml::from_str(&cases).unwrap();
    let mut differences = Vec::new();
    let mut refused = 0;
    for case in &cases {
        let manifest = documents(&example(&format!("quickstart/{}.yaml", case.kind))).remove(0);
        let object = merged(manifest.clone(), &case.patch);
        let old = case.old.as_ref().map(|patch| {
            let old = merged(manifest, patch);
            let stored = submit(&cluster, &old, None, "").unwrap();
            let stored = old.get("status").map(|status| set_status(&cluster, &stored, status)).unwrap_or(stored);
            (stored, admission.admit(&old, None).unwrap())
        });
        let theirs = submit(&cluster, &object, old.as_ref().map(|(stored, _)| stored), "&dryRun=All");
        let theirs = theirs.map(|object| plain(&object["spec"]));
        let local = admission.admit(&object, old.as_ref().map(|(_, admitted)| admitted));
        let local = local.map(|object| plain(&object["spec"]));
        let local = local.map_err(|violations| violations.into_iter().map(|violation| violation.field).collect::<BTreeSet<String>>());
        if let Some((stored, _)) = &old {
            cluster.kubectl(&["delete", stored["kind"].as_str().unwrap(), stored["metadata"]["name"].as_str().unwrap()]);
        }
        refused += usize::from(theirs.is_err());
        if theirs != local {
            differences.push(format!("{}:\n  server {theirs:?}\n  local  {local:?}", case.name));
        }
    }
    assert!(differences.is_empty(), "{} of {}:\n{}", differences.len(), cases.len(), differences.join("\n"));
    assert!(refused >= 60, "{refused} refused objects are too few");
}

/// What follows the spec of a job, as people write it.
const WRITTEN: [&str; 55] = [
    "training: {maxSteps: 4.0}",
    "training: {maxSteps: 4.5}",
    "training: {maxSteps: 1e1}",
    "training: {maxSteps: 1.5e1}",
    "training: {maxSteps: 1_000}",
    "training: {maxSteps: 0x10}",
    "training: {maxSteps: 007}",
    "training: {maxSteps: +5}",
    "training: {maxSteps: ++5}",
    "training: {maxSteps: -0}",
    "training: {maxSteps: 190:20:30}",
    "training: {maxSteps: '4'}",
    "training: {maxSteps: !!int 4}",
    "training: {maxSteps: !!str 4}",
    "training: {seed: 08}",
    "training: {seed: 0o17}",
    "training: {seed: 0b11}",
    "training: {seed: 0x}",
    "training: {seed: 18446744073709551615}",
    "training: {seed: 1e30}",
    "training: {learningRate: .nan}",
    "training: {learningRate: -.inf}",
    "training: {learningRate: 1}",
    "training: {learningRate: .5}",
    "training: {learningRate: 1.}",
    "training: {learningRate: 1_0e-1}",
    "training: {learningRate: \"0.1\"}",
    "training: {<<: {maxSteps: 5, seed: 1}, seed: 2}",
    "training: &t {maxSteps: 5}\n  evaluation: {<<: *t}",
    "suspend: yes",
    "suspend: on",
    "suspend: y",
    "suspend: TRUE",
    "suspend: Off",
    "suspend: \"yes\"",
    "suspend: ~",
    "suspend: tRUE",
    "task: Classification\n  head: {width: 64, labels: [yes, no]}",
    "task: Classification\n  head: {width: 64, labels: [\"yes\", 'no']}",
    "task: Classification\n  head: {width: 64, labels: [!!str yes, n0]}",
    "task: Classification\n  head: {width: 64, labels: [2001-01-01, 1:30, =, 0.1.2, _1, .., e1]}",
    "task: Classification\n  head: {width: 64, labels: [1_000, a]}",
    "task: Classification\n  head: {width: 64, labels: [a, null]}",
    "task: Classification\n  head: {width: 64, labels: [a, 1.]}",
    "task: Classification\n  head: {width: 64, labels: [._5, .5_, ., .e1]}",
    "task: Classification\n  head: {width: 64, labels: [a, .5]}",
    "task: Classification\n  head: {width: 64, labels: [a, 0xfffffffffffffffff]}",
    "task: Classification\n  head: {width: 64, labels: [a, -0x1f]}",
    "task: Classification\n  head: {width: 64, labels: [0x, 0b2, 0o8, 1e, +, 1__0x]}",
    "training: {seed: +18446744073709551615}",
    "training: {seed: +9223372036854775807}",
    "training: {seed: 18446744073709551616}",
    "training: {maxSteps: 1._0}",
    "training: {maxSteps: 0_7}",
    "training: {maxSteps: 1__0}",
];

/// Whole ConfigMaps and Secrets, but for what all have.
const MAPS: [&str; 17] = [
    "data: {sub/t.jsonl: a}",
    "data: {t.jsonl: a, T_2-.x: b}",
    "data: {\"\": a}",
    "data: {.: a}",
    "data: {..: a}",
    "data: {..a: a}",
    "data: {...: a}",
    "data: {.a: a}",
    "data: {ä: a}",
    "data: {a: yes}",
    "data: {yes: a, 1_0: b, 1.50: c, ~x: d}",
    "data: {a: b}\nbinaryData: {a: Yg==}",
    "data: {a: b}\nbinaryData: {c: Yg==}",
    "binaryData: {a/b: Yg==}",
    "data: {1.0: a, 1e10: b, 1.5e-7: c, 123456.5: d, 1234567.5: e, 0.0001: f, 1e5: g}",
    "data: {+5: a, 0x1F: b, 1_0.5: c, .5: d, -1.0: e}",
    "data: {18446744073709551616: a}",
];

#[test]
fn kubectl_and_local_mode_read_the_same_out_of_the_same_text() {
    let Some(cluster) = cluster() else { return };
    let admission = Admission::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let file = folder.path().join("written.yaml");
    let job = "apiVersion: carryon.dev/v1alpha1\nkind: CarryOnJob\nmetadata:\n  name: written\nspec:\n  pools: [{name: smollm2}]\n  \
        data: {source: {persistentVolumeClaim: {claimName: d}}, split: {train: [t.jsonl]}}\n  output: {destination: {persistentVolumeClaim: {claimName: o}}}\n  ";
    let map = |kind: &str, rest: &str| format!("apiVersion: v1\nkind: {kind}\nmetadata: {{name: written}}\n{rest}\n");
    let large = |bytes: usize| format!("data: {{a: {}}}", "x".repeat(bytes));
    let mut texts: Vec<String> = WRITTEN.iter().map(|rest| format!("{job}{rest}\n")).collect();
    texts.extend(MAPS.iter().map(|rest| map("ConfigMap", rest)));
    texts.extend([map("ConfigMap", &large(1 << 20)), map("ConfigMap", &large((1 << 20) + 1))]);
    texts.extend([map("Secret", "stringData: {a/b: c}"), map("Secret", "data: {a: Yg==}\nstringData: {a: c}")]);
    texts.extend([format!("\u{FEFF}{job}suspend: true\n"), map("ConfigMap", "data: {a: b}").replace('\n', "\r\n")]);
    let content = |object: &Value| plain(&json!([object["spec"], object["data"], object["binaryData"]]));
    let mut differences = Vec::new();
    for text in &texts {
        std::fs::write(&file, text).unwrap();
        let applied =
            cluster.command("kubectl").args(["create", "--dry-run=server", "--output=json", "--filename"]).arg(&file).output().unwrap();
        let theirs = applied.status.success().then(|| content(&serde_json::from_slice(&applied.stdout).unwrap()));
        let documents = manifest::read(std::slice::from_ref(&file));
        let local = documents.and_then(|documents| manifest::admit(&documents, &admission, &store, &|_, _| true));
        let said = local.as_ref().err().map(ToString::to_string);
        // What is admitted can be decoded: an integer is one, however it was written.
        let job = local.as_ref().ok().filter(|admitted| admitted[0]["kind"] == "CarryOnJob");
        job.map(|admitted| CarryOnJob::deserialize(&admitted[0]).unwrap_or_else(|error| panic!("{text}: {error}")));
        let local = local.ok().map(|admitted| content(&admitted[0]));
        if theirs != local {
            let short: String = text.chars().rev().take(120).collect::<Vec<_>>().into_iter().rev().collect();
            let error = String::from_utf8_lossy(&applied.stderr).into_owned();
            differences.push(format!("{short}:\n  kubectl {theirs:?} {error}\n  local {local:?} {said:?}"));
        }
    }
    assert!(differences.is_empty(), "{} of {}:\n{}", differences.len(), texts.len(), differences.join("\n"));
}

#[test]
fn a_list_is_what_it_holds_and_what_is_immutable_stays() {
    let Some(cluster) = cluster() else { return };
    let (admission, folder) = (Admission::new().unwrap(), tempfile::tempdir().unwrap());
    let mut store = Store::open(folder.path()).unwrap();
    let file = folder.path().join("list.yaml");
    let list = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: ConfigMap, metadata: {name: fixed}, immutable: true, data: {a: b}}\n\
        - {apiVersion: v1, kind: Secret, metadata: {name: typed}, type: Opaque, stringData: {a: b}}\n";
    let changes = [
        ("", ""),
        ("data: {a: b}", "data: {a: c}"),
        ("immutable: true", "immutable: false"),
        (", data: {a: b}", ", data: {a: b}, binaryData: {c: Yg==}"),
        ("{name: fixed}", "{name: fixed, labels: {a: b}}"),
        ("type: Opaque, ", ""),
        ("type: Opaque", "type: example.com/other"),
        ("stringData: {a: b}", "stringData: {a: c}"),
    ];
    for (from, to) in changes {
        std::fs::write(&file, list.replace(from, to)).unwrap();
        let applied = cluster.command("kubectl").args(["apply", "--filename"]).arg(&file).output().unwrap();
        let documents = manifest::read(std::slice::from_ref(&file)).unwrap();
        let local = manifest::admit(&documents, &admission, &store, &|_, _| true);
        assert_eq!(applied.status.success(), local.is_ok(), "{to:?}: {} {local:?}", String::from_utf8_lossy(&applied.stderr));
        match local {
            Ok(admitted) if from.is_empty() => {
                admitted.into_iter().for_each(|value| store.apply_value(value, &Time(Timestamp::now())).unwrap());
            }
            Ok(_) => {}
            Err(refused) => assert!(refused.to_string().contains("line 4: ") || refused.to_string().contains("line 5: "), "{refused}"),
        }
    }
}

#[test]
fn every_example_is_admitted_with_the_defaults_of_local_mode() {
    let Some(cluster) = cluster() else { return };
    let admission = Admission::new().unwrap();
    let mut kinds = Vec::new();
    for file in ["quickstart", "spam"].iter().flat_map(|example| ["pool", "job", "deployment"].map(|part| format!("{example}/{part}.yaml")))
    {
        for object in documents(&example(&file)) {
            let theirs = submit(&cluster, &object, None, "&dryRun=All").unwrap_or_else(|fields| panic!("{file}: {fields:?}"));
            assert_eq!(plain(&theirs["spec"]), plain(&admission.admit(&object, None).unwrap()["spec"]), "{file}");
            kinds.push(object["kind"].clone());
        }
        let applied = cluster
            .command("kubectl")
            .args(["apply", "--dry-run=server", "--filename"])
            .arg(repository().join("examples").join(&file))
            .output();
        assert!(applied.unwrap().status.success(), "{file}");
    }
    assert_eq!(kinds.len(), 6);
    for volumes in ["quickstart", "spam"].map(|example| repository().join("examples").join(example).join("volumes.yaml")) {
        cluster.kubectl(&["apply", "--dry-run=server", "--filename", volumes.to_str().unwrap()]);
    }
    for folder in ["models", "sources"].map(|folder| repository().join("examples").join(folder)) {
        cluster.kubectl(&["apply", "--dry-run=server", "--filename", folder.to_str().unwrap()]);
    }
}

#[test]
fn kubectl_shows_explains_and_scales_the_three_kinds() {
    let Some(cluster) = cluster() else { return };
    // Nobody else's: on a cluster that is not ours the other tests have objects of these names.
    cluster.kubectl(&["create", "namespace", "shown"]);
    let kubectl = |arguments: &[&str]| cluster.kubectl(&[arguments, &["--namespace", "shown"]].concat());
    for manifest in ["pool", "job", "deployment"] {
        cluster.apply("shown", &example(&format!("quickstart/{manifest}.yaml")));
    }
    let columns = |name: &str| -> Vec<String> {
        let shown = kubectl(&["get", name, "--output", "wide"]);
        shown.lines().next().unwrap().split("  ").map(str::trim).filter(|column| !column.is_empty()).map(str::to_owned).collect()
    };
    assert_eq!(columns("bmp"), ["NAME", "READY", "REASON", "AVAILABLE", "DESIRED", "MODEL", "FETCHED", "AGE", "MESSAGE"]);
    assert_eq!(columns("coj"), ["NAME", "READY", "REASON", "STEP", "OF", "LOSS", "BASE", "AGE", "MESSAGE"]);
    assert_eq!(columns("cod"), ["NAME", "READY", "REASON", "AVAILABLE", "DESIRED", "URL", "HEADS", "AGE", "MESSAGE"]);
    let category = kubectl(&["get", "carryon", "--output", "name"]);
    assert_eq!(category.lines().count(), 3, "{category}");
    // The server publishes the schemas a moment after it knows the kinds.
    let explain = || cluster.command("kubectl").args(["explain", "carryonjob.spec.training.maxSteps"]).output().unwrap();
    let explained = cluster.eventually("it explains", async || Some(explain()).filter(|explained| explained.status.success()));
    let explained = String::from_utf8(explained.stdout).unwrap();
    assert!(explained.contains("DESCRIPTION") && !explained.contains("<empty>"), "{explained}");
    for scaled in ["bmp/smollm2", "cod/quickstart"] {
        kubectl(&["scale", scaled, "--replicas=4"]);
        assert_eq!(kubectl(&["get", scaled, "--output", "jsonpath={.spec.replicas}"]), "4");
    }
    let unscaled = cluster.command("kubectl").args(["scale", "coj/quickstart", "--replicas=2", "--namespace", "shown"]).output().unwrap();
    assert!(!unscaled.status.success(), "a job has no scale");
    let stored: Value = serde_json::from_str(&cluster.kubectl(&[
        "get",
        "--raw",
        &format!("/apis/{}/namespaces/shown/basemodelpools/smollm2/scale", api_version()),
    ]))
    .unwrap();
    assert_eq!(stored["spec"], json!({ "replicas": 4 }));
    kubectl(&["delete", "bmp/smollm2", "coj/quickstart", "cod/quickstart"]);
    cluster.kubectl(&["delete", "namespace", "shown", "--wait=false"]);
}
