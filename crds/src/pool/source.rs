//! Where a pool's model comes from, and where it is kept once it was fetched.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::{ClaimPath, LocalReference};
use crate::deployment::SecretKey;
use crate::quantity::Bytes;

/// The model and where its weights are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!has(self.cache) || has(self.source.huggingFace) || has(self.source.objectStore)", "cache is for a model that is fetched: source.huggingFace or source.objectStore"))]
#[x_kube(validation = ("!has(self.caBundle) || has(self.source.huggingFace) || has(self.source.objectStore)", "caBundle is for a model that is fetched: source.huggingFace or source.objectStore"))]
pub struct ModelReference {
    /// Where the weights are.
    pub source: ModelSource,
    /// Run the text part of a model of text and images, such as Gemma 3 from 4B on, and leave the rest of its weights alone. Without it such a
    /// model is refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub text_only: bool,
    /// Where a model that is fetched is kept: it comes once to each node, or once to a volume. An emptyDir of each pod when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<ModelCache>,
    /// Certificate authorities in PEM that the source is trusted by, beside those of the worker's image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_bundle: Option<CaBundle>,
}

impl ModelReference {
    /// The claim that the model lies in or is fetched into, and the field that names it.
    pub fn claim(&self) -> Option<(&ClaimPath, &'static str)> {
        let source = self.source.persistent_volume_claim.as_ref().map(|claim| (claim, "spec.model.source"));
        source.or_else(|| Some((self.cache.as_ref()?.persistent_volume_claim.as_ref()?, "spec.model.cache")))
    }

    /// Whether it is fetched over the network.
    pub fn is_fetched(&self) -> bool {
        self.source.hugging_face.is_some() || self.source.object_store.is_some()
    }
}

/// Where the weights are; exactly one member is set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("(has(self.persistentVolumeClaim) ? 1 : 0) + (has(self.image) ? 1 : 0) + (has(self.huggingFace) ? 1 : 0) + (has(self.objectStore) ? 1 : 0) == 1", "exactly one of huggingFace, objectStore, image, persistentVolumeClaim must be set"))]
pub struct ModelSource {
    /// A repository of a Hugging Face hub, or of a mirror that speaks its protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugging_face: Option<HuggingFaceSource>,
    /// A bucket, or a web server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object_store: Option<ObjectStoreSource>,
    /// A GGUF file, or a folder in the Hugging Face layout (config.json, *.safetensors, tokenizer.json).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimPath>,
    /// The same in an OCI image, pulled with the server's imagePullSecrets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ModelImage>,
}

/// A repository of a hub.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HuggingFaceSource {
    /// `OWNER/NAME`.
    #[schemars(length(min = 3, max = 193), regex(pattern = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,95}$"))]
    pub repository: String,
    /// Branch, tag or commit. It is resolved to a commit once, which the status keeps: a branch that moves on changes no pool.
    #[serde(default = "main_branch")]
    #[schemars(length(min = 1, max = 255))]
    pub revision: String,
    /// Key of a Secret with an access token, for repositories that ask for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret_ref: Option<SecretKey>,
    /// Address of the hub; `HF_ENDPOINT` of the server's environment when absent, and `https://huggingface.co` without that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048), regex(pattern = r"^https?://[^\s/]+(/\S*)?$"))]
    pub endpoint: Option<String>,
    /// Files to fetch instead of those that a model needs: names or patterns, such as `*Q4_K_M.gguf`; `*` stands for no `/`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(min = 1, max = 512)))]
    pub files: Vec<String>,
}

fn main_branch() -> String {
    "main".to_owned()
}

/// A bucket, or a web server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ObjectStoreSource {
    /// `s3://BUCKET/PREFIX`, `gs://…`, `az://CONTAINER/PREFIX`, or `https://…` (a folder ends with `/`): a folder in the Hugging Face layout, or
    /// one GGUF file.
    #[schemars(length(max = 2048), regex(pattern = r"^(s3|gs|az|https)://[^\s/]+(/\S*)?$"))]
    pub url: String,
    /// Secret whose keys are the environment variables that the cloud's own tools take credentials from, such as `AWS_ACCESS_KEY_ID`,
    /// `AWS_ENDPOINT_URL`, `GOOGLE_SERVICE_ACCOUNT_KEY`, `AZURE_STORAGE_ACCOUNT_KEY`. The pod's own identity when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<LocalReference>,
}

/// A model in an OCI image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!(self.path.startsWith('/') || self.path.split('/').exists(p, p == '' || p == '.' || p == '..'))", "path must be relative and plain: no '..', '.' or '//'"))]
pub struct ModelImage {
    /// The image; name it by digest, for a pod that is replaced pulls it anew.
    #[schemars(length(min = 1, max = 512))]
    pub reference: String,
    /// File or folder in the image, from its root.
    #[schemars(length(min = 1, max = 512))]
    pub path: String,
    /// How the files get into the pod.
    #[serde(default)]
    pub mount: ImageMount,
}

/// How the files of an image get into a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ImageMount {
    /// An init container runs the image's own `cp` into the pod's ephemeral storage. Works on every cluster; the default.
    #[default]
    Copy,
    /// The image itself is mounted, without a copy: Kubernetes 1.35 or later (or feature gate ImageVolume), with containerd 2.1, CRI-O 1.31 or later.
    Volume,
}

/// Where a model that was fetched is kept; exactly one member is set. Each model has a folder of its own there, named by source and commit: pools
/// with one model and one volume fetch it once.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("(has(self.emptyDir) ? 1 : 0) + (has(self.persistentVolumeClaim) ? 1 : 0) + (has(self.hostPath) ? 1 : 0) == 1", "exactly one of emptyDir, persistentVolumeClaim, hostPath must be set"))]
pub struct ModelCache {
    /// In each pod: it is fetched anew for a pod that is replaced. In local mode: `models/` in the state directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub empty_dir: Option<EmptyDirCache>,
    /// In a volume, which pods on several nodes can share if it is ReadWriteMany.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimPath>,
    /// In a folder of each node, which must be there and be writable for the pods' user. The restricted Pod Security Standard forbids it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_path: Option<HostPathCache>,
}

/// Storage of a pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EmptyDirCache {
    /// Bytes that it may have; a pod that needs more is evicted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Bytes")]
    pub size_limit: Option<Bytes>,
}

/// A folder of the node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.path.startsWith('/') && !self.path.split('/').exists(p, p == '..')", "path must be absolute and must not contain '..'"))]
pub struct HostPathCache {
    /// Its path.
    #[schemars(length(min = 2, max = 512))]
    pub path: String,
}

/// Where certificate authorities are; exactly one member is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.configMapKeyRef) != has(self.secretKeyRef)", "exactly one of configMapKeyRef, secretKeyRef must be set"))]
pub struct CaBundle {
    /// A key of a ConfigMap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_key_ref: Option<KeyReference>,
    /// A key of a Secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_key_ref: Option<KeyReference>,
}

/// A key of a ConfigMap or Secret of the same namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyReference {
    /// Name of the ConfigMap or Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Key inside it.
    #[serde(default = "ca_certificate")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub key: String,
}

fn ca_certificate() -> String {
    "ca.crt".to_owned()
}
