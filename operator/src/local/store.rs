//! The objects of local mode: one JSON file each under `objects/`, so that they outlive the supervisor and other commands can read them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Secret, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::shared::meta::namespace;

/// What can be stored: every Kubernetes type.
pub trait Object: Resource<DynamicType = ()> + Serialize + DeserializeOwned + Clone {}
impl<K: Resource<DynamicType = ()> + Serialize + DeserializeOwned + Clone> Object for K {}

/// Names one object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Kind, e.g. `Pod`; kinds of local mode have different names in all groups.
    pub kind: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl Key {
    /// Key of an object of type `K`.
    pub fn of<K: Object>(namespace: &str, name: &str) -> Self {
        Self { kind: K::kind(&()).into_owned(), namespace: namespace.to_owned(), name: name.to_owned() }
    }

    /// Key of a value with kind, metadata.namespace (`default` when absent) and metadata.name.
    pub fn of_value(value: &Value) -> Self {
        let text = |value: &Value, default: &str| value.as_str().unwrap_or(default).to_owned();
        Self {
            kind: text(&value["kind"], ""),
            namespace: text(&value["metadata"]["namespace"], "default"),
            name: text(&value["metadata"]["name"], ""),
        }
    }

    fn file(&self) -> String {
        format!("{}.{}.{}.json", self.kind, self.namespace, self.name)
    }

    /// What is kept in a file of this name; only names hold dots.
    fn of_file(path: &Path) -> Option<Self> {
        let mut parts = path.file_stem()?.to_str()?.splitn(3, '.').map(str::to_owned);
        Some(Self { kind: parts.next()?, namespace: parts.next()?, name: parts.next()? })
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.kind, scoped(&self.namespace, &self.name))
    }
}

/// `NAME` in namespace `default`, `NAME@NAMESPACE` in others: one file name for both.
pub fn scoped(namespace: &str, name: &str) -> String {
    if namespace == "default" { name.to_owned() } else { format!("{name}@{namespace}") }
}

/// All objects, in memory and on disk.
pub struct Store {
    folder: PathBuf,
    objects: BTreeMap<Key, Value>,
    damaged: BTreeMap<Key, String>,
}

impl Store {
    /// Reads the objects below `state_dir`. One that is damaged is set apart; the others go on.
    ///
    /// # Errors
    /// When the folder cannot be made or read.
    pub fn open(state_dir: &Path) -> io::Result<Self> {
        let folder = state_dir.join("objects");
        fs::create_dir_all(&folder)?;
        let mut store = Self { folder, objects: BTreeMap::new(), damaged: BTreeMap::new() };
        for (path, read) in read_folder(&store.folder)? {
            let Some(key) = Key::of_file(&path) else { continue };
            match read.and_then(|value| whole(&key, value)) {
                Ok(value) => drop(store.objects.insert(key, value)),
                Err(problem) => drop(store.damaged.insert(key, format!("{} is damaged: {problem}", path.display()))),
            }
        }
        Ok(store)
    }

    /// What is wrong with stored objects that cannot be read. What is made from another object is made anew; what a user has applied, when it
    /// is applied again.
    pub fn damaged(&self) -> &BTreeMap<Key, String> {
        &self.damaged
    }

    /// The object, when it exists.
    pub fn get<K: Object>(&self, namespace: &str, name: &str) -> Option<K> {
        decode(self.objects.get(&Key::of::<K>(namespace, name))?)
    }

    /// The object as JSON.
    pub fn value(&self, key: &Key) -> Option<&Value> {
        self.objects.get(key)
    }

    /// All objects of one kind as JSON, by namespace and name.
    pub fn values(&self, kind: &str) -> impl Iterator<Item = &Value> {
        self.objects.iter().filter(move |(key, _)| key.kind == kind).map(|(_, value)| value)
    }

    /// All objects of one kind, by namespace and name.
    pub fn list<K: Object>(&self) -> Vec<K> {
        self.values(&K::kind(&())).filter_map(decode).collect()
    }

    /// Writes `object` as it is.
    pub fn put<K: Object>(&mut self, object: &K) -> io::Result<()> {
        self.put_value(serde_json::to_value(object).map_err(io::Error::other)?)
    }

    /// Writes what an apply of `object` makes of the stored one: server-set metadata and status are kept, a changed spec
    /// is a new generation.
    pub fn apply<K: Object>(&mut self, object: &K, now: &Time) -> io::Result<K> {
        let value = serde_json::to_value(object).map_err(io::Error::other)?;
        self.apply_value(value, now)?;
        self.get(&namespace(object), &object.name_any()).ok_or_else(|| io::Error::other("the object was not stored"))
    }

    /// [`Store::apply`] for an object as JSON.
    pub fn apply_value(&mut self, mut value: Value, now: &Time) -> io::Result<()> {
        let key = Key::of_value(&value);
        value["metadata"]["namespace"] = json!(key.namespace);
        match self.objects.get(&key) {
            Some(old) => {
                let changed = old["spec"] != value["spec"];
                for member in ["uid", "creationTimestamp", "generation", "deletionTimestamp"] {
                    if !old["metadata"][member].is_null() {
                        value["metadata"][member] = old["metadata"][member].clone();
                    }
                }
                if changed {
                    value["metadata"]["generation"] = json!(old["metadata"]["generation"].as_i64().unwrap_or(0) + 1);
                }
                if !old["status"].is_null() {
                    value["status"] = old["status"].clone();
                }
            }
            None => {
                value["metadata"]["uid"] = json!(uid(&key, now));
                value["metadata"]["creationTimestamp"] = json!(now);
                value["metadata"]["generation"] = json!(1);
            }
        }
        self.put_value(value)
    }

    /// Removes an object; nothing happens when it does not exist.
    pub fn remove<K: Object>(&mut self, namespace: &str, name: &str) -> io::Result<()> {
        let key = Key::of::<K>(namespace, name);
        if self.objects.remove(&key).is_some() {
            fs::remove_file(self.folder.join(key.file()))?;
        }
        Ok(())
    }

    fn put_value(&mut self, value: Value) -> io::Result<()> {
        let key = Key::of_value(&value);
        if self.objects.get(&key) != Some(&value) {
            write_json(&self.folder.join(key.file()), &value)?;
            self.damaged.remove(&key);
            self.objects.insert(key, value);
        }
        Ok(())
    }
}

/// The value, when it is the object that the file's name says, and can be decoded.
fn whole(key: &Key, value: Value) -> Result<Value, String> {
    fn check<K: Object>(value: &Value) -> Result<(), String> {
        let is_other = value["kind"] != *K::kind(&());
        if is_other { Ok(()) } else { K::deserialize(value).map(drop).map_err(|error| error.to_string()) }
    }
    if Key::of_value(&value) != *key {
        return Err(format!("it holds {}", Key::of_value(&value)));
    }
    let workloads = [check::<StatefulSet>, check::<Deployment>, check::<Job>, check::<Pod>, check::<Service>, check::<PodDisruptionBudget>];
    let others = [check::<ConfigMap>, check::<Secret>, check::<PersistentVolumeClaim>];
    let ours = [check::<BaseModelPool>, check::<CarryOnJob>, check::<CarryOnDeployment>];
    workloads.iter().chain(&others).chain(&ours).try_for_each(|check| check(&value)).map(|()| value)
}

fn decode<K: Object>(value: &Value) -> Option<K> {
    let decoded = serde_json::from_value(value.clone());
    decoded.inspect_err(|error| tracing::error!(%error, key = %Key::of_value(value), "stored object cannot be decoded")).ok()
}

/// A UUID made of the object's key and the moment of its creation.
fn uid(key: &Key, now: &Time) -> String {
    let digest = carryon_crds::wire::digest(format!("{}{}", key.file(), now.0).as_bytes());
    let hex = digest.trim_start_matches("sha256:");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..32])
}

/// The JSON files of a folder, by name, with their paths: what each holds, or why it cannot be read.
///
/// # Errors
/// When the folder itself cannot be read.
pub fn read_folder(folder: &Path) -> io::Result<Vec<(PathBuf, Result<Value, String>)>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    paths.sort();
    let read = |path: &Path| {
        let bytes = fs::read(path).map_err(|error| error.to_string())?;
        serde_json::from_slice(&bytes).map_err(|error| error.to_string())
    };
    Ok(paths
        .into_iter()
        .map(|path| {
            let read = read(&path);
            (path, read)
        })
        .collect())
}

/// Writes JSON for the owner's eyes only (Secrets are among the objects): a temporary file, synced and renamed.
pub fn write_json(path: &Path, value: &Value) -> io::Result<()> {
    write_atomic(path, serde_json::to_string_pretty(value).map_err(io::Error::other)?.as_bytes())
}

/// Writes a file through a temporary name in the same folder, synced and renamed; only the owner may read it.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let mut file = fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}
