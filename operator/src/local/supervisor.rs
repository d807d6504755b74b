//! The loop of local mode: take in objects, run controllers and kubelet, reconcile, until told to stop.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use serde_json::json;

use super::folders::Folders;
use super::kubelet::Kubelet;
use super::polls::Polls;
use super::process::Record;
use super::reconcile::World;
use super::store::{Object, Store, read_folder, write_json};
use super::workloads;
use crate::shared::Settings;
use crate::shared::meta::namespace;

/// Time between two rounds.
pub const PERIOD: Duration = Duration::from_millis(200);

/// Runs the objects of one state directory; only one at a time can.
pub struct Supervisor {
    folders: Folders,
    store: Store,
    kubelet: Kubelet,
    polls: Polls,
    settings: Settings,
    /// ConfigMaps and Secrets that cannot be written, by name.
    unwritten: BTreeSet<String>,
    /// Held as long as this supervisor lives.
    _lock: File,
}

impl Supervisor {
    /// Takes the state directory over.
    ///
    /// # Errors
    /// When another supervisor runs, or the directory cannot be read.
    pub fn open(folders: &Folders, worker: PathBuf) -> io::Result<Self> {
        let lock = File::create(folders.root.join("lock"))?;
        lock.try_lock().map_err(|_| io::Error::other(format!("{} is in use by another supervisor", folders.root.display())))?;
        let mut store = Store::open(&folders.root)?;
        let kubelet = Kubelet::new(folders.clone(), worker, &mut store)?;
        // The workloads of an earlier run learn that their pods are down before anybody reads their statuses.
        workloads::tick(&mut store, &Time(Timestamp::now()))?;
        let polls = Polls::new().map_err(io::Error::other)?;
        // One binary stands for both images: it says itself whether it is built for CUDA.
        let images = Settings::default();
        let settings = Settings { worker_cuda_image: Some(images.worker_image.clone()), ..images };
        Ok(Self { folders: folders.clone(), store, kubelet, polls, settings, unwritten: BTreeSet::new(), _lock: lock })
    }

    /// The objects.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// One round.
    pub fn tick(&mut self) -> io::Result<()> {
        let now = Time(Timestamp::now());
        self.take_in(&now)?;
        self.polls.receive();
        let (store, folders, polls, settings) = (&mut self.store, &self.folders, &mut self.polls, &self.settings);
        World { store, folders, polls, settings, now: now.clone() }.tick()?;
        workloads::tick(&mut self.store, &now)?;
        self.kubelet.tick(&mut self.store, &mut self.polls, &now)
    }

    /// Announces this process as the supervisor of its state directory.
    pub fn announce(&self) -> io::Result<()> {
        let own = i32::try_from(std::process::id()).ok().and_then(Record::of);
        write_json(&record_file(&self.folders.root), &json!(own))
    }

    /// Stops everything in order: gateways, then trainers, which checkpoint, then pools. A second `interrupt` ends it at once.
    pub async fn stop(&mut self, mut interrupt: impl AsyncFnMut()) -> io::Result<()> {
        for component in ["gateway", "trainer", "pool"] {
            self.kubelet.stop(&self.store, component);
            while self.kubelet.running(&self.store, component) > 0 {
                self.reap()?;
                tokio::select! {
                    () = tokio::time::sleep(PERIOD / 4) => {}
                    () = interrupt() => self.kubelet.kill_all(),
                }
            }
        }
        self.reap()?;
        fs::remove_file(record_file(&self.folders.root)).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })
    }

    /// Takes in the ends of processes and writes them down, so that the next run knows how the attempts ended.
    fn reap(&mut self) -> io::Result<()> {
        self.kubelet.tick(&mut self.store, &mut self.polls, &Time(Timestamp::now()))
    }

    /// Applies what `local up` has left in `incoming/`; it was admitted there.
    fn take_in(&mut self, now: &Time) -> io::Result<()> {
        for (path, value) in read_folder(&self.folders.root.join("incoming"))? {
            // One that cannot be stored, as when its name is too long for a file's, keeps none from the others.
            if let Err(problem) = value.and_then(|value| self.store.apply_value(value, now).map_err(|error| error.to_string())) {
                tracing::error!("{} was not applied: {problem}", path.display());
            }
            fs::remove_file(path)?;
        }
        self.folders.bind_claims(&mut self.store, now)?;
        for config_map in self.store.list::<ConfigMap>() {
            self.written(&config_map, self.folders.write_config_map(&config_map));
        }
        for secret in self.store.list::<Secret>() {
            self.written(&secret, self.folders.write_secret(&secret));
        }
        Ok(())
    }

    /// One that cannot be written, as when a key is no file's name here, is told of once; the others go on.
    fn written<K: Object>(&mut self, object: &K, outcome: io::Result<()>) {
        let name = format!("{} {}/{}", K::kind(&()), namespace(object), object.name_any());
        match outcome {
            Ok(()) => drop(self.unwritten.remove(&name)),
            Err(error) if self.unwritten.insert(name.clone()) => tracing::error!("{name} cannot be written for pods to read: {error}"),
            Err(_) => {}
        }
    }
}

/// The supervisor of `state_dir` that runs now.
pub fn running(state_dir: &Path) -> Option<Record> {
    let bytes = fs::read(record_file(state_dir)).ok()?;
    serde_json::from_slice::<Option<Record>>(&bytes).ok()?.filter(Record::is_alive)
}

fn record_file(state_dir: &Path) -> PathBuf {
    state_dir.join("supervisor.json")
}
