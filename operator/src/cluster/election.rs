//! Who works, of several operators: the one that holds the Lease of its scope. Pure: times are this process's own, never those of another.
//!
//! The Lease of an operator that looks after one namespace lies in that namespace, that of one which looks after all in a fixed place
//! (`kube-system`, unless told otherwise), both under one name. So two operators of the same scope never work at once, whoever installed them. One
//! for all namespaces leaves a namespace alone while another holds the Lease there; it looks for such Leases as often as it renews its own, and a
//! renewal counts only if it has seen them. A newcomer in a namespace waits for a Lease's duration before it works, so that it was seen.
//! Not detected: operators for all namespaces whose Leases were put in different places, and those that run without a Lease.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use tokio::time::Instant;

/// How long a Lease is good for after it was last seen to change.
pub const DURATION: Duration = Duration::from_secs(15);
/// How long its holder works on after its last renewal was sent: less, so that it has stopped before anybody takes the Lease.
pub const RENEW_DEADLINE: Duration = Duration::from_secs(10);

/// One operator's view of the Leases.
pub struct Election {
    identity: String,
    /// How long a new holder waits before it works.
    handover: Duration,
    /// The last version of the Lease of each namespace, and when it was first seen.
    seen: BTreeMap<String, (Option<String>, Instant)>,
    /// When this operator may work, from and until.
    term: Option<(Instant, Instant)>,
}

impl Election {
    /// Nothing is known yet.
    pub fn new(identity: String, handover: Duration) -> Self {
        Self { identity, handover, seen: BTreeMap::new(), term: None }
    }

    /// What to write into the Lease; nothing while another holds it.
    pub fn bid(&mut self, lease: Option<&Lease>, now: Instant, time: MicroTime) -> Option<LeaseSpec> {
        let present = lease.and_then(|lease| lease.spec.clone()).unwrap_or_default();
        let is_mine = lease.is_some_and(|lease| self.is_mine(lease));
        if lease.is_some_and(|lease| self.holder(lease, now).is_some()) && !is_mine {
            self.term = None;
            return None;
        }
        Some(LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: present.acquire_time.filter(|_| is_mine).or_else(|| Some(time.clone())),
            renew_time: Some(time),
            lease_transitions: Some(present.lease_transitions.unwrap_or(0) + i32::from(!is_mine && lease.is_some())),
            ..LeaseSpec::default()
        })
    }

    /// Whether this operator is written into the Lease.
    pub fn is_mine(&self, lease: &Lease) -> bool {
        lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()) == Some(&self.identity)
    }

    /// The bid that was sent at that time was accepted; `before` is the Lease that it has replaced.
    pub fn accepted(&mut self, before: Option<&Lease>, sent: Instant) {
        // Whoever held it until now has kept others away.
        let was_held = before.and_then(|lease| lease.spec.as_ref()?.holder_identity.as_deref()).is_some_and(|holder| !holder.is_empty());
        let start = || if was_held { sent } else { sent + self.handover };
        let from = self.term.filter(|(_, until)| sent < *until).map_or_else(start, |(from, _)| from);
        self.term = Some((from, sent + RENEW_DEADLINE));
    }

    /// Whether this operator may work.
    pub fn leads(&self, now: Instant) -> bool {
        self.term.is_some_and(|(from, until)| from <= now && now < until)
    }

    /// When it has to stop, unless it renews before.
    pub fn until(&self, now: Instant) -> Option<Instant> {
        self.term.map(|(_, until)| until).filter(|until| now < *until)
    }

    /// Who holds a Lease. One that has not changed for its duration is free.
    pub fn holder<'a>(&mut self, lease: &'a Lease, now: Instant) -> Option<&'a str> {
        let version = &lease.metadata.resource_version;
        let seen = self.seen.entry(lease.metadata.namespace.clone().unwrap_or_default()).or_insert_with(|| (version.clone(), now));
        if seen.0 != *version {
            *seen = (version.clone(), now);
        }
        let spec = lease.spec.as_ref()?;
        let holder = spec.holder_identity.as_deref().filter(|holder| !holder.is_empty())?;
        let duration = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok()).map_or(DURATION, Duration::from_secs);
        (now < seen.1 + duration).then_some(holder)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;
    use serde_json::json;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn time() -> MicroTime {
        MicroTime(Timestamp::UNIX_EPOCH)
    }

    fn lease(holder: &str, version: &str) -> Lease {
        let spec = json!({ "holderIdentity": holder, "leaseDurationSeconds": 15, "leaseTransitions": 3 });
        serde_json::from_value(json!({ "metadata": { "namespace": "home", "resourceVersion": version }, "spec": spec })).unwrap()
    }

    #[test]
    fn a_lease_is_taken_when_it_is_new_given_back_or_unchanged_for_its_duration_by_our_own_clock() {
        let start = Instant::now();
        let mut election = Election::new("me".to_owned(), Duration::ZERO);
        let first = election.bid(None, start, time()).unwrap();
        assert_eq!((first.holder_identity.as_deref(), first.lease_transitions), (Some("me"), Some(0)));
        assert_eq!(election.bid(Some(&lease("", "1")), start, time()).unwrap().lease_transitions, Some(4));
        assert!(election.bid(Some(&lease("other", "2")), start, time()).is_none());
        assert!(election.bid(Some(&lease("other", "2")), start + 14 * SECOND, time()).is_none());
        // Renewed: its time begins anew.
        assert!(election.bid(Some(&lease("other", "3")), start + 15 * SECOND, time()).is_none());
        assert!(election.bid(Some(&lease("other", "3")), start + 29 * SECOND, time()).is_none());
        assert!(election.bid(Some(&lease("other", "3")), start + 30 * SECOND, time()).is_some());
    }

    #[test]
    fn who_cannot_renew_stops_before_another_may_start() {
        let start = Instant::now();
        let (mut first, mut second) =
            (Election::new("first".to_owned(), Duration::ZERO), Election::new("second".to_owned(), Duration::ZERO));
        first.bid(None, start, time()).unwrap();
        first.accepted(None, start);
        assert!(first.leads(start) && first.until(start) == Some(start + 10 * SECOND));
        // The second sees it no earlier than it was sent.
        let held = lease("first", "1");
        assert!(second.bid(Some(&held), start, time()).is_none());
        for tenths in 0..200u32 {
            let now = start + tenths * SECOND / 10;
            let takes = second.bid(Some(&held), now, time()).is_some();
            assert!(!(takes && first.leads(now + 4 * SECOND)), "{tenths} tenths of a second after the last renewal");
        }
        // A renewal in time goes on without a gap; the same Lease, renewed too late, is a new term.
        first.accepted(Some(&held), start + 9 * SECOND);
        assert!(first.leads(start + 18 * SECOND) && !first.leads(start + 19 * SECOND));
        assert!(first.bid(Some(&lease("first", "1")), start + 60 * SECOND, time()).is_some());
        // Somebody else's now.
        first.accepted(Some(&held), start + 60 * SECOND);
        assert!(first.bid(Some(&lease("second", "2")), start + 61 * SECOND, time()).is_none() && !first.leads(start + 61 * SECOND));
    }

    #[test]
    fn a_newcomer_in_a_namespace_waits_until_it_was_seen_and_a_successor_does_not() {
        let start = Instant::now();
        let mut election = Election::new("me".to_owned(), DURATION);
        election.accepted(None, start);
        for renewal in 1..8u32 {
            assert!(!election.leads(start + 2 * renewal * SECOND));
            election.accepted(Some(&lease("me", "1")), start + 2 * renewal * SECOND);
        }
        assert!(election.leads(start + 15 * SECOND));
        let mut successor = Election::new("successor".to_owned(), DURATION);
        successor.accepted(Some(&lease("me", "1")), start);
        assert!(successor.leads(start));
        let mut after_a_release = Election::new("successor".to_owned(), DURATION);
        after_a_release.accepted(Some(&lease("", "1")), start);
        assert!(!after_a_release.leads(start));
    }
}
