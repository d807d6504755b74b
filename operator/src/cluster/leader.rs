//! The election against the API server: a task of its own, so that nothing else can hold up a renewal.

use std::collections::BTreeMap;
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

/// How the election stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tenure {
    /// Whether this operator works.
    pub leads: bool,
    /// When it stops, unless it renews the Lease before; none without a Lease.
    pub until: Option<End>,
    /// Who holds the Lease, when it is another: the operator, and who installed it.
    pub holder: Option<(String, String)>,
    /// Namespaces in which others work, and who.
    pub left: BTreeMap<String, String>,
    /// Why it is not known how it stands, when it is not.
    pub unknown: Option<String>,
}

impl Tenure {
    /// Whether no other operator may work at this moment, be it noticed or not.
    pub fn may_write(&self) -> bool {
        self.leads && !self.until.is_some_and(End::has_come)
    }
}

/// This operator's part in the election; it ends when it is dropped.
pub struct Leader {
    tenure: watch::Receiver<Tenure>,
    /// Without an election, what keeps the tenure.
    _alone: Option<watch::Sender<Tenure>>,
    task: Option<(JoinHandle<()>, oneshot::Sender<()>)>,
}

impl Leader {
    /// Takes part in the election from now on, unless the arguments say that there is none.
    pub fn start(client: Client, args: &RunArgs) -> Self {
        if args.without_lease {
            let (sender, tenure) = watch::channel(Tenure { leads: true, ..Tenure::default() });
            return Self { tenure, _alone: Some(sender), task: None };
        }
        let namespace = args.lease_namespace.clone().or_else(|| args.namespace.clone()).unwrap_or_else(|| HOME.to_owned());
        // Two processes never have one identity.
        let identity = format!("{}_{:08x}", args.identity, RandomState::new().build_hasher().finish() >> 32);
        let handover = if args.namespace.is_some() { DURATION } else { Duration::ZERO };
        let unknown = Some("not asked yet".to_owned());
        let (sender, tenure) = watch::channel(Tenure { unknown, ..Tenure::default() });
        let (stop, stopped) = oneshot::channel();
        let candidate = Candidate {
            api: Api::namespaced(client.clone(), &namespace),
            all: args.namespace.is_none().then(|| Api::all(client)),
            namespace,
            installation: args.installation.clone(),
            election: Election::new(identity, handover),
            held: None,
            tenure: sender,
        };
        Self { tenure, _alone: None, task: Some((tokio::spawn(candidate.run(stopped)), stop)) }
    }

    /// How the election stands, now and later.
    pub fn tenure(&self) -> watch::Receiver<Tenure> {
        self.tenure.clone()
    }

    /// Returns when this operator is to work, or is to stop.
    pub async fn until(&self, leads: bool) -> anyhow::Result<()> {
        let mut tenure = self.tenure.clone();
        tenure.wait_for(|tenure| tenure.leads == leads).await.context("the election has ended")?;
        Ok(())
    }

    /// Gives the Lease back, so that another operator need not wait for its end.
    pub async fn release(mut self) {
        let Some((task, stop)) = self.task.take() else { return };
        let _ = stop.send(());
        let _ = task.await;
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.task.iter().for_each(|(task, _)| task.abort());
    }
}

struct Candidate {
    api: Api<Lease>,
    /// The Leases of all namespaces, for one who looks after all.
    all: Option<Api<Lease>>,
    namespace: String,
    installation: String,
    election: Election,
    /// The Lease as this operator wrote it last.
    held: Option<Lease>,
    tenure: watch::Sender<Tenure>,
}

impl Candidate {
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        loop {
            let (sent, end) = (Instant::now(), End::after(RENEW_DEADLINE));
            self.tenure.send_if_modified(|tenure| std::mem::replace(&mut tenure.leads, self.election.leads(sent)) != tenure.leads);
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
    fn publish(&mut self, answer: Result<Tenure, String>) {
        let leads = self.election.leads(Instant::now());
        self.tenure.send_if_modified(|tenure| {
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
                tracing::info!("waiting while {holder} of installation {installation:?} works");
            }
            for (namespace, holder) in tenure.left.iter().filter(|(namespace, _)| !before.left.contains_key(*namespace)) {
                tracing::error!("namespace {namespace} is left to operator {holder}, which holds the Lease there");
            }
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
