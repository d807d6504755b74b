//! An operator that ends after any of its writes.

use carryon_tests::operator::Operator;

use serde_json::Value;

use super::world::{World, picture};

#[test]
fn whichever_write_was_an_operators_last_the_next_one_comes_to_the_same_end() {
    let Some(world) = World::start() else { return };
    world.quickstart("whole");
    let operator = Operator::start(&world.cluster, Some("whole"));
    world.until_served("whole");
    world.quiet();
    let (writes, whole) = (operator.writes(), picture(&world, "whole"));
    drop(operator);
    println!("the quick start takes {writes} writes");
    assert!(writes > 15, "only {writes} writes");
    for last in 1..=writes {
        let space = format!("last-{last}");
        world.quickstart(&space);
        let killed = Operator::start_mortal(&world.cluster, Some(&space), last);
        // The number of a run's writes may vary by an event or a status.
        let reached = world.cluster.block_on(async { tokio::time::timeout(std::time::Duration::from_secs(20), killed.reached()).await });
        drop(killed);
        let operator = Operator::start(&world.cluster, Some(&space));
        world.until_served(&space);
        comes_to(&world, &space, &whole, last);
        drop(operator);
        println!("killed after write {last}: {}", if reached.is_ok() { "the same end" } else { "it had no more to write" });
        world.cluster.kubectl(&["delete", "namespace", &space, "--wait=false"]);
    }
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
            let keys: std::collections::BTreeSet<_> = a.keys().chain(b.keys()).collect();
            keys.into_iter().for_each(|key| differ(&format!("{path}.{key}"), &now[key], &whole[key], differences));
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            (0..a.len()).for_each(|place| differ(&format!("{path}[{place}]"), &a[place], &b[place], differences));
        }
        _ if now != whole => differences.push(format!("{path}: {now} instead of {whole}")),
        _ => {}
    }
}
