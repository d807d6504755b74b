"""Hidden states and logits of the families that the decoder runs: tiny random checkpoints with every special case of theirs.

What a family's own transformers class computes in f32. How far its bf16 is off, by the worst row of all taps, is printed: the tests allow that.
"""

import json
import pathlib

import torch
import transformers
from safetensors.torch import load_file, save_file

from common import difference, save, save_json
from llama import states

# Longer than the windows, than the context before a scaling, and than one page of keys and values is cut into.
LENGTHS = [37, 3, 9]
SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, rms_norm_eps=1e-5, initializer_range=0.15, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)


def rope(kind: str, theta: float = 1000.0, **more) -> dict:
    return {"rope_type": kind, "rope_theta": theta, **more}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.8, mscale_all_dim=0.7)
LATENT = dict(kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, moe_intermediate_size=24, first_k_dense_replace=1,
              num_key_value_heads=4, initializer_range=0.1, num_experts_per_tok=3)
FAMILIES = {
    "deepseek_v2": ("DeepseekV2", dict(**LATENT, q_lora_rank=20, n_routed_experts=8, n_shared_experts=2, topk_method="group_limited_greedy",
                                       n_group=4, topk_group=2, routed_scaling_factor=3.0, rope_parameters=YARN)),
    "deepseek_v2_lite": ("DeepseekV2", dict(**LATENT, q_lora_rank=None, n_routed_experts=6, n_shared_experts=1, topk_method="greedy",
                                            tie_word_embeddings=True, rope_parameters=rope("default"))),
    "deepseek_v3": ("DeepseekV3", dict(**LATENT, q_lora_rank=20, n_routed_experts=8, n_shared_experts=1, n_group=4, topk_group=2,
                                       norm_topk_prob=True, routed_scaling_factor=2.5, rope_parameters=YARN)),
    "deepseek_v3_halves": ("DeepseekV3", dict(**LATENT, q_lora_rank=None, n_routed_experts=6, n_shared_experts=2, n_group=1, topk_group=1,
                                              norm_topk_prob=False, routed_scaling_factor=0.8, rope_interleave=False, rope_parameters=rope("default"))),
    "gemma2": ("Gemma2", dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
                              rope_parameters=rope("default"))),
    "gemma3": ("Gemma3", dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=12, layer_types=["sliding_attention", "full_attention"] * 2,
                              num_hidden_layers=4, rope_parameters={"sliding_attention": rope("default", 50.0),
                                                                    "full_attention": rope("linear", 5000.0, factor=4.0)})),
    "glm4": ("Glm4", dict(head_dim=16, attention_bias=True, rope_parameters=rope("default", partial_rotary_factor=0.5))),
    "llama3": ("Llama", dict(tie_word_embeddings=True, rope_parameters=rope(
        "llama3", 500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32))),
    "llama_linear": ("Llama", dict(attention_bias=True, head_dim=12, rope_parameters=rope("linear", factor=2.0))),
    "llama_dynamic": ("Llama", dict(num_key_value_heads=4, rope_parameters=rope("dynamic", factor=4.0))),
    "mistral": ("Mistral", dict(sliding_window=8, rope_parameters=rope("default"))),
    "mixtral": ("Mixtral", dict(num_local_experts=6, num_experts_per_tok=2, rope_parameters=rope("default"))),
    "olmo2": ("Olmo2", dict(rope_parameters=rope("default"))),
    "phi3": ("Phi3", dict(sliding_window=12, original_max_position_embeddings=64, tie_word_embeddings=False, rope_parameters=rope(
        "longrope", partial_rotary_factor=0.75, original_max_position_embeddings=64,
        short_factor=[1.0, 1.5, 2.0], long_factor=[2.0, 3.0, 4.0]), hidden_size=32)),
    "qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1, tie_word_embeddings=True,
                            rope_parameters=rope("default"))),
    "qwen2_yarn": ("Qwen2", dict(rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16))),
    "qwen3": ("Qwen3", dict(head_dim=16, rope_parameters=rope("default"))),
    "qwen3_moe": ("Qwen3Moe", dict(head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True,
                                   mlp_only_layers=[0], rope_parameters=rope("default"))),
    "qwen3_moe_whole": ("Qwen3Moe", dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=False,
                                         rope_parameters=rope("default"))),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 0, 1], tie_word_embeddings=True, rope_parameters=rope("default"))),
}


def tokens_of(index: int) -> list[int]:
    generator = torch.Generator().manual_seed(3 + index)
    return torch.randint(3, SIZES["vocab_size"], (LENGTHS[index],), generator=generator).tolist()


@torch.inference_mode()
def narrowest_choice(model) -> float:
    """By how much, in deviations, the last expert or group that a row goes to is ahead of the first that it does not go to, in the closest case."""
    gaps = [float("inf")]

    def ahead(scores, top):
        scores = scores.sort(dim=-1, descending=True).values
        return float((scores[:, top - 1] - scores[:, top]).min()) if top < scores.shape[1] else float("inf")

    def look(router, _inputs, output):
        scores, groups = output[0], getattr(router, "num_group", None) or 1
        deviation = scores.std()
        if hasattr(router, "e_score_correction_bias"):
            scores = scores.sigmoid()
            deviation = scores.std()
            scores = scores + router.e_score_correction_bias
        elif getattr(router, "topk_method", "") == "greedy":
            groups = 1
        if groups > 1:
            apart = scores.unflatten(-1, (groups, -1))
            best = apart.topk(2 if hasattr(router, "e_score_correction_bias") else 1, dim=-1).values.sum(dim=-1)
            gaps.append(ahead(best, router.topk_group) / deviation)
            kept = torch.zeros_like(best).scatter(1, best.topk(router.topk_group, dim=-1).indices, 1).bool()
            scores = scores.masked_fill(~kept.repeat_interleave(apart.shape[-1], dim=-1), -1e9)
        gaps.append(ahead(scores, router.top_k) / deviation)

    handles = [module.register_forward_hook(look) for name, module in model.named_modules() if type(module).__name__.endswith("Router")]
    for index in range(len(LENGTHS)):
        model(input_ids=torch.tensor([tokens_of(index)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return min(gaps)


def random_model(family: str, changes: dict):
    """A model in which no expert is chosen so narrowly that rounding to bf16 would choose another."""
    return next(model for seed in range(7, 1000) if narrowest_choice(model := seeded_model(family, changes, seed)) > 0.02)


def seeded_model(family: str, changes: dict, seed: int):
    """Weights rounded to bf16, so that a pool of either dtype has the same ones."""
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**SIZES | changes)).eval()
    model.config._attn_implementation = "eager"
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            low, high = (-0.5, 0.5) if family.startswith("Gemma") else (0.5, 1.5)
            parameter.data.uniform_(low, high)
        elif name.endswith("bias"):
            parameter.data.uniform_(-0.5, 0.5)
        parameter.data = parameter.data.bfloat16().float()
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.uniform_(-0.3, 0.3)
    return model


def generate_families(folder: pathlib.Path) -> None:
    for name, (family, changes) in FAMILIES.items():
        model = random_model(family, changes)
        checkpoint = folder / "families" / name
        model.save_pretrained(checkpoint)
        config = json.loads((checkpoint / "config.json").read_text())
        config.pop("transformers_version", None)
        weights = load_file(checkpoint / "model.safetensors")
        for path in checkpoint.iterdir():
            path.unlink()
        save_json(checkpoint / "config.json", config | {"dtype": "bfloat16"})
        save_file({name: tensor if name.endswith("correction_bias") else tensor.bfloat16() for name, tensor in weights.items()},
                  checkpoint / "model.safetensors", {"format": "pt"})
        tensors, seen = {}, []
        for index in range(len(LENGTHS)):
            tokens = tokens_of(index)
            tensors[f"{index}.tokens"] = torch.tensor(tokens, dtype=torch.uint32)
            own = states(model, tokens)
            tensors |= {f"{index}.{tap}": tensor for tap, tensor in own.items()}
            seen.append((tokens, own))
        model = model.bfloat16()
        off = max(difference(own[tap], tensor) for tokens, own in seen for tap, tensor in states(model, tokens).items())
        save(checkpoint / "states.safetensors", tensors)
        print(f"  {name}: bf16 of transformers is off by {off:.1e}")
