//! The three kinds against the store: observe, validate, build, apply, status. The middle three and the last are the very
//! functions that run in a cluster.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use carryon_crds::wire::Progress;
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob, names};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;

use super::folders::Folders;
use super::polls::Polls;
use super::rewrite::address;
use super::store::Store;
use super::workloads;
use crate::shared::Settings;
use crate::shared::meta::namespace;
use crate::shared::said::Said;
use crate::shared::sharing::{PoolPath, PoolUser as _};
use crate::shared::trouble::{is_ready, phase};
use crate::shared::worker::fetches;
use crate::{deployment, job, pool};

/// How often a pool is asked for its model, a gateway for its keys and a trainer for its progress.
const MODEL_PERIOD: Duration = Duration::from_secs(5);
const GATEWAY_PERIOD: Duration = Duration::from_secs(2);
const PROGRESS_PERIOD: Duration = Duration::from_millis(500);

/// What reconciling needs beside the objects.
pub struct World<'a> {
    /// The objects.
    pub store: &'a mut Store,
    /// The state directory.
    pub folders: &'a Folders,
    /// What pods say over HTTP.
    pub polls: &'a mut Polls,
    /// The operator's settings.
    pub settings: &'a Settings,
    /// The moment.
    pub now: Time,
}

impl World<'_> {
    /// One round over all objects, pools first: what they say is news to the jobs of the same round.
    pub fn tick(&mut self) -> io::Result<()> {
        self.store.list::<BaseModelPool>().into_iter().try_for_each(|pool| self.pool(pool))?;
        self.store.list::<CarryOnJob>().into_iter().try_for_each(|job| self.job(job))?;
        self.store.list::<CarryOnDeployment>().into_iter().try_for_each(|deployment| self.deployment(deployment))
    }

    fn pool(&mut self, mut pool: BaseModelPool) -> io::Result<()> {
        let space = namespace(&pool);
        let observed = self.observe_pool(&pool, &space);
        let outcome = match pool::validate(&pool, &observed, self.settings) {
            Ok(validated) => self.apply_pool(pool::build(&validated)).map(|applied| Ok((validated, applied)))?,
            Err(refusal) => Err(refusal),
        };
        pool.status = Some(pool::status(&pool, &outcome, &observed, &self.now));
        self.store.put(&pool)
    }

    fn observe_pool(&mut self, pool: &BaseModelPool, space: &str) -> pool::Observed {
        let claim = pool.spec.model.claim().and_then(|(path, _)| self.store.get::<PersistentVolumeClaim>(space, &path.claim_name));
        let set: Option<StatefulSet> = self.store.get(space, &names::pool(&pool.name_any()));
        let pods = set.map(|set| workloads::pods_of(self.store, &set)).unwrap_or_default();
        let models = self.ask_all(pods.iter().filter(|pod| is_ready(pod)), "/v1/model", MODEL_PERIOD);
        let fetches = self.ask_all(pods.iter().filter(|pod| fetches(pod)), "/progress", PROGRESS_PERIOD);
        pool::Observed { claim, pods, models, fetches, ..pool::Observed::default() }
    }

    fn apply_pool(&mut self, children: pool::Children) -> io::Result<pool::Applied> {
        let pool::Children { revision: _, network_policy: _, config_map, commit, service, stateful_set, disruption_budget } = children;
        [Some(config_map), commit].iter().flatten().try_for_each(|config_map| self.apply_config(config_map))?;
        self.store.apply(&service, &self.now)?;
        self.store.apply(&disruption_budget, &self.now)?;
        Ok(pool::Applied { stateful_set: self.store.apply(&stateful_set, &self.now)? })
    }

    fn job(&mut self, mut job: CarryOnJob) -> io::Result<()> {
        let space = namespace(&job);
        let observed = self.observe_job(&job, &space);
        let recorded = job::trainers::recorded(&job, &observed.pods, &self.now).cloned();
        recorded.collect::<Vec<_>>().into_iter().try_for_each(|pod| self.let_go(pod))?;
        let outcome = match job::validate(&job, &observed, self.settings, &self.now) {
            Ok(validated) => self.apply_job(&space, job::build(&validated)).map(|applied| Ok((validated, applied)))?,
            Err(refusal) => Err(refusal),
        };
        job.status = Some(job::status(&job, &outcome, &observed, &self.now));
        self.store.put(&job)
    }

    fn observe_job(&mut self, job: &CarryOnJob, space: &str) -> job::Observed {
        let spec = &job.spec;
        let name = job.name_any();
        let number = job.status.as_ref().map_or(0, |status| status.attempt);
        let attempt: Option<Job> = self.store.get(space, &names::attempt(&name, number));
        let selector = names::selector("trainer", &name);
        let of_job = |pod: &Pod| namespace(pod) == space && selector.iter().all(|(key, value)| pod.labels().get(key) == Some(value));
        let pods: Vec<Pod> = self.store.list().into_iter().filter(of_job).collect();
        let running = pods.iter().find(|pod| phase(pod) == "Running");
        let progress: Option<Progress> = running.and_then(|pod| self.ask(pod, "/progress", PROGRESS_PERIOD));
        job::Observed {
            pool: self.shared_pool(&job.pool()),
            other_pools: job.pools().iter().skip(1).map(|path| self.shared_pool(path)).collect(),
            claims: spec.claims().filter_map(|path| self.store.get(space, &path.claim_name)).collect(),
            data: spec.data.source.config_map.as_ref().and_then(|source| self.store.get(space, &source.name)),
            attempt,
            pods,
            progress,
            ..job::Observed::default()
        }
    }

    /// Lets a pod go whose end nobody has to read any more.
    fn let_go(&mut self, mut pod: Pod) -> io::Result<()> {
        pod.metadata.finalizers = None;
        self.store.put(&pod)
    }

    fn apply_job(&mut self, space: &str, children: job::Children) -> io::Result<job::Applied> {
        let job::Children { revision: _, network_policy: _, config_map, attempt, stop } = children;
        for job in stop.iter().filter_map(|name| self.store.get::<Job>(space, name)).collect::<Vec<_>>() {
            workloads::delete(self.store, job, &self.now)?;
        }
        config_map.iter().try_for_each(|config_map| self.apply_config(config_map))?;
        // Created once, never written again.
        let attempt = attempt.map(|attempt| match self.store.get::<Job>(space, &attempt.name_any()) {
            Some(existing) => Ok(existing),
            None => self.store.apply(&attempt, &self.now),
        });
        Ok(job::Applied { attempt: attempt.transpose()? })
    }

    fn deployment(&mut self, mut deployment: CarryOnDeployment) -> io::Result<()> {
        let space = namespace(&deployment);
        let observed = self.observe_deployment(&deployment, &space);
        self.end_withheld(&space, &deployment.name_any(), &observed.pods)?;
        let outcome = match deployment::validate(&deployment, &observed, self.settings) {
            Ok(validated) => self.apply_deployment(deployment::build(&validated)).map(|applied| Ok((validated, applied)))?,
            Err(refusal) => Err(refusal),
        };
        deployment.status = Some(deployment::status(&deployment, &outcome, &observed, &self.now));
        self.store.put(&deployment)
    }

    fn observe_deployment(&mut self, deployment: &CarryOnDeployment, space: &str) -> deployment::Observed {
        let gateway: Option<Deployment> = self.store.get(space, &names::gateway(&deployment.name_any()));
        let pods: Vec<Pod> = gateway.map(|gateway| workloads::pods_of(self.store, &gateway)).unwrap_or_default();
        let jobs: Vec<CarryOnJob> = deployment::referenced_jobs(deployment).filter_map(|job| self.store.get(space, job)).collect();
        let claims = deployment::referenced_claims(deployment, &jobs);
        let said = self.ask_all(deployment::asked(deployment, &pods), "/status", GATEWAY_PERIOD);
        deployment::Observed {
            pool: self.shared_pool(&deployment.pool()),
            other_pools: deployment.pools().iter().skip(1).map(|path| self.shared_pool(path)).collect(),
            claims: claims.iter().filter_map(|claim| self.store.get::<PersistentVolumeClaim>(space, claim)).collect(),
            said,
            url: pods.iter().find_map(address),
            jobs,
            pods,
            ..deployment::Observed::default()
        }
    }

    fn apply_deployment(&mut self, children: deployment::Children) -> io::Result<deployment::Applied> {
        let deployment::Children { revision: _, network_policy: _, config_map, service, deployment, disruption_budget } = children;
        self.apply_config(&config_map)?;
        self.store.apply(&service, &self.now)?;
        self.store.apply(&disruption_budget, &self.now)?;
        Ok(deployment::Applied { deployment: self.store.apply(&deployment, &self.now)? })
    }

    /// Ends the gateways when a pool that they work with is not there for them any more.
    fn end_withheld(&mut self, space: &str, name: &str, pods: &[Pod]) -> io::Result<()> {
        let Some(mut gateways) = self.store.get::<Deployment>(space, &names::gateway(name)) else { return Ok(()) };
        let is_withheld = |path: PoolPath| path.withheld(self.shared_pool(&path).as_ref()).is_some();
        if !deployment::pools(&gateways, pods).into_iter().any(is_withheld) {
            return Ok(());
        }
        gateways.spec.iter_mut().for_each(|spec| spec.replicas = Some(0));
        self.store.put(&gateways)
    }

    /// The pool, when it is there for its user. A namespace has the labels of its manifest, if there is one, and that of its name.
    fn shared_pool(&self, path: &PoolPath) -> Option<BaseModelPool> {
        let labels = || {
            let manifest = self.store.get::<Namespace>("default", path.user());
            let mut labels = manifest.and_then(|namespace| namespace.metadata.labels).unwrap_or_default();
            labels.insert("kubernetes.io/metadata.name".to_owned(), path.user().to_owned());
            Some(labels)
        };
        path.there(self.store.get(&path.namespace, &path.name), labels)
    }

    fn apply_config(&mut self, config_map: &ConfigMap) -> io::Result<()> {
        let applied = self.store.apply(config_map, &self.now)?;
        self.folders.write_config_map(&applied)
    }

    /// What each of `pods` last said at `path`, by name.
    fn ask_all<'p, T: Said>(&mut self, pods: impl Iterator<Item = &'p Pod>, path: &str, period: Duration) -> BTreeMap<String, T> {
        pods.filter_map(|pod| Some((pod.name_any(), self.ask(pod, path, period)?))).collect()
    }

    /// What a pod last said at `path`.
    fn ask<T: Said>(&mut self, pod: &Pod, path: &str, period: Duration) -> Option<T> {
        let name = format!("Pod/{}{path}", super::store::scoped(&namespace(pod), &pod.name_any()));
        let body = self.polls.body(&name, &format!("{}{path}", address(pod)?), period)?;
        let said = serde_json::from_value::<T>(body).inspect_err(|error| tracing::debug!(%error, name, "answer not understood"));
        said.ok().map(T::fit)
    }
}
