//! What a head starts with that has blocks and bridges of another one.

use std::collections::BTreeMap;

use carryon_crds::common::Taps;
use carryon_crds::wire::{BaseReference, HeadShape, Identity};

/// A head whose blocks and bridges another one cannot have.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("{member} is {found}, asked for is {wanted}")]
pub struct Unlike {
    /// Of its shape, or its base.
    pub member: &'static str,
    /// As it is.
    pub found: String,
    /// As it would have to be.
    pub wanted: String,
}

/// Blocks, and bridges of the same taps: by their names in the old head those in the new one.
///
/// # Errors
/// Blocks of another shape; another base.
pub fn inherited(
    (old, old_base): (&HeadShape, &BaseReference),
    (new, base): (&HeadShape, &BaseReference),
) -> Result<BTreeMap<String, String>, Unlike> {
    let unlike = |member, found: String, wanted: String| Unlike { member, found, wanted };
    if let Some(part) = old_base.identity.difference(&base.identity) {
        let text = |base: &BaseReference| format!("{} ({})", base.name, base.identity.digest());
        return Err(unlike("the base", format!("{}, whose {part} differs", text(old_base)), text(base)));
    }
    for (member, found, wanted) in [
        ("width", old.width, new.width),
        ("blocks", old.blocks, new.blocks),
        ("attentionHeads", old.heads, new.heads),
        ("the width of its feed-forward layer", old.feed_forward, new.feed_forward),
    ] {
        if found != wanted {
            return Err(unlike(member, found.to_string(), wanted.to_string()));
        }
    }
    for (member, found, wanted) in [("rope_theta", old.rope_theta, new.rope_theta), ("norm_epsilon", old.norm_epsilon, new.norm_epsilon)] {
        if found.to_bits() != wanted.to_bits() {
            return Err(unlike(member, found.to_string(), wanted.to_string()));
        }
    }
    let (theirs, ours) = (taps(old, old_base), taps(new, base));
    let bridge = |tap: usize| format!("bridge.{tap}.weight");
    let bridges = ours.iter().enumerate().filter_map(|(to, tap)| Some((bridge(theirs.iter().position(|other| other == tap)?), bridge(to))));
    let blocks = new.tensors().into_keys().filter(|name| name.starts_with("blocks.")).map(|name| (name.clone(), name));
    Ok(bridges.chain(blocks).collect())
}

/// Base and layer of each bridge, in their order; the final norm has no layer.
fn taps<'a>(shape: &'a HeadShape, base: &'a BaseReference) -> Vec<(&'a Identity, Option<u32>)> {
    let others = shape.others.iter().map(|other| &other.taps).zip(&base.others);
    let of = |(taps, base): (&'a Taps, &'a BaseReference)| {
        let layers = taps.layers.iter().copied().map(Some).chain(taps.final_norm.then_some(None));
        layers.map(|layer| (&base.identity, layer)).collect::<Vec<_>>()
    };
    std::iter::once((&shape.taps, base)).chain(others).flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use carryon_crds::job::{HeadSpec, Task};
    use carryon_crds::wire::OtherBase;

    use super::*;

    fn base(weights: &str, others: &[&str]) -> BaseReference {
        let text = str::to_owned;
        let identity = Identity { weights: text(weights), tokenizer: text("t"), chat_template: text("c"), norm_point: text("final_norm") };
        BaseReference { name: text("tiny"), identity, others: others.iter().map(|other| base(other, &[])).collect() }
    }

    fn taps(layers: &[u32], final_norm: bool) -> Taps {
        Taps { layers: layers.to_vec(), final_norm }
    }

    fn shape(own: Taps, others: &[Taps]) -> HeadShape {
        let spec = HeadSpec { width: 16, blocks: 1, ..HeadSpec::default() };
        let others = others.iter().map(|taps| OtherBase { taps: taps.clone(), hidden_size: 8 }).collect();
        spec.shape(Task::CausalLM, own, 16, 4).mixing(others)
    }

    fn bridges(old: (&HeadShape, &BaseReference), new: (&HeadShape, &BaseReference)) -> Vec<(String, String)> {
        let mut names = inherited(old, new).unwrap();
        names.retain(|name, _| name.starts_with("bridge."));
        names.into_iter().collect()
    }

    fn pairs(numbers: &[(u32, u32)]) -> Vec<(String, String)> {
        numbers.iter().map(|(from, to)| (format!("bridge.{from}.weight"), format!("bridge.{to}.weight"))).collect()
    }

    #[test]
    fn bridges_are_those_of_the_same_tap_of_the_same_base() {
        let (one, two) = (base("a", &[]), base("a", &["b", "c"]));
        let old = shape(taps(&[3, 5], true), &[]);
        assert_eq!(bridges((&old, &one), (&shape(taps(&[1, 5], true), &[]), &one)), pairs(&[(1, 1), (2, 2)]));
        assert_eq!(bridges((&old, &one), (&shape(taps(&[4], false), &[]), &one)), []);
        let several = shape(taps(&[5], false), &[taps(&[3], true), taps(&[3, 5], false)]);
        assert_eq!(bridges((&old, &one), (&several, &two)), pairs(&[(1, 0)]));
        // The others in another order: by what they are, not by their place.
        let turned = shape(taps(&[5], true), &[taps(&[5], false), taps(&[3], true)]);
        assert_eq!(bridges((&several, &two), (&turned, &base("a", &["c", "b"]))), pairs(&[(0, 0), (1, 3), (2, 4), (4, 2)]));
    }

    #[test]
    fn another_task_has_the_same_blocks_and_no_more() {
        let (old, base) = (shape(taps(&[3], true), &[]), base("a", &[]));
        let spec = HeadSpec { width: 16, blocks: 1, labels: Some(vec!["x".to_owned(), "y".to_owned()]), ..HeadSpec::default() };
        let new = spec.shape(Task::Classification, taps(&[3], true), 16, 9);
        let names = inherited((&old, &base), (&new, &base)).unwrap();
        assert!(names.iter().all(|(from, to)| from == to && (from.starts_with("bridge.") || from.starts_with("blocks."))), "{names:?}");
        assert_eq!(names.len(), 2 + 9);
    }

    #[test]
    fn a_head_of_another_kind_is_refused_by_what_it_is() {
        let (old, own) = (shape(taps(&[3], true), &[]), base("a", &[]));
        let refused = |change: &dyn Fn(&mut HeadShape), base: &BaseReference| {
            let mut new = old.clone();
            change(&mut new);
            inherited((&old, &own), (&new, base)).unwrap_err().to_string()
        };
        assert_eq!(refused(&|new| new.width = 32, &own), "width is 16, asked for is 32");
        assert_eq!(refused(&|new| new.blocks = 3, &own), "blocks is 1, asked for is 3");
        assert_eq!(refused(&|new| new.heads = 2, &own), "attentionHeads is 4, asked for is 2");
        assert_eq!(refused(&|new| new.feed_forward = 64, &own), "the width of its feed-forward layer is 48, asked for is 64");
        assert_eq!(refused(&|new| new.rope_theta = 2.0, &own), "rope_theta is 10000, asked for is 2");
        let other = base("b", &[]);
        let (found, wanted) = (own.identity.digest(), other.identity.digest());
        assert_eq!(refused(&|_| {}, &other), format!("the base is tiny ({found}), whose weights differs, asked for is tiny ({wanted})"));
    }
}
