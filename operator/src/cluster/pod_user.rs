//! Who the workers' pods run as: a user of ours, or whom the cluster picks.

use std::str::FromStr;

use kube::Client;

use crate::shared::Settings;

/// API group of OpenShift's security context constraints: they give each namespace users and groups of its own, put them into pods that name
/// none, and refuse pods that name others.
const OPENSHIFT: &str = "security.openshift.io";

/// User, and group of written volumes, of the workers' pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodUser {
    /// Ours, unless the cluster picks one.
    Auto,
    /// Whom the cluster picks.
    Cluster,
    /// This one.
    Fixed(i64),
}

impl PodUser {
    /// The number to write into pods; none where the cluster picks one.
    pub async fn resolve(self, client: &Client) -> kube::Result<Option<i64>> {
        Ok(match self {
            Self::Fixed(user) => Some(user),
            Self::Cluster => None,
            Self::Auto if client.list_api_groups().await?.groups.iter().any(|group| group.name == OPENSHIFT) => None,
            Self::Auto => Settings::default().pod_user,
        })
    }
}

impl FromStr for PodUser {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cluster" => Ok(Self::Cluster),
            number => {
                number.parse().ok().filter(|user| *user > 0).map(Self::Fixed).ok_or("neither auto, cluster nor a user above 0".to_owned())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::PodUser;

    #[test]
    fn a_user_is_a_number_or_whom_the_cluster_picks() {
        for (text, user) in [("auto", PodUser::Auto), ("cluster", PodUser::Cluster), ("1000680000", PodUser::Fixed(1_000_680_000))] {
            assert_eq!(text.parse(), Ok(user));
        }
        assert!(["0", "-1", "root", ""].iter().all(|text| text.parse::<PodUser>().is_err()));
    }
}
