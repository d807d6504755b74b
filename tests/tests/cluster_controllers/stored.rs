//! Definitions that come, by an upgrade or a rollback, and objects that are stored.

use carryon_operator::cluster::stored;
use carryon_tests::cluster::TestCluster;
use carryon_tests::operator::Operator;
use carryon_tests::{binary, example, repository};
use kube::Client;
use serde_json::json;

const ACCOUNT: &str = "system:serviceaccount:carry-on-system:carry-on-crds-check";

#[test]
fn definitions_that_would_drop_what_is_stored_are_refused() {
    let Some(cluster) = TestCluster::api_server().and_then(TestCluster::ours_only) else { return };
    Operator::install(&cluster);
    let mut helm = cluster.command("helm");
    let helm = helm.args(["template", "carry-on", "--namespace=carry-on-system", "--show-only=templates/crds-check.yaml"]);
    let rendered = helm.arg(repository().join("charts/carry-on")).output().unwrap();
    assert!(rendered.status.success(), "{}", String::from_utf8_lossy(&rendered.stderr));
    cluster.apply("carry-on-system", &String::from_utf8(rendered.stdout).unwrap());
    for manifest in ["pool", "job", "deployment"] {
        cluster.apply("default", &example(&format!("quickstart/{manifest}.yaml")));
    }
    // With the rights that the chart's hook has.
    let config = cluster.config_as(ACCOUNT);
    let client = cluster.block_on(async { Client::try_from(config).unwrap() });
    let refused = || cluster.block_on(stored::refused(&client)).unwrap();
    assert_eq!(refused(), [""; 0]);

    // A newer release was here: its jobs have a field and a value more.
    let schema = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
    let newer = json!([
        { "op": "add", "path": format!("{schema}/fresh"), "value": { "type": "string" } },
        { "op": "add", "path": format!("{schema}/training/properties/optim/enum/-"), "value": "Fresh" },
    ]);
    cluster.kubectl(&["patch", "crd", "carryonjobs.carryon.dev", "--type=json", "--patch", &newer.to_string()]);
    let patch = |spec: serde_json::Value| {
        let patch = json!({ "spec": spec }).to_string();
        let patched = cluster.command("kubectl").args(["patch", "coj/quickstart", "--type=merge", "--patch", &patch]).output().unwrap();
        let stored = cluster.kubectl(&["get", "coj/quickstart", "--output=jsonpath={.spec.fresh}{.spec.training.optim}"]);
        (patched.status.success(), stored)
    };
    cluster.eventually("the newer definition is known", async || {
        (patch(json!({ "fresh": "x", "training": { "optim": "Fresh" } })) == (true, "xFresh".to_owned())).then_some(())
    });
    let found = refused();
    assert_eq!(found[0], "CarryOnJob default/quickstart: spec.fresh: unknown field", "{found:?}");
    let check = cluster.command(binary("carryon-operator").to_str().unwrap()).args(["crds", "--check"]).output().unwrap();
    let said = String::from_utf8_lossy(&check.stderr);
    assert!(!check.status.success() && said.contains(&found[0]), "{said}");

    assert_eq!(patch(json!({ "fresh": null })), (true, "Fresh".to_owned()));
    let found = refused();
    assert!(found.len() == 1 && found[0].starts_with("CarryOnJob default/quickstart: spec.training.optim: "), "{found:?}");
    patch(json!({ "training": { "optim": "AdamW" } }));
    assert_eq!(refused(), [""; 0]);
    let check = cluster.command(binary("carryon-operator").to_str().unwrap()).args(["crds", "--check"]).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
    // Before the first installation nothing is stored.
    cluster.kubectl(&["delete", "coj,cod,bmp", "--all"]);
    cluster.kubectl(&["delete", "crd", "carryonjobs.carryon.dev", "basemodelpools.carryon.dev", "carryondeployments.carryon.dev"]);
    cluster.eventually("the definitions are gone", async || stored::refused(&client).await.unwrap().is_empty().then_some(()));
}
