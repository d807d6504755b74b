//! A pool of the platform's that teams train on and serve from, for as long as it is shared with them.

use std::time::{Duration, Instant};

use carryon_crds::CarryOnJob;
use carryon_crds::job::AttemptResult;
use carryon_tests::example;

use super::load::{Load, ask};
use super::world::{World, replaced, short_job};

/// From a withdrawal to the first request that is refused, at most.
const SOON: Duration = Duration::from_secs(15);
/// Few steps of the first head; more than any machine makes meanwhile of the other.
const STEPS: [u32; 2] = [4, 2000];

/// A manifest like the quick start's on the pool of another namespace.
fn on(platform: &str, manifest: &str) -> String {
    replaced(manifest, "- name: smollm2\n", &format!("- name: smollm2\n    namespace: {platform}\n"))
}

/// Whether a gateway takes a request, over a connection of its own. What it is asked for does not wait for the pool.
async fn takes_requests(url: &str) -> bool {
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build().unwrap();
    client.get(format!("{url}/models")).send().await.is_ok_and(|answer| answer.status().is_success())
}

#[test]
fn a_pool_serves_the_namespaces_that_it_is_shared_with_until_it_is_withdrawn() {
    let Some(world) = World::start(1) else { return };
    world.install("install", "carry-on", &[]);
    let [platform, a, b, c] = ["platform", "team-a", "team-b", "team-c"].map(|name| world.volumes(name));
    let share = |team: &str, label: &str| drop(world.cluster.kubectl(&["label", "namespace", team, label]));
    [&a, &b].into_iter().for_each(|team| share(team, "base=smollm2"));
    let sharing = "  sharing:\n    namespaces: {from: Selector, selector: {matchLabels: {base: smollm2}}}\n";
    world.apply(&platform, &(example("quickstart/pool.yaml") + sharing));
    for team in [&a, &b, &c] {
        world.apply(team, &on(&platform, &short_job("quickstart", STEPS[0])));
        world.apply(team, &on(&platform, &example("quickstart/deployment.yaml")));
    }
    let urls = [&a, &b].map(|team| world.until_served(team));
    let answers = urls.clone().map(|url| world.until_answered(&url));
    assert_eq!((&answers[0], world.head(&a)), (&answers[1], world.head(&b)), "one base and the same samples make the same head");
    let missing = |team: &str| {
        let message = format!("BaseModelPool {platform}/smollm2 (spec.pools[0]) not found: create it, or share it with namespace {team}");
        ("PoolNotFound".to_owned(), message)
    };
    for object in ["coj/quickstart", "cod/quickstart"] {
        assert_eq!(world.condition(&c, object, "Ready"), missing(&c));
    }
    assert!(world.children(&c).is_empty());

    // A second job of team-b trains while the pool is withdrawn from it.
    world.apply(&b, &on(&platform, &short_job("long", STEPS[1])));
    world.wait("a checkpoint", || world.step(&b) >= 5);
    let load = Load::start(&world.cluster, &urls[0], "quickstart", 1, 8);
    let (reached, withdrawn) = (world.step(&b), Instant::now());
    share(&b, "base-");
    world.wait("a request is refused", || !world.cluster.block_on(takes_requests(&urls[1])));
    let refused = withdrawn.elapsed();
    println!("from the withdrawal to the first request that is refused: {:.1} s", refused.as_secs_f64());
    for object in ["coj/long", "cod/quickstart"] {
        world.wait(&format!("{object} says so"), || world.condition(&b, object, "Ready") == missing(&b));
    }
    println!("to the word of it: {:.1} s", withdrawn.elapsed().as_secs_f64());
    assert!(refused < SOON, "{refused:?}");
    assert!(world.cluster.block_on(ask(&urls[1], "quickstart", 1)).is_err());
    let long = || world.get::<CarryOnJob>(&b, "long").status.unwrap();
    world.wait("the trainer has ended", || long().attempts.iter().all(|attempt| attempt.result.is_some()));
    let status = long();
    assert_eq!((status.attempts.last().unwrap().result, status.failures), (Some(AttemptResult::Resumable), 0), "{status:#?}");
    assert_eq!(world.condition(&b, "coj/long", "Ready"), missing(&b));
    assert!(world.pods(&b, "gateway").iter().all(|pod| pod.metadata.deletion_timestamp.is_some()));
    let served = load.answered();
    world.wait("team-a is served on", || load.answered() > served + 2);
    assert_eq!(load.stop(&world.cluster).failures, [""; 0]);

    share(&b, "base=smollm2");
    assert_eq!(world.until_answered(&world.until_served(&b)), answers[1]);
    world.wait("another trainer", || world.step(&b) > 0);
    let step = world.step(&b);
    assert!(step >= reached, "the job was at step {reached} and is at {step}: its checkpoint was lost");
    assert_eq!((long().attempt, long().failures), (2, 0));
}
