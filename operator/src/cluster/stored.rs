//! Whether the definitions of this build take what is stored. An API server drops, without a word, what a definition does not know, from an object
//! that is written; so older definitions under newer objects lose what users have asked for, and that cannot be undone.

use anyhow::Context as _;
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde_json::{Value, json};

use super::failure::code;
use crate::admission::{Admission, api_version};

/// Objects of one answer.
const PAGE: u32 = 200;

/// Looks at all objects of the three kinds.
///
/// # Errors
/// When one would lose a field or be refused: a line for each such field. When the API server cannot be asked.
pub fn check() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("failed to start a thread")?;
    let refused = runtime.block_on(async {
        let client = Client::try_default().await.context("failed to find the API server")?;
        refused(&client).await
    })?;
    let advice = "take these out of the objects, or keep the release whose definitions know them";
    anyhow::ensure!(refused.is_empty(), "the definitions of this release do not take what is stored; {advice}:\n{}", refused.join("\n"));
    println!("the definitions of this release take everything that is stored");
    Ok(())
}

/// What these definitions do not take of what is stored, a line each.
pub async fn refused(client: &Client) -> anyhow::Result<Vec<String>> {
    let admission = Admission::new().map_err(anyhow::Error::msg)?;
    let mut refused = of_kind::<BaseModelPool>(client, &admission).await?;
    refused.extend(of_kind::<CarryOnJob>(client, &admission).await?);
    refused.extend(of_kind::<CarryOnDeployment>(client, &admission).await?);
    Ok(refused)
}

async fn of_kind<K: Resource<DynamicType = ()>>(client: &Client, admission: &Admission) -> anyhow::Result<Vec<String>> {
    let objects = Api::<DynamicObject>::all_with(client.clone(), &ApiResource::erase::<K>(&()));
    let (mut refused, mut page) = (Vec::new(), ListParams::default().limit(PAGE));
    loop {
        let list = match objects.list(&page).await {
            Ok(list) => list,
            // Nothing is stored of what is not defined.
            Err(error) if code(&error) == 404 => return Ok(refused),
            Err(error) => return Err(error).with_context(|| format!("failed to list {}", K::plural(&()))),
        };
        refused.extend(list.items.iter().flat_map(|object| violations::<K>(admission, object)));
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = ListParams::default().limit(PAGE).continue_token(&token),
            None => return Ok(refused),
        }
    }
}

/// What these definitions do not take of an object. Its status is the operator's, which writes it anew.
fn violations<K: Resource<DynamicType = ()>>(admission: &Admission, object: &DynamicObject) -> Vec<String> {
    let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
    let metadata = json!({ "name": name, "namespace": namespace });
    let spec = object.data.get("spec").cloned().unwrap_or(Value::Null);
    let stored = json!({ "apiVersion": api_version(), "kind": K::kind(&()), "metadata": metadata, "spec": spec });
    let violations = admission.admit(&stored, None).err().unwrap_or_default();
    violations.iter().map(|violation| format!("{} {namespace}/{name}: {violation}", K::kind(&()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_of_a_newer_release_is_named_with_the_fields_that_it_would_lose() {
        let admission = Admission::new().unwrap();
        let stored = |spec: Value| {
            let metadata = json!({ "name": "a", "namespace": "team", "resourceVersion": "7", "managedFields": [] });
            let object = json!({ "metadata": metadata, "spec": spec, "status": { "fresh": 1 } });
            violations::<BaseModelPool>(&admission, &serde_json::from_value(object).unwrap())
        };
        let model = json!({ "source": { "persistentVolumeClaim": { "claimName": "models" } } });
        assert_eq!(stored(json!({ "model": model })), [""; 0]);
        let fresh = stored(json!({ "model": model, "fresh": 1, "engine": { "fresh": 2 } }));
        assert_eq!(fresh, ["BaseModelPool team/a: spec.engine.fresh: unknown field", "BaseModelPool team/a: spec.fresh: unknown field"]);
        let value = stored(json!({ "model": model, "dtype": "float8" }));
        assert!(value.len() == 1 && value[0].starts_with("BaseModelPool team/a: spec.dtype: "), "{value:?}");
    }
}
