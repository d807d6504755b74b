//! The elections against the API server: each a task of its own, so that nothing else can hold up a renewal.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::Duration;

use anyhow::Context as _;
use carryon_crds::names;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::args::RunArgs;
use super::clocks::End;
use super::election::{DURATION, Election, RENEW_DEADLINE};
use super::failure::code;
use super::tenure::{ALL, Tenure, Tenures};

/// Name of every Lease.
const LEASE: &str = "carryon-operator";
/// Where the Lease of an operator for all namespaces lies.
const HOME: &str = "kube-system";
/// Who installed the holder of a Lease.
const INSTALLATION: &str = "carryon.dev/installation";
/// From one try, for the Lease or to renew it, to the next.
const RETRY: Duration = Duration::from_secs(2);
/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// This operator's part in the elections; it ends when it is dropped.
pub struct Leader {
    tenures: watch::Receiver<Tenures>,
    /// Without an election, what keeps the tenure.
    _unopposed: Option<watch::Sender<Tenures>>,
    tasks: Vec<(JoinHandle<()>, oneshot::Sender<()>)>,
}

impl Leader {
    /// Takes part in the elections from now on, unless the arguments say that there is none.
    pub fn start(client: &Client, args: &RunArgs) -> Self {
        if args.without_lease {
            let (sender, tenures) = watch::channel(Tenures::unopposed());
            return Self { tenures, _unopposed: Some(sender), tasks: Vec::new() };
        }
        // Two processes never have one identity.
        let identity = format!("{}_{:08x}", args.identity, RandomState::new().build_hasher().finish() >> 32);
        let about: BTreeSet<&str> =
            if args.namespaces.is_empty() { [ALL].into() } else { args.namespaces.iter().map(String::as_str).collect() };
        let unknown = Tenure { unknown: Some("not asked yet".to_owned()), ..Tenure::default() };
        let (sender, tenures) = watch::channel(Tenures(about.iter().map(|&about| (about.to_owned(), unknown.clone())).collect()));
        let candidates = about.into_iter().map(|about| {
            let (namespace, handover, all) = match about {
                ALL => (args.lease_namespace.as_deref().unwrap_or(HOME), Duration::ZERO, Some(Api::all(client.clone()))),
                namespace => (namespace, DURATION, None),
            };
            Candidate {
                api: Api::namespaced(client.clone(), namespace),
                all,
                about: about.to_owned(),
                namespace: namespace.to_owned(),
                installation: args.installation.clone(),
                election: Election::new(identity.clone(), handover),
                held: None,
                tenures: sender.clone(),
            }
        });
        let start = |candidate: Candidate| {
            let (stop, stopped) = oneshot::channel();
            (tokio::spawn(candidate.run(stopped)), stop)
        };
        Self { tenures, _unopposed: None, tasks: candidates.map(start).collect() }
    }

    /// How the elections stand, now and later.
    pub fn tenures(&self) -> watch::Receiver<Tenures> {
        self.tenures.clone()
    }

    /// Returns when this operator is to work, or is to stop.
    pub async fn until(&self, leads: bool) -> anyhow::Result<()> {
        let mut tenures = self.tenures.clone();
        tenures.wait_for(|tenures| tenures.leads() == leads).await.context("the election has ended")?;
        Ok(())
    }

    /// Gives the Leases back, so that another operator need not wait for their end.
    pub async fn release(mut self) {
        let (tasks, stops): (Vec<_>, Vec<_>) = std::mem::take(&mut self.tasks).into_iter().unzip();
        for stop in stops {
            let _ = stop.send(());
        }
        for task in tasks {
            let _ = task.await;
        }
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.tasks.iter().for_each(|(task, _)| task.abort());
    }
}

struct Candidate {
    api: Api<Lease>,
    /// The Leases of all namespaces, for one who looks after all.
    all: Option<Api<Lease>>,
    /// The namespace that the election is about.
    about: String,
    /// Where the Lease lies.
    namespace: String,
    installation: String,
    election: Election,
    /// The Lease as this operator wrote it last.
    held: Option<Lease>,
    tenures: watch::Sender<Tenures>,
}

impl Candidate {
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        loop {
            let (sent, end) = (Instant::now(), End::after(RENEW_DEADLINE));
            self.tell(|tenure| tenure.leads = self.election.leads(sent));
            let patience = self.election.until(sent).unwrap_or(sent + PATIENCE).min(sent + PATIENCE);
            tokio::select! {
                answer = timeout_at(patience, self.attempt(sent, end)) => {
                    self.publish(answer.unwrap_or_else(|_| Err(format!("no answer within {PATIENCE:?}"))));
                }
                _ = &mut stopped => return self.release().await,
            }
            let now = Instant::now();
            let next = self.election.until(now).map_or(sent + RETRY, |until| until.min(sent + RETRY)).max(now);
            tokio::select! {
                () = sleep_until(next) => {}
                _ = &mut stopped => return self.release().await,
            }
        }
    }

    /// Tries to get or keep the Lease, until `end`.
    async fn attempt(&mut self, sent: Instant, end: End) -> Result<Tenure, String> {
        // An answer that does not come leaves open what the Lease is.
        let before = match self.held.take() {
            Some(held) => Some(held),
            None => self.api.get_opt(LEASE).await.map_err(|error| self.failed("read", &error))?,
        };
        let Some(bid) = self.election.bid(before.as_ref(), Instant::now(), MicroTime(Timestamp::now())) else {
            let lease = before.unwrap_or_default();
            let holder = lease.spec.and_then(|spec| spec.holder_identity).unwrap_or_default();
            let installation = lease.metadata.annotations.and_then(|mut all| all.remove(INSTALLATION)).unwrap_or_default();
            return Ok(Tenure { holder: Some((holder, installation)), ..Tenure::default() });
        };
        let lease = self.lease(before.as_ref(), bid);
        let parameters = PostParams { field_manager: Some(names::MANAGER.to_owned()), ..PostParams::default() };
        let written = match &before {
            Some(_) => self.api.replace(LEASE, &parameters, &lease).await,
            None => self.api.create(&parameters, &lease).await,
        };
        let written = written.map_err(|error| self.failed("write", &error))?;
        let left = self.others().await?;
        self.election.accepted(before.as_ref(), sent);
        self.held = Some(written);
        Ok(Tenure { until: Some(end), left, ..Tenure::default() })
    }

    /// Who works in a namespace alone.
    async fn others(&mut self) -> Result<BTreeMap<String, String>, String> {
        let Some(all) = &self.all else { return Ok(BTreeMap::new()) };
        let labels = format!("app.kubernetes.io/managed-by={}", names::MANAGER);
        let leases = all.list(&ListParams::default().labels(&labels)).await.map_err(|error| self.failed("list", &error))?;
        let now = Instant::now();
        let others = leases.items.iter().filter(|lease| lease.name_any() == LEASE && lease.namespace().as_ref() != Some(&self.namespace));
        Ok(others.filter_map(|lease| Some((lease.namespace()?, self.election.holder(lease, now)?.to_owned()))).collect())
    }

    fn lease(&self, before: Option<&Lease>, spec: LeaseSpec) -> Lease {
        let mut lease = before.cloned().unwrap_or_default();
        lease.metadata.name = Some(LEASE.to_owned());
        lease.labels_mut().insert("app.kubernetes.io/managed-by".to_owned(), names::MANAGER.to_owned());
        lease.annotations_mut().insert(INSTALLATION.to_owned(), self.installation.clone());
        Lease { spec: Some(spec), ..lease }
    }

    /// Tells how the election stands; that it is not known changes nothing before its time.
    fn publish(&self, answer: Result<Tenure, String>) {
        let leads = self.election.leads(Instant::now());
        let lease = format!("{}/{LEASE}", self.namespace);
        self.tell(|tenure| {
            let before = tenure.clone();
            *tenure = match answer {
                Ok(news) => Tenure { leads, ..news },
                Err(words) => {
                    tracing::warn!("{words}");
                    Tenure { leads, unknown: Some(words), ..before.clone() }
                }
            };
            if tenure.holder != before.holder
                && let Some((holder, installation)) = &tenure.holder
            {
                tracing::info!("waiting while {holder} of installation {installation:?} works, which holds Lease {lease}");
            }
            for (namespace, holder) in tenure.left.iter().filter(|(namespace, _)| !before.left.contains_key(*namespace)) {
                tracing::error!("namespace {namespace} is left to operator {holder}, which holds the Lease there");
            }
        });
    }

    /// Changes how this election stands; those that wait for changes hear of it when it is one.
    fn tell(&self, change: impl FnOnce(&mut Tenure)) {
        self.tenures.send_if_modified(|tenures| {
            let tenure = tenures.0.entry(self.about.clone()).or_default();
            let before = tenure.clone();
            change(tenure);
            *tenure != before
        });
    }

    fn failed(&self, step: &str, error: &kube::Error) -> String {
        match code(error) {
            // Somebody was faster.
            409 => format!("Lease {}/{LEASE} has changed meanwhile", self.namespace),
            _ => format!("failed to {step} Lease {}/{LEASE}: {error}", self.namespace),
        }
    }

    /// Gives back what is held.
    async fn release(self) {
        let release = async {
            let Some(held) = self.api.get_opt(LEASE).await?.filter(|lease| self.election.is_mine(lease)) else { return Ok(()) };
            let spec = LeaseSpec { holder_identity: None, lease_duration_seconds: Some(1), ..held.spec.clone().unwrap_or_default() };
            self.api.replace(LEASE, &PostParams::default(), &self.lease(Some(&held), spec)).await.map(drop)
        };
        let released = timeout(PATIENCE, release).await.unwrap_or(Ok(()));
        if let Err(error) = released {
            tracing::warn!("{}: another operator waits for its end", self.failed("give back", &error));
        }
    }
}
