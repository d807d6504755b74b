//! The quick start on any cluster, reached by nothing but its API server: the model from an image, the data from a ConfigMap,
//! the output on whatever volume the cluster has.

use carryon_crds::condition::is_true;
use carryon_crds::{BaseModelPool, CarryOnDeployment};
use carryon_tests::{example, model};
use http::Request;
use serde_json::{Value, json};

use super::world::{HOME, World, replaced, short_job};

const OUTPUT: &str = "
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: quickstart-output}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
";

fn pool(file: &str) -> String {
    let file_name = model().file_name().unwrap().to_string_lossy().into_owned();
    let claim = format!("persistentVolumeClaim:\n        claimName: models\n        path: {file_name}");
    let image = format!("image:\n        reference: localhost/carry-on/model:test\n        path: models/{file}");
    replaced(&example("quickstart/pool.yaml"), &claim, &image)
}

#[test]
fn any_cluster_with_the_images_trains_and_serves() {
    let Some(world) = World::anywhere() else { return };
    // Definitions that are there already, of whoever's making, become the chart's.
    world.install("install", "carry-on", &["--take-ownership", "--force-conflicts"]);
    let space = &format!("carry-on-test-{}", std::process::id());
    world.cluster.kubectl(&["create", "namespace", space]);
    world.cluster.kubectl(&["label", "namespace", space, "pod-security.kubernetes.io/enforce=restricted"]);
    let [train, eval] = ["train.jsonl", "eval.jsonl"].map(|file| format!("--from-file={}", world.data().join(file).display()));
    world.cluster.kubectl(&["--namespace", space, "create", "configmap", "quickstart-data", &train, &eval]);
    world.cluster.apply(space, OUTPUT);

    world.cluster.apply(space, &replaced(&pool("none.gguf"), "name: smollm2", "name: amiss"));
    world.wait("a file that the image lacks is named", || {
        let (_, message) = world.condition(space, "bmp/amiss", "Ready");
        message.contains("container model of pod amiss-pool-0 ended with exit code 1")
            && message.contains("cannot stat '/models/none.gguf'")
    });
    world.cluster.kubectl(&["--namespace", space, "delete", "bmp", "amiss"]);

    let data = ("persistentVolumeClaim:\n        claimName: quickstart-data", "configMap:\n        name: quickstart-data");
    world.cluster.apply(space, &pool(&model().file_name().unwrap().to_string_lossy()));
    world.cluster.apply(space, &replaced(&short_job("quickstart", 8), data.0, data.1));
    world.cluster.apply(space, &example("quickstart/deployment.yaml"));
    world.wait("it is served", || {
        let deployment: CarryOnDeployment = world.get(space, "quickstart");
        is_true(&deployment.status.unwrap_or_default().conditions, "Ready")
    });
    let pool: BaseModelPool = world.get(space, "smollm2");
    let (model, artifact) = (pool.status.unwrap().model.unwrap(), world.job(space).status.unwrap().artifact.unwrap());
    assert_eq!(artifact.base_model_digest, model.identity_digest);
    let asked = json!({ "model": "quickstart", "prompt": "Tom has 3 apples and buys 4 more.", "max_tokens": 8, "temperature": 0 });
    let path = format!("/api/v1/namespaces/{space}/services/quickstart-gateway:http/proxy/v1/completions");
    let answer: Value = world.until("an answer", || {
        let request = Request::post(&path).header("content-type", "application/json").body(asked.to_string().into_bytes()).unwrap();
        world.cluster.block_on(world.cluster.client().request(request))
    });
    assert_eq!(answer["usage"]["completion_tokens"], 8, "{answer}");

    world.cluster.kubectl(&["delete", "namespace", space]);
    let uninstalled = world.helm(&["uninstall", "carry-on", "--wait", "--timeout=120s"]);
    assert!(uninstalled.status.success(), "{}", String::from_utf8_lossy(&uninstalled.stderr));
    world.cluster.kubectl(&["delete", "namespace", HOME]);
}
