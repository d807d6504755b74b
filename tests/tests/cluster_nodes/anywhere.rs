//! The quick start on any cluster, reached by nothing but its API server: the model from an image, the data from a ConfigMap,
//! the output on whatever volume the cluster has.

use carryon_crds::BaseModelPool;
use carryon_tests::{example, model};
use http::Request;
use serde_json::{Value, json};

use super::world::{World, replaced, short_job, without_claims};

#[test]
#[ignore = "takes minutes: make test-all"]
fn any_cluster_with_the_images_trains_and_serves() {
    let Some(world) = World::anywhere() else { return };
    world.install("install", "carry-on", &[]);
    world.test("carry-on");
    let space = &world.volumes("quickstart");
    let file = format!("path: models/{}", model().file_name().unwrap().display());
    let amiss = replaced(&without_claims(&example("quickstart/pool.yaml")), &file, "path: models/none.gguf");
    world.apply(space, &replaced(&amiss, "name: smollm2", "name: amiss"));
    world.wait("a file that the image lacks is named", || {
        let (_, message) = world.condition(space, "bmp/amiss", "Ready");
        message.contains("container model of pod amiss-pool-0 ended with exit code 1")
            && message.contains("cannot stat '/models/none.gguf'")
    });
    world.cluster.kubectl(&["--namespace", space, "delete", "bmp", "amiss"]);

    world.apply(space, &example("quickstart/pool.yaml"));
    world.apply(space, &short_job("quickstart", 8));
    world.apply(space, &example("quickstart/deployment.yaml"));
    let url = world.until_served(space);
    let pool: BaseModelPool = world.get(space, "smollm2");
    let (model, artifact) = (pool.status.unwrap().model.unwrap(), world.job(space).status.unwrap().artifact.unwrap());
    assert_eq!(artifact.base_model_digest, model.identity_digest);
    world.until_answered(&url);
    let asked = json!({ "model": "quickstart", "prompt": "Tom has 3 apples and buys 4 more.", "max_tokens": 8, "temperature": 0 });
    let path = format!("/api/v1/namespaces/{space}/services/quickstart-gateway:http/proxy/v1/completions");
    let request = Request::post(path).header("content-type", "application/json").body(asked.to_string().into_bytes()).unwrap();
    let answer: Value = world.cluster.block_on(world.cluster.client().request(request)).unwrap();
    assert_eq!(answer["usage"]["completion_tokens"], 8, "{answer}");

    let uninstalled = world.helm(&["uninstall", "carry-on", "--wait", "--timeout=120s"]);
    assert!(uninstalled.status.success(), "{}", String::from_utf8_lossy(&uninstalled.stderr));
}
