//! Volumes of a pod, and where its containers find them.

use std::borrow::Cow;

use carryon_crds::deployment::SecretKey;
use carryon_crds::names;
use carryon_crds::pool::KeyReference;
use carryon_crds::quantity::Bytes;
use k8s_openapi::api::core::v1::{
    ConfigMapVolumeSource, EmptyDirVolumeSource, HostPathVolumeSource, ImageVolumeSource, KeyToPath, PersistentVolumeClaimVolumeSource,
    SecretVolumeSource, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Mode of a mounted Secret's files, which are root's: the pod's container may have any UID and group, and nobody else sees them.
const SECRET_MODE: i32 = 0o444;

/// A volume and where it is mounted.
pub struct Mount {
    /// Name of the volume.
    pub name: Cow<'static, str>,
    /// Path in the container.
    pub path: Cow<'static, str>,
    /// Where the files come from.
    pub source: MountSource,
    /// Whether the container may not write.
    pub read_only: bool,
}

/// Where a volume's files come from.
pub enum MountSource {
    /// A PersistentVolumeClaim.
    Claim(String),
    /// A ConfigMap.
    ConfigMap(String),
    /// One key of a Secret: a file of that name, once there is one. Who reads it says so when there is none.
    Secret(SecretKey),
    /// An image.
    Image(String),
    /// One key of a ConfigMap, as of a Secret.
    ConfigMapKey(KeyReference),
    /// A folder of the node.
    HostPath(String),
    /// Nowhere: it is empty at first, and holds so many bytes at most, if that is said.
    Empty(Option<Bytes>),
}

/// `path` inside a volume mounted at `mount`.
pub fn inside(mount: &str, path: Option<&str>) -> String {
    match path.map(|path| path.trim_matches('/')).filter(|path| !path.is_empty()) {
        Some(path) => format!("{mount}/{path}"),
        None => mount.to_owned(),
    }
}

/// The volumes of a pod, with configuration and `/tmp`, and where they are mounted. A kubelet does not mount one claim twice into a pod: two paths of it share the volume.
pub(super) fn volumes(own: &[&Mount]) -> (Vec<Volume>, Vec<VolumeMount>) {
    // The revision of which the template becomes a part knows the name of the ConfigMap.
    let config = MountSource::ConfigMap(String::new());
    let standard = [
        Mount { name: names::CONFIG_VOLUME.into(), path: names::CONFIG_DIR.into(), source: config, read_only: true },
        Mount { name: "tmp".into(), path: "/tmp".into(), source: MountSource::Empty(None), read_only: false },
    ];
    let (mut volumes, mut mounts) = (Vec::<Volume>::new(), Vec::new());
    for Mount { name, path, source, read_only } in standard.iter().chain(own.iter().copied()) {
        let volume = volume(name, source);
        let claim = &volume.persistent_volume_claim;
        let same = volumes.iter().find(|other| claim.is_some() && other.persistent_volume_claim == *claim);
        mounts.push(mount(same.map_or(name, |other| &other.name), path, *read_only));
        if same.is_none() {
            volumes.push(volume);
        }
    }
    (volumes, mounts)
}

pub(super) fn mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount { name: name.to_owned(), mount_path: path.to_owned(), read_only: read_only.then_some(true), ..VolumeMount::default() }
}

fn volume(name: &str, source: &MountSource) -> Volume {
    let name = name.to_owned();
    match source {
        MountSource::Claim(claim) => Volume {
            name,
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource { claim_name: claim.clone(), read_only: None }),
            ..Volume::default()
        },
        MountSource::ConfigMap(config_map) => Volume {
            name,
            config_map: Some(ConfigMapVolumeSource { name: config_map.clone(), ..ConfigMapVolumeSource::default() }),
            ..Volume::default()
        },
        MountSource::Secret(secret) => {
            let key = KeyToPath { key: secret.key.clone(), path: secret.key.clone(), mode: None };
            let (secret_name, default_mode) = (Some(secret.name.clone()), Some(SECRET_MODE));
            let secret = SecretVolumeSource { secret_name, items: Some(vec![key]), default_mode, optional: Some(true) };
            Volume { name, secret: Some(secret), ..Volume::default() }
        }
        MountSource::Image(reference) => {
            let image = ImageVolumeSource { reference: Some(reference.clone()), pull_policy: None };
            Volume { name, image: Some(image), ..Volume::default() }
        }
        MountSource::ConfigMapKey(KeyReference { name: config_map, key }) => {
            let items = Some(vec![KeyToPath { key: key.clone(), path: key.clone(), mode: None }]);
            let source =
                ConfigMapVolumeSource { name: config_map.clone(), items, optional: Some(true), ..ConfigMapVolumeSource::default() };
            Volume { name, config_map: Some(source), ..Volume::default() }
        }
        // One that a kubelet makes is root's: that it cannot be written is said by who tries.
        MountSource::HostPath(path) => Volume {
            name,
            host_path: Some(HostPathVolumeSource { path: path.clone(), type_: Some("DirectoryOrCreate".to_owned()) }),
            ..Volume::default()
        },
        MountSource::Empty(limit) => {
            let size_limit = limit.map(|limit| Quantity(limit.to_string()));
            Volume { name, empty_dir: Some(EmptyDirVolumeSource { size_limit, ..EmptyDirVolumeSource::default() }), ..Volume::default() }
        }
    }
}
