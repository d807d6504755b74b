//! The quick start, made small, on the real binaries and the real model: what is promised of it, and what happens when parts of it die.

#![allow(clippy::unwrap_used)] // a test may fail by panicking, in its helpers too

mod fetched;
mod refusals;
mod setup;

use std::fs;
use std::process::Command;

use carryon_tests::{node, python, repository};
use setup::{Local, Role};

/// The official clients' view: streams, stop strings, logprobs, hints, errors.
fn ask_with_the_official_clients(local: &Local) {
    for (program, script) in [(python(), "client.py"), ("node".into(), "client.mjs")] {
        let mut client = Command::new(program);
        client.arg(repository().join("tests").join(script)).arg(local.url()).arg("quickstart").env("CARRYON_NODE", node());
        let output = client.output().unwrap();
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{script}: {stdout}{stderr}");
    }
}

/// The API key, which the deployment takes from a Secret.
fn write_key(local: &Local, key: &str) {
    let secret = format!("apiVersion: v1\nkind: Secret\nmetadata: {{name: api}}\nstringData: {{key: {key}}}\n");
    fs::write(local.manifests().join("secret.yaml"), secret).unwrap();
}

/// Another key in the Secret counts without a restart of the gateway.
fn rotate_the_key(local: &Local) {
    let gateway = local.pid(Role::Serve);
    assert!(local.answers_to("not-needed") && local.refuses("another"));
    write_key(local, "another");
    local.up(&[]);
    local.wait("an answer to the new key", || local.answers_to("another"));
    assert!(local.refuses("not-needed"));
    assert_eq!(local.pid(Role::Serve), gateway);
}

#[test]
fn quick_start_survives_kill_nine_of_every_part_with_the_bits_of_an_unbroken_run() {
    let unbroken = Local::new("unbroken");
    let deployment = unbroken.manifests().join("deployment.yaml");
    let locked = fs::read_to_string(&deployment).unwrap() + "  api:\n    keys: [{name: one, secretRef: {name: api, key: key}}]\n";
    fs::write(&deployment, locked).unwrap();
    // What the official clients send below.
    write_key(&unbroken, "not-needed");
    unbroken.up(&["--until", "complete", "--timeout", "300"]);
    let metrics = unbroken.head_manifest()["metrics"].clone();
    let (base, head) = (metrics["base_eval_loss"].as_f64().unwrap(), metrics["eval_loss"].as_f64().unwrap());
    assert!(head < base - 0.1, "the head's loss {head} is not below the base's {base}");
    assert!(fs::read_to_string(unbroken.head().join("report.html")).unwrap().contains("</html>"));
    ask_with_the_official_clients(&unbroken);
    rotate_the_key(&unbroken);
    unbroken.down();

    let broken = Local::new("broken");
    broken.up(&[]);
    broken.wait("the third step", || broken.step() >= 3);
    broken.kill(Role::Base);
    broken.wait("a step after the pool's death", || broken.step() >= 6);
    broken.kill(Role::Train);
    broken.wait("completion", || broken.condition("CarryOnJob", "Complete"));
    broken.wait("the gateway", || broken.condition("CarryOnDeployment", "Ready"));
    broken.kill(Role::Serve);
    broken.kill(Role::Base);
    broken.wait("an answer after both deaths", || broken.answers());
    let bits = |local: &Local| fs::read(local.head().join("head.safetensors")).unwrap();
    assert!(bits(&unbroken) == bits(&broken), "the head of the broken run has other bits");
    broken.down();
}
