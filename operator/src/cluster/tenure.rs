//! How the elections stand: that for all namespaces, or those for each that is looked after.

use std::collections::BTreeMap;

use super::clocks::End;

/// The election for all namespaces, where others have names.
pub const ALL: &str = "";

/// How one election stands.
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
    fn may_write(&self) -> bool {
        self.leads && !self.until.is_some_and(End::has_come)
    }
}

/// The elections, by the namespace that each is about.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tenures(pub BTreeMap<String, Tenure>);

impl Tenures {
    /// Only this operator is there, by its own word.
    pub fn unopposed() -> Self {
        Self(BTreeMap::from([(ALL.to_owned(), Tenure { leads: true, ..Tenure::default() })]))
    }

    /// Whether there is a namespace to work in.
    pub fn leads(&self) -> bool {
        self.0.values().any(|tenure| tenure.leads)
    }

    /// Whether this operator is to work in a namespace.
    pub fn leads_in(&self, namespace: &str) -> bool {
        self.of(namespace).is_some_and(|tenure| tenure.leads && !tenure.left.contains_key(namespace))
    }

    /// Whether no other operator may write into a namespace at this moment, be it noticed or not.
    pub fn may_write(&self, namespace: &str) -> bool {
        self.of(namespace).is_some_and(Tenure::may_write)
    }

    /// How it stands in those namespaces in which this operator does not work: a line each, and whether that is as it should be.
    pub fn elsewhere(&self) -> Vec<(bool, String)> {
        let left = self.0.values().flat_map(|tenure| &tenure.left).map(|(namespace, holder)| (true, left_to(namespace, holder)));
        let others = self.0.iter().filter(|(_, tenure)| !tenure.leads).map(|(namespace, tenure)| match (&tenure.holder, &tenure.unknown) {
            (Some((holder, _)), _) => (true, left_to(namespace, holder)),
            (None, Some(words)) => (false, format!("namespace {namespace}: {words}")),
            (None, None) => (true, format!("namespace {namespace}: waiting for the election")),
        });
        left.chain(others).collect()
    }

    fn of(&self, namespace: &str) -> Option<&Tenure> {
        self.0.get(ALL).or_else(|| self.0.get(namespace))
    }
}

fn left_to(namespace: &str, holder: &str) -> String {
    format!("namespace {namespace} is left to {holder}")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn tenures<const N: usize>(of: [(&str, Tenure); N]) -> Tenures {
        Tenures(of.map(|(namespace, tenure)| (namespace.to_owned(), tenure)).into())
    }

    #[test]
    fn each_namespace_has_a_term_of_its_own() {
        let [leads, lapsed] =
            [3600, 0].map(|seconds| Tenure { leads: true, until: Some(End::after(Duration::from_secs(seconds))), ..Tenure::default() });
        let holder = Some(("other".to_owned(), "theirs".to_owned()));
        let held = Tenure { holder, ..Tenure::default() };
        let refused = Tenure { unknown: Some("forbidden".to_owned()), ..Tenure::default() };
        let some = tenures([("a", leads), ("b", lapsed), ("c", held), ("d", refused)]);
        let each = ["a", "b", "c", "d", "e"];
        assert!(some.leads());
        assert_eq!(each.map(|namespace| some.leads_in(namespace)), [true, true, false, false, false]);
        assert_eq!(each.map(|namespace| some.may_write(namespace)), [true, false, false, false, false]);
        assert_eq!(some.elsewhere(), [(true, "namespace c is left to other".to_owned()), (false, "namespace d: forbidden".to_owned())]);
    }

    #[test]
    fn the_term_for_all_namespaces_holds_in_each_that_is_not_left_to_another() {
        let left = [("own".to_owned(), "single".to_owned())].into();
        let all = tenures([(ALL, Tenure { leads: true, left, ..Tenure::default() })]);
        assert!(all.leads_in("team") && all.may_write("team") && !all.leads_in("own"));
        assert_eq!(all.elsewhere(), [(true, "namespace own is left to single".to_owned())]);
    }
}
