//! What a cluster can do and this machine cannot: refused by name instead of pretended.

use carryon_crds::names;
use serde_json::Value;

use crate::admission::Violation;

/// Resources that a process has without a device plugin.
const RESOURCES: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];

/// What local mode cannot emulate in `object`; `has_claim(namespace, name)` says whether a claim has a folder here.
pub fn violations(object: &Value, has_claim: &dyn Fn(&str, &str) -> bool) -> Vec<Violation> {
    let template = match object["kind"].as_str() {
        Some("BaseModelPool") => "server",
        Some("CarryOnJob") => "trainer",
        Some("CarryOnDeployment") => "gateway",
        _ => return Vec::new(),
    };
    let mut violations = Vec::new();
    let pod = &object["spec"][template];
    if pod["image"].is_string() {
        violations.push(Violation::new(
            format!("spec.{template}.image"),
            "local mode runs the worker binary of this machine and no image: leave it out",
        ));
    }
    if object["spec"]["model"]["source"]["image"].is_object() {
        let reason = "local mode pulls no images: use huggingFace, objectStore or persistentVolumeClaim";
        violations.push(Violation::new("spec.model.source.image", reason));
    }
    for list in ["requests", "limits"] {
        let names = pod["resources"][list].as_object().into_iter().flatten().map(|(name, _)| name);
        violations.extend(names.filter(|name| !RESOURCES.contains(&name.as_str())).map(|name| {
            let reason = format!("local mode has no {name} to give: leave it out, workers find this machine's devices");
            Violation::new(format!("spec.{template}.resources.{list}[{name}]"), reason)
        }));
    }
    let scheduling = pod["scheduling"].as_object().into_iter().flatten().map(|(name, _)| format!("scheduling.{name}"));
    let others = ["imagePullSecrets", "serviceAccountName", "volumes", "volumeMounts"];
    let others = others.into_iter().filter(|name| pod.get(name).is_some()).map(str::to_owned);
    let of_elsewhere = |(index, variable): (usize, &Value)| variable.get("valueFrom").map(|_| format!("env[{index}].valueFrom"));
    let env = pod["env"].as_array().into_iter().flatten().enumerate().filter_map(of_elsewhere);
    violations.extend(
        scheduling
            .chain(others)
            .chain(env)
            .map(|field| Violation::new(format!("spec.{template}.{field}"), "local mode has one machine and no images: leave it out")),
    );
    if object["spec"]["managedBy"].as_str().is_some_and(|manager| manager != names::CONTROLLER) {
        violations.push(Violation::new("spec.managedBy", "local mode has no other controllers: leave it out"));
    }
    if !object["spec"]["ttlSecondsAfterFinished"].is_null() {
        violations.push(Violation::new("spec.ttlSecondsAfterFinished", "local mode keeps finished jobs: leave it out"));
    }
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default");
    let missing = claims(&object["spec"], "spec").into_iter().filter(|(_, claim)| !has_claim(namespace, claim));
    violations.extend(missing.map(|(field, claim)| {
        let reason = format!("no folder for claim {claim:?}: add a PersistentVolumeClaim to the manifests, or --volume {claim}=DIR");
        Violation::new(field, reason)
    }));
    violations
}

/// Every `persistentVolumeClaim.claimName` below `value`, with its field path.
fn claims(value: &Value, at: &str) -> Vec<(String, String)> {
    let Some(members) = value.as_object() else { return Vec::new() };
    let below = members.iter().flat_map(|(name, value)| match (name.as_str(), value["claimName"].as_str()) {
        ("persistentVolumeClaim", Some(claim)) => vec![(format!("{at}.{name}.claimName"), claim.to_owned())],
        _ => claims(value, &format!("{at}.{name}")),
    });
    below.collect()
}
