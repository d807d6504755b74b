//! Whether a pool's pods ask for a GPU, and what follows: their image, and where keys and values lie.

use carryon_crds::BaseModelPoolSpec;
use carryon_crds::pool::Device;
use carryon_crds::quantity::Bytes;

use crate::shared::{Refusal, Settings, gpu};

/// The field by which the pods ask for a CUDA device; none when they compute on the CPU.
pub fn asked_by(spec: &BaseModelPoolSpec) -> Option<String> {
    match spec.engine.device {
        Device::Cpu => None,
        Device::Cuda(_) => Some("spec.engine.device".to_owned()),
        Device::Auto => gpu::asked_by(&spec.server, "spec.server"),
    }
}

/// Today's image for pods that name none.
///
/// # Errors
/// They ask for a GPU, and the operator has no image that could use it.
pub fn image(spec: &BaseModelPoolSpec, settings: &Settings) -> Result<String, Refusal> {
    gpu::image(asked_by(spec), &spec.server, "spec.server", "set spec.engine.device to cpu", settings)
}

/// Where the CPU computes, keys and values lie in the pod's memory, beside the weights.
///
/// # Errors
/// There is no room for them.
pub fn room(spec: &BaseModelPoolSpec) -> Result<(), Refusal> {
    let limit = spec.server.resources.limits.get("memory").and_then(|limit| Bytes::read(&limit.0));
    let both = spec.engine.kv_cache_memory.zip(limit).filter(|_| asked_by(spec).is_none());
    both.filter(|(wanted, limit)| wanted >= limit).map_or(Ok(()), |(wanted, limit)| {
        let message =
            format!("spec.engine.kvCacheMemory: {wanted} and the weights do not fit into spec.server.resources.limits.memory: {limit}");
        Err(Refusal::permanent("KvCacheTooLarge", message))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(engine: Value, server: Value) -> BaseModelPoolSpec {
        let source = json!({ "persistentVolumeClaim": { "claimName": "models" } });
        serde_json::from_value(json!({ "model": { "source": source }, "engine": engine, "server": server })).unwrap()
    }

    #[test]
    fn a_gpu_is_asked_for_by_resource_claim_or_device() {
        let limit = |name: &str, count: Value| json!({ "resources": { "limits": { name: count } } });
        let limits = |name: &str| Some(format!("spec.server.resources.limits[{name}]"));
        let requests = json!({ "resources": { "requests": { "nvidia.com/gpu": "1" } } });
        let claims = json!({ "scheduling": { "resourceClaims": [{ "name": "card", "resourceClaimTemplateName": "h100" }] } });
        let (auto, device) = (json!({}), Some("spec.engine.device".to_owned()));
        for (engine, server, field) in [
            (&auto, json!({}), None),
            (&auto, limit("memory", json!("8Gi")), None),
            (&auto, limit("nvidia.com/gpu", json!(1)), limits("nvidia.com/gpu")),
            (&auto, limit("nvidia.com/gpu", json!(0)), None),
            (&auto, limit("nvidia.com/gpu.shared", json!(1)), limits("nvidia.com/gpu.shared")),
            (&auto, limit("nvidia.com/mig-1g.10gb", json!(1)), limits("nvidia.com/mig-1g.10gb")),
            (&auto, limit("aliyun.com/gpu-mem", json!(8)), limits("aliyun.com/gpu-mem")),
            (&auto, limit("amd.com/gpu", json!(1)), None),
            (&auto, limit("gpu.intel.com/i915", json!(1)), None),
            (&auto, limit("example.org/mig-1g.10gb", json!(1)), None),
            (&auto, requests, Some("spec.server.resources.requests[nvidia.com/gpu]".to_owned())),
            (&auto, claims.clone(), Some("spec.server.scheduling.resourceClaims[card]".to_owned())),
            (&json!({ "device": "cpu" }), claims, None),
            (&json!({ "device": "cpu" }), limit("nvidia.com/gpu", json!(1)), None),
            (&json!({ "device": "cuda" }), json!({}), device.clone()),
            (&json!({ "device": "cuda:1" }), limit("nvidia.com/gpu", json!(2)), device),
        ] {
            assert_eq!(asked_by(&spec(engine.clone(), server.clone())), field, "{engine} {server}");
        }
    }

    #[test]
    fn keys_and_values_have_to_leave_room_where_the_weights_are() {
        let memory = |gpus: u8| json!({ "resources": { "limits": { "memory": "4Gi", "nvidia.com/gpu": gpus } } });
        let keys = |device: &str, bytes: &str| json!({ "device": device, "kvCacheMemory": bytes });
        let refused = |engine: Value, server: Value| room(&spec(engine, server)).err().map(|refusal| refusal.message);
        let says = |wanted: &str| {
            Some(format!("spec.engine.kvCacheMemory: {wanted} and the weights do not fit into spec.server.resources.limits.memory: 4Gi"))
        };
        assert_eq!(refused(keys("auto", "4Gi"), memory(0)), says("4Gi"));
        assert_eq!(refused(keys("cpu", "6144Mi"), memory(1)), says("6Gi"));
        assert_eq!(refused(keys("auto", "4095Mi"), memory(0)), None);
        assert_eq!(refused(keys("auto", "60Gi"), memory(1)), None, "they lie in the device's memory");
        assert_eq!(refused(keys("cuda", "60Gi"), memory(0)), None);
        assert_eq!(refused(keys("cpu", "60Gi"), json!({})), None, "the worker knows its node");
    }
}
