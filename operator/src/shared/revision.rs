//! What an object's pods were rendered as. It stands until the object's spec says otherwise or its owner asks for today's, so that an upgrade of
//! the operator rolls nothing: a template and a configuration belong to one build and one image, and another build may know a default, an
//! argument or a probe more.
//!
//! It is kept as a ControllerRevision, not in the pods' ConfigMap: what pods are made of must not be for everybody to write who may write
//! ConfigMaps. Its name says its content, which never changes; an annotation says what it was rendered from. So an edit that shapes no pod
//! rolls none. Its labels are not those of the pods: a StatefulSet takes any ControllerRevision without a controller that its selector finds.

use std::collections::BTreeMap;

use carryon_crds::{names, wire};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{ConfigMap, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use kube::{Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::meta::Owner;

/// Member of a ControllerRevision's data. One text takes a fraction of the memory that its members would.
const PODS: &str = "pods";
/// Characters of the digest in a name.
const DIGEST: usize = 10;

/// What pods are rendered from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Source<S> {
    /// The spec, or as much of it as shapes pods.
    pub spec: S,
    /// Value of the annotation by which today's rendering is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<String>,
}

impl<S> Source<S> {
    /// What the pods of `object` are rendered from, with `spec` for its spec.
    pub fn of<K: Resource>(object: &K, spec: S) -> Self {
        Self { spec, upgrade: object.annotations().get(names::UPGRADE_ANNOTATION).cloned() }
    }
}

/// A template and the configuration that its pods read.
#[derive(Clone, Debug, PartialEq)]
pub struct Revision {
    /// Of the ControllerRevision and of the ConfigMap.
    name: String,
    /// The [`Source`] as it was written down.
    source: String,
    /// [`Pods`] as they were written down.
    text: String,
    pods: Pods,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Pods {
    config: String,
    template: PodTemplateSpec,
}

/// Whether what was rendered before stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Rendering {
    source: String,
    standing: Option<Revision>,
}

impl Rendering {
    /// Looks for `source` among the `revisions` that were kept. What another build has written is read as today's types read it: a field that
    /// is new has its default.
    pub fn of<S: Serialize + DeserializeOwned + PartialEq>(source: &Source<S>, revisions: &[ControllerRevision]) -> Self {
        let same = |kept: &str| serde_json::from_str::<Source<S>>(kept).is_ok_and(|kept| kept == *source);
        let standing = revisions.iter().filter_map(Revision::read).find(|revision| same(&revision.source));
        Self { source: serde_json::to_string(source).expect("a spec is JSON"), standing }
    }

    /// The worker image that the pods were rendered with; none when they are to be rendered today.
    pub fn image(&self) -> Option<String> {
        self.standing.as_ref()?.pods.template.spec.as_ref()?.containers.first()?.image.clone()
    }

    /// What was rendered before, or today's `template` with this configuration, for the child called `child`.
    pub fn revision<C: Serialize>(&self, child: &str, config: &C, template: impl FnOnce() -> PodTemplateSpec) -> Revision {
        self.standing.clone().unwrap_or_else(|| {
            let config = serde_json::to_string_pretty(config).expect("a worker configuration is JSON");
            Revision::new(child, self.source.clone(), Pods { config, template: template() })
        })
    }
}

impl Revision {
    fn new(child: &str, source: String, pods: Pods) -> Self {
        let text = serde_json::to_string(&pods).expect("a template is JSON");
        let digest = wire::digest(text.as_bytes());
        let name = format!("{child}-{}", digest.trim_start_matches("sha256:").chars().take(DIGEST).collect::<String>());
        Self { name, source, text, pods }
    }

    fn read(kept: &ControllerRevision) -> Option<Self> {
        let text = kept.data.as_ref()?.0.get(PODS)?.as_str()?.to_owned();
        let source = kept.annotations().get(names::RENDERED_FROM_ANNOTATION)?.clone();
        Some(Self { name: kept.name_any(), source, pods: serde_json::from_str(&text).ok()?, text })
    }

    /// The ControllerRevision that keeps it.
    pub fn kept(&self, owner: &Owner, child: &str) -> ControllerRevision {
        let mut metadata = owner.meta(&self.name);
        metadata.labels = Some(names::labels(names::REVISION, child));
        metadata.annotations = Some(BTreeMap::from([(names::RENDERED_FROM_ANNOTATION.to_owned(), self.source.clone())]));
        ControllerRevision { metadata, data: Some(RawExtension(json!({ PODS: self.text }))), revision: 1 }
    }

    /// The ConfigMap that its pods read, and none but its: one that is replaced while they roll out would find the others' otherwise.
    pub fn config_map(&self, owner: &Owner) -> ConfigMap {
        let data = BTreeMap::from([(names::CONFIG_FILE.to_owned(), self.pods.config.clone())]);
        ConfigMap { metadata: owner.meta(&self.name), data: Some(data), immutable: Some(true), ..ConfigMap::default() }
    }

    /// The pods' template, which names the ConfigMap.
    pub fn template(&self) -> PodTemplateSpec {
        let mut template = self.pods.template.clone();
        let annotations = template.metadata.get_or_insert_default().annotations.get_or_insert_default();
        annotations.insert(names::CONFIG_DIGEST_ANNOTATION.to_owned(), wire::digest(self.text.as_bytes()));
        let volumes = template.spec.iter_mut().flat_map(|spec| spec.volumes.iter_mut().flatten());
        let mut config = volumes.filter(|volume| volume.name == names::CONFIG_VOLUME).filter_map(|volume| volume.config_map.as_mut());
        config.next().into_iter().for_each(|config| config.name.clone_from(&self.name));
        template
    }
}

/// The revision that pods of `template` are of.
pub fn name_in(template: &PodTemplateSpec) -> Option<&str> {
    let volume = template.spec.as_ref()?.volumes.iter().flatten().find(|volume| volume.name == names::CONFIG_VOLUME)?;
    volume.config_map.as_ref().map(|config| config.name.as_str())
}
