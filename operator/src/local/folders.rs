//! The state directory: which folder is which volume, where logs and configuration go.
//!
//! ```text
//! objects/      stored objects            incoming/   objects handed to a running supervisor
//! volumes/      one folder or link a claim            logs/     one file a pod
//! configmaps/   one folder a ConfigMap                secrets/  one folder a Secret
//! models/       models that were fetched
//! pods/         working folder, /tmp and last words of each pod
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;

use super::store::{Store, scoped, write_atomic};
use crate::shared::meta::namespace;

/// The state directory.
#[derive(Clone, Debug)]
pub struct Folders {
    /// Its absolute path.
    pub root: PathBuf,
}

impl Folders {
    /// Makes the directory and its folders.
    pub fn create(root: &Path) -> io::Result<Self> {
        for folder in ["objects", "incoming", "volumes", "logs", "configmaps", "secrets", "pods"] {
            fs::create_dir_all(root.join(folder))?;
        }
        Ok(Self { root: fs::canonicalize(root)? })
    }

    /// Folder of a claim.
    pub fn claim(&self, namespace: &str, name: &str) -> PathBuf {
        self.root.join("volumes").join(scoped(namespace, name))
    }

    /// Folder of a ConfigMap's keys.
    pub fn config_map(&self, namespace: &str, name: &str) -> PathBuf {
        self.root.join("configmaps").join(scoped(namespace, name))
    }

    /// Folder of a Secret's keys.
    pub fn secret(&self, namespace: &str, name: &str) -> PathBuf {
        self.root.join("secrets").join(scoped(namespace, name))
    }

    /// Folder of models that were fetched, for pools that name no other cache.
    pub fn models(&self) -> PathBuf {
        self.root.join("models")
    }

    /// Log of a pod's container.
    pub fn log(&self, namespace: &str, pod: &str) -> PathBuf {
        self.root.join("logs").join(format!("{}.log", scoped(namespace, pod)))
    }

    /// Working folder of a pod.
    pub fn pod(&self, namespace: &str, pod: &str) -> PathBuf {
        self.root.join("pods").join(scoped(namespace, pod))
    }

    /// Makes `claim` a link to `folder`, which must exist.
    ///
    /// # Errors
    /// When the folder does not exist, or the claim already has another one.
    pub fn link(&self, claim: &str, folder: &Path) -> io::Result<()> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("--volume {claim}={}: {error}", folder.display()));
        let target = fs::canonicalize(folder).map_err(named)?;
        let link = self.claim("default", claim);
        match fs::read_link(&link) {
            Ok(old) if old == target => return Ok(()),
            Ok(_) => fs::remove_file(&link).map_err(named)?,
            Err(_) => {}
        }
        symlink(&target, &link).map_err(named)
    }

    /// Gives every stored claim its folder, and every folder its claim: both stand for the user's volume.
    pub fn bind_claims(&self, store: &mut Store, now: &Time) -> io::Result<()> {
        for claim in store.list::<PersistentVolumeClaim>() {
            let folder = self.claim(&namespace(&claim), &claim.name_any());
            if !folder.exists() {
                fs::create_dir_all(folder)?;
            }
        }
        for entry in fs::read_dir(self.root.join("volumes"))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let (name, namespace) = name.split_once('@').unwrap_or((&name, "default"));
            if store.get::<PersistentVolumeClaim>(namespace, name).is_none() {
                let mut claim = PersistentVolumeClaim::default();
                claim.metadata.name = Some(name.to_owned());
                claim.metadata.namespace = Some(namespace.to_owned());
                store.apply(&claim, now)?;
            }
        }
        Ok(())
    }

    /// Writes a ConfigMap's keys as files.
    pub fn write_config_map(&self, config_map: &ConfigMap) -> io::Result<()> {
        let text = config_map.data.iter().flatten().map(|(key, text)| (key, text.as_bytes()));
        let bytes = config_map.binary_data.iter().flatten().map(|(key, bytes)| (key, &*bytes.0));
        write_keys(&self.config_map(&namespace(config_map), &config_map.name_any()), text.chain(bytes))
    }

    /// Writes a Secret's keys as files; a process that reads one sees that it has changed, as in a pod.
    pub fn write_secret(&self, secret: &Secret) -> io::Result<()> {
        let bytes = secret.data.iter().flatten().map(|(key, bytes)| (key, &*bytes.0));
        write_keys(&self.secret(&namespace(secret), &secret.name_any()), bytes)
    }
}

/// Makes `folder` hold exactly these files.
fn write_keys<'a>(folder: &Path, files: impl Iterator<Item = (&'a String, &'a [u8])>) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut left: BTreeSet<PathBuf> = fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    for (key, bytes) in files {
        let path = folder.join(key);
        if fs::read(&path).ok().as_deref() != Some(bytes) {
            write_atomic(&path, bytes)?;
        }
        left.remove(&path);
    }
    left.into_iter().try_for_each(fs::remove_file)
}
