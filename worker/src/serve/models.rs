//! The models that a gateway serves, by the names that requests call them: its heads, and the base alone.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use carryon_crds::wire::{ServeConfig, ServeHead};

use super::ServeError;
use super::artifact::HeadFile;
use super::error::ApiError;

/// A head.
#[derive(Debug)]
pub(super) struct Head {
    /// Its name in the deployment: what logs and the gateway's own errors call it.
    pub(super) name: String,
    /// What it is.
    pub(super) artifact: HeadFile,
}

/// What a request's `model` names.
#[derive(Clone, Debug)]
pub(super) struct Model {
    /// The name.
    pub(super) name: Arc<str>,
    /// The head; the base alone when absent.
    pub(super) head: Option<Arc<Head>>,
}

impl Model {
    /// Digest of the head.
    pub(super) fn digest(&self) -> Option<&str> {
        self.head.as_ref().map(|head| head.artifact.digest.as_str())
    }
}

/// All models: the heads in the configuration's order, then the base.
#[derive(Debug)]
pub(super) struct Models(Vec<Model>);

impl Models {
    /// Reads and verifies the head of each of `folders`.
    pub(super) fn read(config: &ServeConfig, folders: &[PathBuf]) -> Result<Self, ServeError> {
        let ServeConfig { base_model_name, heads, .. } = config;
        if heads.is_empty() || heads.len() != folders.len() {
            return Err(ServeError::HeadCount { heads: heads.len(), folders: folders.len() });
        }
        let mut names = HashSet::from([base_model_name]);
        if let Some(head) = heads.iter().find(|head| !names.insert(&head.served_model_name)) {
            return Err(ServeError::DuplicateName { head: head.name.clone(), name: head.served_model_name.clone() });
        }
        let mut models = heads.iter().zip(folders).map(|(head, folder)| read(head, folder)).collect::<Result<Vec<_>, _>>()?;
        models.push(Model { name: base_model_name.as_str().into(), head: None });
        Ok(Self(models))
    }

    /// The model that a request names.
    pub(super) fn find(&self, name: &str) -> Result<&Model, ApiError> {
        self.0.iter().find(|model| *model.name == *name).ok_or_else(|| ApiError::model(name, self.names()))
    }

    /// The head, where there is but one.
    pub(super) fn only_head(&self) -> Option<&Model> {
        match self.0.as_slice() {
            [head, _base] => Some(head),
            _ => None,
        }
    }

    /// Every model's name.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|model| &*model.name)
    }

    /// Every head.
    pub(super) fn heads(&self) -> impl Iterator<Item = &Head> {
        self.0.iter().filter_map(|model| model.head.as_deref())
    }
}

fn read(head: &ServeHead, folder: &Path) -> Result<Model, ServeError> {
    let ServeHead { name, served_model_name, digest } = head;
    let artifact = HeadFile::read(folder, digest).map_err(|cause| ServeError::Artifact { head: name.clone(), cause })?;
    Ok(Model { name: served_model_name.as_str().into(), head: Some(Arc::new(Head { name: name.clone(), artifact })) })
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::artifact::tests::artifact;
    use super::*;

    /// Heads of these names and tasks, whose digests are their names, and the base as `base`.
    pub(in crate::serve) fn models(heads: &[(&str, &str)]) -> Models {
        let head = |(name, task): &(&str, &str)| Model {
            name: (*name).into(),
            head: Some(Arc::new(Head { name: format!("{name}-entry"), artifact: artifact(name, task) })),
        };
        let base = Model { name: "base".into(), head: None };
        Models(heads.iter().map(head).chain([base]).collect())
    }

    fn refusal(base: &str, names: &[&str], folders: usize) -> ServeError {
        let head =
            |(entry, name): (usize, &&str)| ServeHead { name: format!("h{entry}"), served_model_name: (*name).into(), digest: "d".into() };
        let heads = names.iter().enumerate().map(head).collect();
        let config = ServeConfig { base_model_name: base.into(), heads, allowed_origins: vec![], namespace: "team".to_owned() };
        Models::read(&config, &vec!["/nowhere".into(); folders]).unwrap_err()
    }

    #[test]
    fn names_are_distinct_and_each_head_has_a_folder() {
        for (names, folders) in [(&[][..], 0), (&[], 1), (&["a"], 0), (&["a"], 2), (&["a", "b"], 1)] {
            let error = refusal("base", names, folders);
            assert!(
                matches!(error, ServeError::HeadCount { heads, folders: given } if (heads, given) == (names.len(), folders)),
                "{error}"
            );
        }
        for (names, head, name) in [(&["a", "a"][..], "h1", "a"), (&["a", "base"], "h1", "base"), (&["base"], "h0", "base")] {
            let error = refusal("base", names, names.len());
            assert!(
                matches!(&error, ServeError::DuplicateName { head: h, name: n } if (h.as_str(), n.as_str()) == (head, name)),
                "{error}"
            );
        }
        let error = refusal("base", &["a", "b"], 2);
        assert!(matches!(&error, ServeError::Artifact { head, .. } if head == "h0"), "the names are in order: {error}");
    }

    #[test]
    fn a_model_is_found_by_its_whole_name() {
        let models = models(&[("maths", "CausalLM"), ("spam", "Classification")]);
        for (name, entry) in [("maths", Some("maths-entry")), ("spam", Some("spam-entry")), ("base", None)] {
            assert_eq!(models.find(name).unwrap().head.as_ref().map(|head| head.name.as_str()), entry);
        }
        for unknown in ["", "math", "maths-entry", "Maths"] {
            let error = models.find(unknown).unwrap_err().body();
            assert_eq!((&error["error"]["param"], &error["error"]["code"]), (&"model".into(), &"model_not_found".into()));
            assert!(error["error"]["message"].as_str().unwrap().ends_with("this endpoint serves maths, spam, base."), "{error}");
        }
        assert!(models.only_head().is_none());
    }
}
