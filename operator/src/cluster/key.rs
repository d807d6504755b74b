//! Which object is meant: kind, namespace and name.

use std::fmt;

use kube::{Resource, ResourceExt as _};

/// One of the three kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `BaseModelPool`.
    Pool,
    /// `CarryOnJob`.
    Job,
    /// `CarryOnDeployment`.
    Deployment,
}

impl Kind {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Pool, Self::Job, Self::Deployment];

    /// Its name in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pool => "BaseModelPool",
            Self::Job => "CarryOnJob",
            Self::Deployment => "CarryOnDeployment",
        }
    }

    /// The `app.kubernetes.io/component` of its pods and other children.
    pub fn component(self) -> &'static str {
        match self {
            Self::Pool => "pool",
            Self::Job => "trainer",
            Self::Deployment => "gateway",
        }
    }
}

/// An object of one of the three kinds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl Key {
    /// The key of `object`.
    pub fn of<K: Resource>(kind: Kind, object: &K) -> Self {
        Self { kind, namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}/{}", self.kind.name(), self.namespace, self.name)
    }
}
