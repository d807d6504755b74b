//! An operator that ends after any of its writes.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use carryon_crds::wire::digest;
use carryon_tests::operator::Operator;
use serde_json::Value;

use super::world::{World, picture};

/// Deaths at the same time, each in a namespace of its own: most of their time is waiting.
const AT_ONCE: usize = 4;

#[test]
fn an_operator_that_dies_after_any_of_eight_writes_leaves_the_next_one_the_same_end() {
    let Some(world) = World::start() else { return };
    let (writes, whole) = whole(&world);
    let seed = seed();
    let mut numbers: Vec<usize> = (1..=writes).collect();
    numbers.sort_by_cached_key(|number| digest(format!("{seed} {number}").as_bytes()));
    println!("CARRYON_SEED={seed} kills after the writes {numbers:?} until it is dead eight times");
    assert_eq!(deaths(&world, &numbers, 8, &whole), 8);
}

#[test]
#[ignore = "takes minutes: make test-all"]
fn an_operator_that_dies_after_whichever_write_leaves_the_next_one_the_same_end() {
    let Some(world) = World::start() else { return };
    let (writes, whole) = whole(&world);
    let numbers: Vec<usize> = (1..=writes).collect();
    // The number of a run's writes varies by an event or a status.
    let dead = deaths(&world, &numbers, writes, &whole);
    assert!(dead + 3 >= writes, "only {dead} of {writes} deaths came");
}

/// Which writes are an operator's last: those of the commit, or of whoever wants to see a failure again.
fn seed() -> String {
    let commit = || {
        let head = Command::new("git").args(["rev-parse", "HEAD"]).output().ok().filter(|git| git.status.success());
        head.map(|head| String::from_utf8_lossy(&head.stdout).trim().to_owned())
    };
    std::env::var("CARRYON_SEED").ok().or_else(commit).unwrap_or_else(|| "0".to_owned())
}

/// The quick start under an operator that lives: how often it writes, and what comes of it.
fn whole(world: &World) -> (usize, Value) {
    world.quickstart("whole");
    let operator = Operator::start(&world.cluster, Some("whole"));
    world.until_served("whole");
    world.quiet();
    let writes = operator.writes();
    println!("the quick start takes {writes} writes");
    assert!(writes > 15, "only {writes} writes");
    (writes, picture(world, "whole"))
}

/// Kills an operator after each of these writes until so many have died; how many did. One that had no more to write is none.
fn deaths(world: &World, numbers: &[usize], wanted: usize, whole: &Value) -> usize {
    let mut dead = 0;
    for some in numbers.chunks(AT_ONCE) {
        let outcomes: Vec<bool> = std::thread::scope(|scope| {
            let lives: Vec<_> = some.iter().map(|last| scope.spawn(|| dies(world, *last, whole))).collect();
            lives.into_iter().map(|life| life.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        dead += outcomes.into_iter().filter(|died| *died).count();
        if dead >= wanted {
            return wanted;
        }
    }
    dead
}

/// Whether an operator came to its last write; the next one came to the same end in any case.
fn dies(world: &World, last: usize, whole: &Value) -> bool {
    let space = format!("last-{last}");
    world.quickstart(&space);
    let killed = Operator::start_mortal(&world.cluster, Some(&space), last);
    let reached = world.cluster.block_on(async { tokio::time::timeout(Duration::from_secs(30), killed.reached()).await });
    drop(killed);
    let operator = Operator::start(&world.cluster, Some(&space));
    world.until_served(&space);
    comes_to(world, &space, whole, last);
    drop(operator);
    println!("write {last}: {}", if reached.is_ok() { "the last one; the same end" } else { "never came, and counts for nothing" });
    world.cluster.kubectl(&["delete", "namespace", &space, "--wait=false"]);
    reached.is_ok()
}

/// The operator and Kubernetes' own controllers may have a last word a moment later.
fn comes_to(world: &World, space: &str, whole: &Value, last: usize) {
    let mut differences = Vec::new();
    for _ in 0..50 {
        differences.clear();
        differ("", &picture(world, space), whole, &mut differences);
        if differences.is_empty() {
            return;
        }
    }
    panic!("killed after write {last}:\n{}", differences.join("\n"));
}

/// Where `now` is not `whole`.
fn differ(path: &str, now: &Value, whole: &Value, differences: &mut Vec<String>) {
    match (now, whole) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: BTreeSet<_> = a.keys().chain(b.keys()).collect();
            keys.into_iter().for_each(|key| differ(&format!("{path}.{key}"), &now[key], &whole[key], differences));
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            (0..a.len()).for_each(|place| differ(&format!("{path}[{place}]"), &a[place], &b[place], differences));
        }
        _ if now != whole => differences.push(format!("{path}: {now} instead of {whole}")),
        _ => {}
    }
}
