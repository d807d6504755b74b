//! How a pool's pods come to their model: what is mounted where, and what has to be done before the worker starts.

use carryon_crds::common::ClaimPath;
use carryon_crds::names;
use carryon_crds::pool::{
    CaBundle, HuggingFaceSource, ImageMount, KeyReference, ModelCache, ModelImage, ModelReference, ObjectStoreSource,
};
use carryon_crds::wire::is_commit;
use k8s_openapi::api::core::v1::{ConfigMapKeySelector, EnvFromSource, EnvVar, EnvVarSource, SecretEnvSource, SecretKeySelector};

use crate::shared::pods::{Before, Mount, MountSource, inside};

/// Volume that the worker finds its model in.
const MODEL: &str = "model";
/// Volume with the authorities that a source is trusted by.
const CA: &str = "model-ca";

/// Where the weights are.
#[derive(Clone, Debug, PartialEq)]
pub enum Model {
    /// In a claim that exists.
    Claim(ClaimPath),
    /// In an image.
    Image(ModelImage),
    /// Elsewhere: they are fetched before the worker starts.
    Fetched(Box<Fetched>),
}

/// A model that is fetched.
#[derive(Clone, Debug, PartialEq)]
pub struct Fetched {
    from: From,
    cache: ModelCache,
    ca_bundle: Option<CaBundle>,
    text_only: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum From {
    Hub(HuggingFaceSource),
    Store(ObjectStoreSource),
}

impl Fetched {
    /// Of a model whose source is one of those that are fetched.
    pub fn of(model: &ModelReference) -> Option<Self> {
        let hub = model.source.hugging_face.clone().map(From::Hub);
        let from = hub.or_else(|| model.source.object_store.clone().map(From::Store))?;
        Some(Self { from, cache: model.cache.clone().unwrap_or_default(), ca_bundle: model.ca_bundle.clone(), text_only: model.text_only })
    }

    /// Whether what is asked for may be another thing tomorrow, until it is resolved to a commit.
    pub fn moves(&self) -> bool {
        matches!(&self.from, From::Hub(hub) if !is_commit(&hub.revision))
    }

    /// What the model is called in the pod: the last part of the repository's name, or of the address.
    fn name(&self) -> &str {
        let whole = match &self.from {
            From::Hub(hub) => &hub.repository,
            From::Store(store) => store.url.split(['?', '#']).next().unwrap_or_default(),
        };
        let last = whole.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
        let plain = |name: &&str| !matches!(*name, "" | "." | "..") && name.len() <= 200;
        Some(last).filter(plain).unwrap_or("model")
    }

    fn before(&self, pool: &str) -> Before {
        let mut args = vec!["fetch".to_owned()];
        let mut argument = |name: &str, value: &str| args.push(format!("{name}={value}"));
        match &self.from {
            From::Hub(hub) => {
                argument("--hugging-face", &hub.repository);
                argument("--revision", &hub.revision);
                hub.endpoint.iter().for_each(|endpoint| argument("--endpoint", endpoint));
                hub.files.iter().for_each(|pattern| argument("--files", pattern));
            }
            From::Store(store) => argument("--url", &store.url),
        }
        if self.text_only {
            args.push("--text-only".to_owned());
        }
        let path = self.cache.persistent_volume_claim.as_ref().and_then(|claim| claim.path.as_deref());
        let mut place = |name: &str, value: String| args.extend([name.to_owned(), value]);
        place("--cache", inside(names::CACHE_DIR, path));
        place("--link", inside(names::MODEL_DIR, Some(self.name())));
        let ca = self.ca_bundle.as_ref().and_then(authorities);
        ca.iter().for_each(|(key, _)| place("--ca-bundle", inside(names::CA_DIR, Some(key))));
        place("--listen", format!("0.0.0.0:{}", names::POOL_PORT));
        place("--termination-log", names::TERMINATION_LOG.to_owned());
        let (env, env_from) = self.credentials(pool);
        Before {
            name: names::FETCH,
            image: None,
            command: vec![names::WORKER.to_owned()],
            args,
            env,
            env_from,
            port: Some(names::POOL_PORT),
            writes: &[names::CACHE_VOLUME, MODEL],
            mounts: ca
                .map(|(_, source)| Mount { name: CA.into(), path: names::CA_DIR.into(), source, read_only: true })
                .into_iter()
                .collect(),
        }
    }

    fn credentials(&self, pool: &str) -> (Vec<EnvVar>, Vec<EnvFromSource>) {
        let variable = |name: &str, source: EnvVarSource| EnvVar { name: name.to_owned(), value: None, value_from: Some(source) };
        match &self.from {
            From::Hub(hub) => {
                // It is there once the first pod has resolved the revision.
                let commit =
                    ConfigMapKeySelector { name: names::pool_commit(pool), key: names::COMMIT_KEY.to_owned(), optional: Some(true) };
                let commit = EnvVarSource { config_map_key_ref: Some(commit), ..EnvVarSource::default() };
                let token = hub.token_secret_ref.clone().map(|secret| {
                    let key = SecretKeySelector { name: secret.name, key: secret.key, optional: None };
                    variable("HF_TOKEN", EnvVarSource { secret_key_ref: Some(key), ..EnvVarSource::default() })
                });
                ([variable(names::MODEL_COMMIT, commit)].into_iter().chain(token).collect(), Vec::new())
            }
            From::Store(store) => {
                let secret = |name: String| SecretEnvSource { name, optional: None };
                let all = store
                    .secret_ref
                    .clone()
                    .map(|reference| EnvFromSource { secret_ref: Some(secret(reference.name)), ..EnvFromSource::default() });
                (Vec::new(), all.into_iter().collect())
            }
        }
    }

    fn volume(&self) -> MountSource {
        match &self.cache {
            ModelCache { persistent_volume_claim: Some(claim), .. } => MountSource::Claim(claim.claim_name.clone()),
            ModelCache { host_path: Some(folder), .. } => MountSource::HostPath(folder.path.clone()),
            ModelCache { empty_dir, .. } => MountSource::Empty(empty_dir.as_ref().and_then(|storage| storage.size_limit)),
        }
    }
}

/// File and source of the authorities.
fn authorities(bundle: &CaBundle) -> Option<(String, MountSource)> {
    let file = |key: &KeyReference| key.key.clone();
    let map = bundle.config_map_key_ref.as_ref().map(|key| (file(key), MountSource::ConfigMapKey(key.clone())));
    map.or_else(|| {
        let KeyReference { name, key } = bundle.secret_key_ref.clone()?;
        Some((key.clone(), MountSource::Secret(carryon_crds::deployment::SecretKey { name, key })))
    })
}

/// What a pod has of its model.
pub struct Rendered {
    /// Volumes of the worker.
    pub mounts: Vec<Mount>,
    /// Path of the model in its container.
    pub path: String,
    /// What comes before it.
    pub before: Option<Before>,
}

/// What the pods of the pool called `pool` have of `model`.
pub fn render(model: &Model, pool: &str) -> Rendered {
    let mount = |source| Mount { name: MODEL.into(), path: names::MODEL_DIR.into(), source, read_only: true };
    match model {
        Model::Claim(claim) => Rendered {
            mounts: vec![mount(MountSource::Claim(claim.claim_name.clone()))],
            path: inside(names::MODEL_DIR, claim.path.as_deref()),
            before: None,
        },
        Model::Image(ModelImage { reference, path, mount: ImageMount::Volume }) => Rendered {
            mounts: vec![mount(MountSource::Image(reference.clone()))],
            path: inside(names::MODEL_DIR, Some(path)),
            before: None,
        },
        Model::Image(ModelImage { reference, path, mount: ImageMount::Copy }) => Rendered {
            mounts: vec![mount(MountSource::Empty(None))],
            path: inside(names::MODEL_DIR, path.trim_matches('/').rsplit('/').next()),
            before: Some(copy(reference, path)),
        },
        Model::Fetched(fetched) => Rendered {
            // The second one holds a link into the first: which folder it is, the fetch knows.
            mounts: vec![
                Mount { name: names::CACHE_VOLUME.into(), path: names::CACHE_DIR.into(), source: fetched.volume(), read_only: true },
                mount(MountSource::Empty(None)),
            ],
            path: inside(names::MODEL_DIR, Some(fetched.name())),
            before: Some(fetched.before(pool)),
        },
    }
}

fn copy(reference: &str, path: &str) -> Before {
    Before {
        name: MODEL,
        image: Some(reference.to_owned()),
        // -f: a copy that was cut off is replaced.
        command: ["cp", "-Rf", &inside("", Some(path)), names::MODEL_DIR].map(str::to_owned).into(),
        args: Vec::new(),
        env: Vec::new(),
        env_from: Vec::new(),
        port: None,
        writes: &[MODEL],
        mounts: Vec::new(),
    }
}
