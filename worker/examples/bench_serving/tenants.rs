//! Heads of many tenants, as if they had been trained on the pool's base.

use std::time::Duration;

use carryon_crds::common::{TapPreset, Taps};
use carryon_crds::job::{HeadSpec, Task};
use carryon_crds::wire::{BaseReference, HeadShape};
use carryon_worker::head::{Artifact, init};

use crate::Bench;

/// With the width of SmolLM2: 271,000 parameters, 1.1 MB.
const WIDTH: u32 = 64;
/// How long the pool keeps a head: longer than any row takes.
const EXPIRY: Duration = Duration::from_secs(3600);

impl Bench {
    /// Pushes `count` heads, each with its own weights; returns their digests.
    pub async fn push_heads(&self, count: u64) -> anyhow::Result<Vec<String>> {
        let mut digests = Vec::new();
        for seed in 0..count {
            let head = self.head(seed)?;
            for pod in self.client.endpoints().await? {
                self.client.put_head(&pod, &head.digest, head.to_bytes(), EXPIRY).await?;
            }
            digests.push(head.digest);
        }
        Ok(digests)
    }

    /// A head whose output is small and not zero, as after some steps of training: it chooses tokens of its own.
    fn head(&self, seed: u64) -> anyhow::Result<Artifact> {
        let shape = self.shape();
        let mut weights = init::weights(&shape, seed);
        let random = init::weights(&shape, seed + (1 << 32)).remove("bridge.0.weight");
        if let (Some(output), Some(random)) = (weights.get_mut("output.weight"), random) {
            output.values = random.values.floats().iter().map(|value| 0.1 * value).collect::<Vec<_>>().into();
        }
        let base = BaseReference { name: self.model.name.clone(), identity: self.model.identity.clone(), others: Vec::new() };
        Ok(Artifact::new(shape, base, weights)?)
    }

    fn shape(&self) -> HeadShape {
        let head = HeadSpec { width: WIDTH, blocks: 1, gate: false, ..HeadSpec::default() };
        head.shape(Task::CausalLM, Taps::of(TapPreset::Balanced, self.model.num_hidden_layers), self.model.hidden_size, 1024)
    }
}
