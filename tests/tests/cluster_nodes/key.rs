//! A deployment whose API key changes while its gateway serves.

use carryon_crds::CarryOnDeployment;
use carryon_tests::example;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::ResourceExt as _;
use serde_json::json;

use super::world::{World, replaced};

const NAME: &str = "locked";

/// A gateway that asks for a key, in a namespace where the quick start's head is.
pub struct Locked<'a> {
    world: &'a World,
    space: &'a str,
    url: String,
    gateway: Pod,
}

impl<'a> Locked<'a> {
    /// Serves with the first key, which is the second one in its Secret from then on. None where an API server is between us and the gateway: it
    /// keeps keys to itself.
    pub fn start(world: &'a World, space: &'a str) -> Option<Self> {
        if !world.cluster.may("a key that is rotated: it is sent through the API server, which takes it for its own") {
            return None;
        }
        world.cluster.kubectl(&["--namespace", space, "create", "secret", "generic", NAME, "--from-literal=key=first\n"]);
        let deployment =
            replaced(&example("quickstart/deployment.yaml"), "metadata:\n  name: quickstart", &format!("metadata:\n  name: {NAME}"));
        world.apply(space, &(deployment + &format!("  api:\n    keys: [{{name: one, secretRef: {{name: {NAME}, key: key}}}}]\n")));
        let url = world.until_serves(space, NAME);
        let locked = Self { world, space, url, gateway: gateway(world, space) };
        world.wait("the first key is taken", || locked.status("first") == 200);
        assert_eq!(locked.status("second"), 401);
        // The operator may not read Secrets: the gateway says what its key looks like.
        let ready = || world.condition(space, &format!("cod/{NAME}"), "Ready").1;
        world.wait("what there is to say of it", || ready().contains("the white space around \"key\""));
        world.patch::<Secret>(space, NAME, json!({ "stringData": { "key": "second" } }));
        Some(locked)
    }

    /// The kubelet has renewed the file; the gateway is the same, and was not restarted.
    pub fn until_rotated(self) {
        self.world.wait("the second key is taken", || self.status("second") == 200);
        assert_eq!(self.status("first"), 401);
        let now = gateway(self.world, self.space);
        assert_eq!((now.uid(), restarts(&now)), (self.gateway.uid(), restarts(&self.gateway)));
        self.world.delete::<CarryOnDeployment>(self.space, NAME);
        self.world.wait("its gateway is gone", || self.world.pods(self.space, "gateway").len() == 1);
    }

    /// Status of the answer to a client with this key; 0 when there is none.
    fn status(&self, key: &str) -> u16 {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let models = client.get(format!("{}/models", self.url)).bearer_auth(key);
        self.world.cluster.block_on(models.send()).map_or(0, |answer| answer.status().as_u16())
    }
}

fn gateway(world: &World, space: &str) -> Pod {
    let is_ours = |pod: &Pod| pod.labels().get("app.kubernetes.io/instance").is_some_and(|of| of == NAME);
    world.pods(space, "gateway").into_iter().find(is_ours).unwrap()
}

fn restarts(pod: &Pod) -> i32 {
    pod.status.as_ref().unwrap().container_statuses.as_ref().unwrap()[0].restart_count
}
