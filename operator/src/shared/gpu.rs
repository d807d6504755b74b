//! Whether pods ask for a GPU, and the image that they are started with then.

use carryon_crds::common::PodTemplate;
use carryon_crds::quantity::value;

use super::{Refusal, Settings};

/// The field by which pods of `template`, which is `field` of its object, ask for a CUDA device.
pub fn asked_by(template: &PodTemplate, field: &str) -> Option<String> {
    resource(template, field).or_else(|| claim(template, field))
}

fn resource(template: &PodTemplate, field: &str) -> Option<String> {
    let lists = [("limits", &template.resources.limits), ("requests", &template.resources.requests)];
    let all = lists.into_iter().flat_map(|(list, quantities)| quantities.iter().map(move |(name, quantity)| (list, name, quantity)));
    let mut some = all.filter(|(_, _, quantity)| value(&quantity.0).is_some_and(|count| count > 0.0));
    some.find(|(_, name, _)| is_cuda(name)).map(|(list, name, _)| format!("{field}.resources.{list}[{name}]"))
}

/// Whole GPUs, shares of them, and MIG slices, under whatever vendor's or scheduler's name. AMD's are no CUDA devices; Intel's have other names.
fn is_cuda(resource: &str) -> bool {
    let Some((domain, name)) = resource.split_once('/') else { return false };
    (name.starts_with("gpu") && domain != "amd.com") || (domain == "nvidia.com" && name.starts_with("mig-"))
}

/// What device is claimed stands in another object, which may not be there yet.
fn claim(template: &PodTemplate, field: &str) -> Option<String> {
    template.scheduling.resource_claims.first().map(|claim| format!("{field}.scheduling.resourceClaims[{}]", claim.name))
}

/// Today's image for pods of `template`, which is `field` of its object, where `asked` says by what they ask for a GPU; `otherwise` is how to do
/// without.
///
/// # Errors
/// They ask for a GPU and name no image, and the operator has none that could use it.
pub fn image(asked: Option<String>, template: &PodTemplate, field: &str, otherwise: &str, settings: &Settings) -> Result<String, Refusal> {
    let Some(asked) = asked.filter(|_| template.image.is_none()) else { return Ok(settings.worker_image.clone()) };
    settings.worker_cuda_image.clone().ok_or_else(|| {
        let message = format!(
            "{asked} asks for a GPU, and the operator has no worker image for CUDA: give it one (workerImage.cuda of the chart, \
             --worker-cuda-image), name one in {field}.image, or {otherwise}"
        );
        Refusal::permanent("NoCudaImage", message)
    })
}
