//! What the `quantization_config` of a `config.json` says of the weights.

use serde_json::{Value, json};

use super::tensor::SCALED_BLOCK;

/// Why weights of this `quantization_config` cannot be read: the member, what it says, and what is read instead. None when they can be.
///
/// Read are floats of 8 bits with a scale for each block, as DeepSeek-V3 has them. Which tensors are stored so is seen from the tensors themselves.
/// How activations are rounded where products are made in 8 bits is of no meaning here: ours are not.
pub(super) fn unsupported(config: &Value) -> Option<String> {
    let members = [
        ("quant_method", json!("fp8"), Value::Null),
        ("fmt", json!("e4m3"), json!("e4m3")),
        // Without it there is one scale for a whole tensor.
        ("weight_block_size", json!([SCALED_BLOCK, SCALED_BLOCK]), Value::Null),
        // Otherwise the checkpoint has scales for activations too.
        ("activation_scheme", json!("dynamic"), json!("dynamic")),
    ];
    members.iter().find_map(|(member, read, default)| {
        let found = config.get(member).unwrap_or(default);
        (found != read).then(|| format!("{member} {found}, where {read} is read,"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `config.json` of DeepSeek-V3 and V3.1, Qwen3-8B-FP8.
    #[test]
    fn scaled_blocks_of_eight_bits_are_read() {
        let deepseek = json!({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]});
        assert_eq!(unsupported(&deepseek), None);
        let mut later = deepseek.clone();
        later["scale_fmt"] = json!("ue8m0");
        assert_eq!(unsupported(&later), None);
        let qwen = json!({"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]});
        assert_eq!(unsupported(&qwen), None);
    }

    #[test]
    fn other_quantizations_are_refused_by_member() {
        let fp8 = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
        for (member, found, expected) in [
            ("quant_method", json!("awq"), "quant_method \"awq\", where \"fp8\" is read,"),
            ("quant_method", json!("gptq"), "quant_method \"gptq\", where \"fp8\" is read,"),
            ("quant_method", json!("compressed-tensors"), "quant_method \"compressed-tensors\", where \"fp8\" is read,"),
            ("quant_method", Value::Null, "quant_method null, where \"fp8\" is read,"),
            ("fmt", json!("e5m2"), "fmt \"e5m2\", where \"e4m3\" is read,"),
            ("weight_block_size", json!([1, 128]), "weight_block_size [1,128], where [128,128] is read,"),
            ("weight_block_size", Value::Null, "weight_block_size null, where [128,128] is read,"),
            ("activation_scheme", json!("static"), "activation_scheme \"static\", where \"dynamic\" is read,"),
        ] {
            let mut config = fp8.clone();
            config[member] = found;
            assert_eq!(unsupported(&config).as_deref(), Some(expected));
        }
        assert!(unsupported(&json!({"bits": 4})).is_some() && unsupported(&json!("fp8")).is_some());
    }
}
