//! What the pods of all objects get, beside what their own templates say.

use std::str::FromStr;

use carryon_crds::common::{LocalReference, PodTemplate};
use k8s_openapi::api::core::v1::EnvVar;
use serde::Deserialize;

/// What whoever installs the operator gives every worker's pod that is rendered from now on.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PodDefaults {
    /// Secrets of the pods' own namespaces with registry credentials.
    pub image_pull_secrets: Vec<LocalReference>,
    /// Environment variables of the worker's container.
    pub env: Vec<EnvVar>,
}

impl PodDefaults {
    /// `template`, and what it does not name itself.
    pub fn fill(&self, template: &PodTemplate) -> PodTemplate {
        let mut filled = template.clone();
        let secrets = self.image_pull_secrets.iter().filter(|secret| !template.image_pull_secrets.contains(secret));
        filled.image_pull_secrets.extend(secrets.cloned());
        let own = |name: &str| template.env.iter().any(|variable| variable.name == name);
        // First: what is defined later may refer to what was defined before.
        filled.env = self.env.iter().filter(|variable| !own(&variable.name)).chain(&template.env).cloned().collect();
        filled
    }
}

impl FromStr for PodDefaults {
    type Err = serde_yaml::Error;

    /// From YAML, or JSON, which is YAML too.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        serde_yaml::from_str(text)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_template_names_itself_wins() {
        let defaults: PodDefaults = r#"{"imagePullSecrets": [{"name": "mirror"}], "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "1"}]}"#.parse().unwrap();
        let filled = |template: serde_json::Value| serde_json::to_value(defaults.fill(&serde_json::from_value(template).unwrap())).unwrap();
        let bare = filled(json!({}));
        assert_eq!(bare["imagePullSecrets"], json!([{ "name": "mirror" }]));
        assert_eq!(bare["env"], json!([{ "name": "A", "value": "1" }, { "name": "B", "value": "1" }]));
        let own = filled(json!({
            "imagePullSecrets": [{ "name": "own" }, { "name": "mirror" }],
            "env": [{ "name": "C", "value": "$(B)" }, { "name": "A", "value": "2" }],
        }));
        assert_eq!(own["imagePullSecrets"], json!([{ "name": "own" }, { "name": "mirror" }]));
        assert_eq!(own["env"], json!([{ "name": "B", "value": "1" }, { "name": "C", "value": "$(B)" }, { "name": "A", "value": "2" }]));
    }

    #[test]
    fn what_nobody_reads_is_refused() {
        assert!("{imagePullSecret: []}".parse::<PodDefaults>().is_err());
        assert_eq!("{}".parse::<PodDefaults>().unwrap(), PodDefaults::default());
    }
}
