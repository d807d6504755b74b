//! What a pool computes on, and how much memory keys and values have there.

use carryon_crds::pool::{Device, Engine};
use carryon_crds::quantity::Bytes;

use super::{BaseArgs, BaseError};

/// Keys and values have one part in so many of the memory that the process may use, when the configuration does not say.
const PART_OF_LIMIT: u64 = 4;
/// So many hundredths of what the weights leave free on a GPU.
const HUNDREDTHS_OF_DEVICE: u64 = 80;

/// Where a pool's arithmetic runs, and on how much memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// What it runs on; never `auto` where the worker has no choice.
    pub device: Device,
    /// Bytes of keys and values, where the configuration says.
    pub kv_cache_bytes: Option<u64>,
    /// Bytes of memory that the process may use, where that is known.
    pub memory_limit: Option<u64>,
    /// Threads of the model's arithmetic; all cores when absent.
    pub threads: Option<usize>,
}

impl Placement {
    /// The CPU, with so many threads.
    pub fn cpu(threads: usize) -> Self {
        Self { device: Device::Cpu, kv_cache_bytes: None, memory_limit: None, threads: Some(threads) }
    }

    /// What the command line and the configuration say together to a worker that is built for CUDA, or is not.
    ///
    /// # Errors
    /// A device that the worker is not built for; keys and values for which there is no room beside the weights.
    pub fn new(args: &BaseArgs, engine: &Engine, built_for_cuda: bool) -> Result<Self, BaseError> {
        let device = match args.device.unwrap_or(engine.device) {
            Device::Auto if !built_for_cuda => Device::Cpu,
            device @ Device::Cuda(_) if !built_for_cuda => return Err(BaseError::WithoutCuda { device }),
            device => device,
        };
        match (engine.kv_cache_memory, args.memory_limit.map(Bytes)) {
            (Some(wanted), Some(limit)) if wanted >= limit && device == Device::Cpu => Err(BaseError::KvCacheTooLarge { wanted, limit }),
            (wanted, limit) => {
                Ok(Self { device, kv_cache_bytes: wanted.map(u64::from), memory_limit: limit.map(u64::from), threads: args.threads })
            }
        }
    }

    /// Bytes of keys and values for a process that may use `memory` bytes, or with `device` bytes free on a device that has memory of its own,
    /// once the weights are there.
    pub fn kv_cache(&self, memory: u64, device: Option<u64>) -> u64 {
        let share = device.map_or(memory / PART_OF_LIMIT, |free| free / 100 * HUNDREDTHS_OF_DEVICE);
        self.kv_cache_bytes.unwrap_or(share)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: BaseArgs,
    }

    /// Of a command line and a configuration's `engine`.
    fn placement(line: &str, engine: &str, built_for_cuda: bool) -> Result<Placement, String> {
        let line = format!("worker --config c --model m {line}");
        let args = Cli::try_parse_from(line.split_whitespace()).unwrap().args;
        Placement::new(&args, &serde_json::from_str(engine).unwrap(), built_for_cuda).map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_line_wins_over_the_configuration() {
        let device = |line, engine, cuda| placement(line, engine, cuda).map(|placement| placement.device);
        let without = |device| {
            Err(format!("engine.device is {device}, and this worker is built without CUDA: start the image for CUDA, or say auto or cpu"))
        };
        for (line, engine, cuda, expected) in [
            ("", "{}", false, Ok(Device::Cpu)),
            ("", "{}", true, Ok(Device::Auto)),
            ("", r#"{"device": "cuda:1"}"#, true, Ok(Device::Cuda(1))),
            ("", r#"{"device": "cuda:1"}"#, false, without("cuda:1")),
            ("--device cpu", r#"{"device": "cuda"}"#, false, Ok(Device::Cpu)),
            ("--device cuda", r#"{"device": "cpu"}"#, true, Ok(Device::Cuda(0))),
            ("--device cuda", "{}", false, without("cuda")),
        ] {
            assert_eq!(device(line, engine, cuda), expected, "{line} {engine} {cuda}");
        }
    }

    #[test]
    fn keys_and_values_have_what_the_configuration_says_or_a_share() {
        let limited = "--memory-limit 8000";
        for (engine, device, bytes) in [
            ("{}", None, 2000),
            ("{}", Some(5000), 4000),
            (r#"{"kvCacheMemory": 7000}"#, None, 7000),
            (r#"{"kvCacheMemory": 7000}"#, Some(5000), 7000),
        ] {
            assert_eq!(placement(limited, engine, false).unwrap().kv_cache(8000, device), bytes, "{engine} {device:?}");
        }
        let error = placement(limited, r#"{"kvCacheMemory": "8k"}"#, false).unwrap_err();
        assert_eq!(error, "engine.kvCacheMemory: 8000 and the weights do not fit into the pod's memory: 8000");
    }
}
