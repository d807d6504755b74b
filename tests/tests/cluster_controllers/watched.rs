//! What a client that watches makes of the three kinds, by the kstatus library itself: what Flux, Argo CD and kubectl plugins go by.

use std::io::Write as _;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use carryon_crds::condition::types::{READY, STALLED};
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use carryon_tests::cluster::Object;
use carryon_tests::cluster::hollow::Fate;
use carryon_tests::operator::Operator;
use futures::StreamExt as _;
use kube::runtime::watcher::{Config, Event, watcher};
use serde_json::{Value, json};

use super::world::World;

type Record = Arc<Mutex<Vec<Value>>>;

/// Every state of a kind that the API server tells of, from now on.
fn record<K: Object>(world: &World, record: &Record) {
    let (api, record) = (kube::Api::<K>::all(world.cluster.client()), record.clone());
    world.cluster.spawn(watcher(api, Config::default()).for_each(move |event| {
        if let Ok(Event::Apply(object)) = event {
            let mut object = json!(object);
            object["apiVersion"] = json!(K::api_version(&()));
            object["kind"] = json!(K::kind(&()));
            record.lock().unwrap().push(object);
        }
        std::future::ready(())
    }));
}

/// What kstatus computes of each state.
fn computed(world: &World, states: &[Value]) -> Vec<String> {
    let mut child = world.cluster.command("kstatus").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let text: String = states.iter().map(|state| format!("{state}\n")).collect();
    let writer = std::thread::spawn(move || input.write_all(text.as_bytes()).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().lines().map(|line| line.split('\t').next().unwrap().to_owned()).collect()
}

fn condition<'a>(state: &'a Value, type_: &str) -> &'a Value {
    let conditions = state["status"]["conditions"].as_array().unwrap();
    conditions.iter().find(|condition| condition["type"] == type_).unwrap()
}

#[test]
fn kstatus_never_calls_current_what_is_not_ready_and_failed_what_may_come() {
    let Some(world) = World::start() else { return };
    let states = Record::default();
    record::<BaseModelPool>(&world, &states);
    record::<CarryOnJob>(&world, &states);
    record::<CarryOnDeployment>(&world, &states);
    let _operator = Operator::start(&world.cluster, None);
    world.quickstart("good");
    world.until_served("good");
    let gateway = json!({ "spec": { "gateway": { "resources": { "limits": { "cpu": "2" } } } } });
    world.patch::<CarryOnDeployment>("good", "quickstart", gateway);
    world.quiet();
    world.hollow.fate("bad", "quickstart", Fate::complete("sha256:anotherbase"));
    world.quickstart("bad");
    world.until::<CarryOnDeployment>("bad", "quickstart", STALLED, "True", "BaseModelDiffers");
    // It was seen by another watch than the one that records.
    let is_stalled = |state: &Value| state["status"]["conditions"].is_array() && condition(state, STALLED)["status"] == "True";
    world.cluster.eventually("the record of it", async || states.lock().unwrap().iter().any(is_stalled).then_some(()));

    let states: Vec<Value> = std::mem::take(&mut *states.lock().unwrap());
    let states: Vec<Value> = states.into_iter().filter(|state| state["status"]["conditions"].is_array()).collect();
    let words = computed(&world, &states);
    assert_eq!(words.len(), states.len());
    let mut seen = std::collections::BTreeSet::new();
    for (state, word) in states.iter().zip(&words) {
        let (ready, stalled) = (condition(state, READY)["status"] == "True", condition(state, STALLED)["status"] == "True");
        let caught_up = state["status"]["observedGeneration"] == state["metadata"]["generation"];
        let expected = match (caught_up, ready, stalled) {
            (false, ..) => "InProgress",
            (true, true, false) => "Current",
            (true, false, true) => "Failed",
            (true, false, false) => "InProgress",
            (true, true, true) => panic!("ready and stalled at once: {state}"),
        };
        assert_eq!(word, expected, "{state}");
        seen.insert((state["kind"].as_str().unwrap(), word.as_str()));
    }
    let kinds = ["BaseModelPool", "CarryOnDeployment", "CarryOnJob"];
    let all = kinds.into_iter().flat_map(|kind| [(kind, "Current"), (kind, "InProgress")]).chain([("CarryOnDeployment", "Failed")]);
    assert_eq!(seen, all.collect());
    // From the first status on, in the order of time.
    for kind in kinds {
        let of_kind = states.iter().zip(&words).filter(|(state, _)| state["kind"] == kind && state["metadata"]["namespace"] == "good");
        let words: Vec<&str> = of_kind.map(|(_, word)| word.as_str()).collect();
        assert_eq!((words[0], words[words.len() - 1]), ("InProgress", "Current"), "{kind}: {words:?}");
    }
}
