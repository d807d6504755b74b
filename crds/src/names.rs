//! Names, labels, ports and mount paths that operator and worker agree on.

use std::collections::BTreeMap;

/// Value of [`MANAGER_LABEL`].
pub const MANAGER: &str = "carryon-operator";
/// Port of a pool pod: exchange, generation, health, metrics.
pub const POOL_PORT: i32 = 8080;
/// Port of a trainer pod: progress, health, metrics.
pub const TRAINER_PORT: i32 = 8081;
/// Port of a gateway pod: the OpenAI API, health, metrics.
pub const GATEWAY_PORT: i32 = 8000;
/// Folder of the worker's ConfigMap, file [`CONFIG_FILE`].
pub const CONFIG_DIR: &str = "/etc/carryon";
/// The worker's configuration in JSON.
pub const CONFIG_FILE: &str = "config.json";
/// Mount path of a pool's model volume.
pub const MODEL_DIR: &str = "/model";
/// Mount path of what models were fetched into.
pub const CACHE_DIR: &str = "/model-cache";
/// Its volume.
pub const CACHE_VOLUME: &str = "model-cache";
/// Mount path of the authorities that a model's source is trusted by.
pub const CA_DIR: &str = "/etc/carryon-ca";
/// Container that fetches a pool's model before the worker starts.
pub const FETCH: &str = "fetch";
/// Environment variable of that container: the commit that the pool's revision was resolved to.
pub const MODEL_COMMIT: &str = "CARRYON_MODEL_COMMIT";
/// Key of the ConfigMap that holds it.
pub const COMMIT_KEY: &str = "commit";
/// Mount path of a job's data.
pub const DATA_DIR: &str = "/data";
/// Mount path of the hidden states that jobs share.
pub const STATE_CACHE_DIR: &str = "/state-cache";
/// Mount path of the claim that holds the head which a job starts from.
pub const INIT_HEAD_DIR: &str = "/init-head";
/// Mount path of a job's output volume.
pub const OUTPUT_DIR: &str = "/output";
/// `managedBy` of jobs that the operator looks after, beside those that name nobody.
pub const CONTROLLER: &str = "carryon.dev/operator";
/// Where a gateway reads its artifacts: the volume of each head is mounted at a folder of its name.
pub const HEADS_DIR: &str = "/heads";
/// File a container's last words go to.
pub const TERMINATION_LOG: &str = "/dev/termination-log";
/// Environment variable of a pool's worker: bytes of memory that its pod may use.
pub const MEMORY_LIMIT: &str = "CARRYON_MEMORY_LIMIT";
/// Where a gateway reads the API keys that its clients send: each Secret is mounted at a folder of the key's name.
pub const API_KEYS_DIR: &str = "/etc/carryon-api-keys";

/// Annotation of a pod template: digest of the revision it is of.
pub const CONFIG_DIGEST_ANNOTATION: &str = "carryon.dev/config-digest";
/// Annotation of a gateway: `NAMESPACE/NAME` of the pool that it works with.
pub const POOL_ANNOTATION: &str = "carryon.dev/pool";
/// Annotation of an object: whenever its value changes, the pods are rendered as today's operator would, with today's worker image.
pub const UPGRADE_ANNOTATION: &str = "carryon.dev/upgrade";
/// Annotation of a ControllerRevision: what the pods were rendered from.
pub const RENDERED_FROM_ANNOTATION: &str = "carryon.dev/rendered-from";
/// Component of the ControllerRevisions.
pub const REVISION: &str = "revision";
/// Volume of every pod with the worker's configuration.
pub const CONFIG_VOLUME: &str = "config";
/// Annotation of a child: digest of what the operator last applied.
pub const APPLIED_ANNOTATION: &str = "carryon.dev/applied";
/// Label of all that is of this product: its [`NAME`].
pub const NAME_LABEL: &str = "app.kubernetes.io/name";
/// Value of [`NAME_LABEL`].
pub const NAME: &str = "carry-on";
/// Label of a child: `pool`, `trainer` or `gateway`. The worker's container has that name too.
pub const COMPONENT_LABEL: &str = "app.kubernetes.io/component";
/// Label of a child: name of the object that it is of.
pub const INSTANCE_LABEL: &str = "app.kubernetes.io/instance";
/// Label of everything that the operator makes.
pub const MANAGER_LABEL: &str = "app.kubernetes.io/managed-by";
/// Label of a training attempt's batch Job and pod: the attempt's number.
pub const ATTEMPT_LABEL: &str = "carryon.dev/attempt";
/// Finalizer of a trainer's pod: how it ended has yet to be read.
pub const LAST_WORDS_FINALIZER: &str = "carryon.dev/last-words";
/// Annotation of a finished job: its result, which a backup keeps.
pub const RESULT_ANNOTATION: &str = "carryon.dev/result";
/// Command of every container: the worker binary.
pub const WORKER: &str = "carryon-worker";

/// The standard labels of a child; `component` is `pool`, `trainer`, `gateway` or [`REVISION`].
pub fn labels(component: &str, instance: &str) -> BTreeMap<String, String> {
    [(NAME_LABEL, NAME), (COMPONENT_LABEL, component), (INSTANCE_LABEL, instance), (MANAGER_LABEL, MANAGER)]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

/// The labels that select a child's pods (the standard ones without those that may change).
pub fn selector(component: &str, instance: &str) -> BTreeMap<String, String> {
    let mut labels = labels(component, instance);
    labels.remove(MANAGER_LABEL);
    labels
}

/// `pvc://CLAIM/PATH`: a folder of a claim.
pub fn claim_uri(claim: &str, path: &str) -> String {
    format!("pvc://{claim}/{path}")
}

/// Claim and path of a [`claim_uri`].
pub fn parse_claim_uri(uri: &str) -> Option<(&str, &str)> {
    uri.strip_prefix("pvc://")?.split_once('/')
}

/// Folder of a finished artifact inside a job's output: `heads/sha256-HEX`. Named by its digest, so that no later head takes its place.
pub fn artifact_folder(digest: &str) -> String {
    format!("heads/{}", digest.replace(':', "-"))
}

/// Name of a pool's children.
pub fn pool(name: &str) -> String {
    format!("{name}-pool")
}

/// Name of the ConfigMap that keeps the commit of a pool's model.
pub fn pool_commit(name: &str) -> String {
    format!("{}-commit", pool(name))
}

/// Name of a gateway's children.
pub fn gateway(name: &str) -> String {
    format!("{name}-gateway")
}

/// Name of a job's children but its attempts.
pub fn trainer(name: &str) -> String {
    format!("{name}-trainer")
}

/// Name of the batch Job of one attempt.
pub fn attempt(job: &str, attempt: u32) -> String {
    format!("{job}-{attempt}")
}

/// `http://SERVICE.NAMESPACE.svc:PORT`.
pub fn service_url(service: &str, namespace: &str, port: i32) -> String {
    format!("http://{service}.{namespace}.svc:{port}")
}
