//! What a platform team does to a cluster while a job runs: upgrades, rolls back, reinstalls, loses nodes.

use std::path::{Path, PathBuf};
use std::process::Command;

use carryon_crds::CarryOnJob;
use carryon_operator::shared::trouble::is_ready;
use carryon_tests::{example, previous, repository};
use kube::ResourceExt as _;
use serde_json::json;

use super::world::{HOME, World, job, replaced, short_job};

/// Scheduling that likes a node.
fn likes(node: &str, field: &str) -> String {
    format!(
        "  {field}:
    scheduling:
      affinity:
        nodeAffinity:
          preferredDuringSchedulingIgnoredDuringExecution:
          - weight: 100
            preference:
              matchExpressions:
              - {{key: kubernetes.io/hostname, operator: In, values: [{node}]}}
"
    )
}

#[test]
#[ignore = "takes minutes: make test-all"]
fn a_running_job_outlives_upgrades_a_reinstallation_and_its_nodes() {
    let Some(world) = World::start(3) else { return };
    let mut here = vec![];
    if world.cluster.may("an upgrade from the release before, and lost nodes") {
        world.cluster.load_previous_images();
        here = vec!["--set", "nodeSelector.kubernetes\\.io/hostname=node1"];
        let before = ["--set", "image.tag=previous,workerImage.tag=previous"];
        world.install_chart(&previous().join("source/charts/carry-on"), "install", "carry-on", &[&here[..], &before].concat());
    } else {
        world.install("install", "carry-on", &here);
    }
    let space = &world.volumes("ops");
    world.apply(space, &(example("quickstart/pool.yaml") + &likes("node2", "server")));
    // More steps than any machine makes meanwhile.
    world.apply(space, &(job(2000) + &likes("node3", "trainer")));
    world.until_step(space, 4);
    let identities = || ["pool", "trainer"].map(|component| world.pod(space, component).uid().unwrap());
    let first = identities();

    world.install("upgrade", "carry-on", &[&here[..], &["--set", "replicas=2"]].concat());
    assert_eq!(identities(), first, "an upgrade restarted a worker");
    let rolled_back = world.helm(&["rollback", "carry-on", "1", "--wait", "--timeout=120s"]);
    assert!(rolled_back.status.success(), "{}", String::from_utf8_lossy(&rolled_back.stderr));
    assert_eq!(identities(), first, "a rollback restarted a worker");
    let uninstalled = world.helm(&["uninstall", "carry-on", "--wait", "--timeout=120s"]);
    assert!(uninstalled.status.success(), "{}", String::from_utf8_lossy(&uninstalled.stderr));
    world.install("install", "other-name", &[&here[..], &["--take-ownership"]].concat());
    assert_eq!(identities(), first, "another installation restarted a worker");
    let (reason, message) = world.condition(space, "coj/quickstart", "Ready");
    assert_eq!(reason, "Running", "{message}");

    if !world.cluster.is_ours() {
        return;
    }
    let on = |component: &str| world.pod(space, component).spec.unwrap().node_name.unwrap();
    assert_eq!((on("pool").as_str(), on("trainer").as_str()), ("node2", "node3"));
    let reached = world.step(space);
    world.cluster.kill_node(2);
    world.cluster.kill_node(3);
    for (object, node) in [("bmp/smollm2", "node2"), ("coj/quickstart", "node3")] {
        world.wait(&format!("{object} says that its node is lost"), || {
            let (reason, message) = world.condition(space, object, "Ready");
            reason == "NodeLost" && message.contains(node) && message.contains("out-of-service")
        });
    }
    // The two ways out of it.
    world.cluster.kubectl(&["delete", "node", "node2"]);
    world.cluster.kubectl(&["taint", "node", "node3", "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"]);
    world.wait("a trainer on the first node", || world.step(space) > 0);
    assert_eq!((on("pool").as_str(), on("trainer").as_str()), ("node1", "node1"));
    let image = |component: &str| world.pod(space, component).spec.unwrap().containers[0].image.clone().unwrap();
    assert!(image("pool").ends_with(":previous") && image("trainer").ends_with(":previous"), "another release took over by itself");
    let step = world.step(space);
    assert!(step + 8 >= reached, "the job was at step {reached} and is at {step}: its checkpoint was lost");
    let long = world.job(space).status.unwrap();
    assert_eq!((long.attempt, long.failures), (1, 0), "{long:#?}");

    // What the first node has taken over serves what comes now, which is of today's release.
    world.cluster.kubectl(&["--namespace", space, "delete", "coj", "quickstart"]);
    world.apply(space, &short_job("short", 4));
    world.apply(
        space,
        &replaced(&example("quickstart/deployment.yaml"), "jobRef:\n        name: quickstart", "jobRef:\n        name: short"),
    );
    let url = world.until_served(space);
    world.until_answered(&url);
    assert!(image("pool").ends_with(":previous") && image("gateway").ends_with(":test"), "the releases are not as they should be");

    world.cluster.kubectl(&["--namespace", space, "annotate", "bmp/smollm2", "carryon.dev/upgrade=now"]);
    world.wait("a pool of today's release", || {
        let pools = world.pods(space, "pool");
        pools.len() == 1 && image("pool").ends_with(":test") && is_ready(&pools[0])
    });
    world.until_answered(&url);
}

/// Today's chart, whose jobs have a field more.
fn newer_chart(folder: &Path) -> PathBuf {
    let chart = folder.join("carry-on");
    let copied = Command::new("cp").arg("-R").arg(repository().join("charts/carry-on")).arg(&chart).status().unwrap();
    assert!(copied.success());
    let file = chart.join("files/crds.yaml");
    let fresh = "              fresh:\n                type: string\n";
    let first = "              activeDeadlineSeconds:\n";
    std::fs::write(&file, replaced(&std::fs::read_to_string(&file).unwrap(), first, &format!("{fresh}{first}"))).unwrap();
    chart
}

#[test]
#[ignore = "takes minutes: make test-all"]
fn a_rollback_that_would_drop_what_a_job_asks_for_is_refused_until_it_asks_no_more() {
    let Some(world) = World::start(1) else { return };
    let folder = tempfile::TempDir::new().unwrap();
    world.install("install", "carry-on", &[]);
    world.install_chart(&newer_chart(folder.path()), "upgrade", "carry-on", &[]);
    let space = &world.volumes("back");
    world.apply(space, &replaced(&job(4), "\nspec:\n", "\nspec:\n  suspend: true\n  fresh: kept\n"));
    let fresh = || world.cluster.kubectl(&["--namespace", space, "get", "coj/quickstart", "--output=jsonpath={.spec.fresh}"]);
    let back = || world.helm(&["rollback", "carry-on", "1", "--wait", "--timeout=120s"]);
    let refused = back();
    let said = String::from_utf8_lossy(&refused.stdout) + String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("carry-on-crds-check"), "{said}");
    let logs = world.cluster.kubectl(&["--namespace", HOME, "logs", "job/carry-on-crds-check"]);
    assert!(logs.contains(&format!("CarryOnJob {space}/quickstart: spec.fresh: unknown field")), "{logs}");
    assert_eq!(fresh(), "kept");
    world.patch::<CarryOnJob>(space, "quickstart", json!({ "spec": { "fresh": null } }));
    let done = back();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let left = world.cluster.kubectl(&["--namespace", HOME, "get", "jobs,serviceaccounts", "--output=name"]);
    assert!(!left.contains("crds-check"), "{left}");
}
