"""Models of experts and of latent attention, of random weights in the published shapes made smaller, beside transformers on the same files."""

import gc
import json
import pathlib
import shutil
import subprocess
import time

from peers import best
from rows import THREADS, result, rust

TORCH = "transformers bf16"
REPEATS = 2
DECODED = 48  # tokens of a round of decoding

# 2.6B parameters, of which a token meets 0.5B.
QWEN3_MOE = ("Qwen3Moe", dict(
    hidden_size=1024, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=4, head_dim=128, vocab_size=32768,
    num_experts=64, num_experts_per_tok=8, moe_intermediate_size=768, intermediate_size=2048, norm_topk_prob=True, max_position_embeddings=4096,
))
# Heads, ranks and experts of DeepSeek-V2-Lite, at half its width and depth: 1.4B parameters, of which a token meets 0.3B.
DEEPSEEK_V2 = ("DeepseekV2", dict(
    hidden_size=1024, num_hidden_layers=14, num_attention_heads=8, num_key_value_heads=8, vocab_size=32768, q_lora_rank=None, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=32, num_experts_per_tok=6, n_shared_experts=2,
    moe_intermediate_size=704, intermediate_size=5472, first_k_dense_replace=1, topk_method="greedy", max_position_embeddings=4096,
))


class Random:
    """A model of random weights, and its folder."""

    def __init__(self, family: str, sizes: dict, folder: pathlib.Path):
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        self.torch, self.folder = torch, folder
        config = getattr(transformers, f"{family}Config")(**sizes, dtype=torch.bfloat16)
        torch.manual_seed(0)
        with torch.device("meta"):
            model = getattr(transformers, f"{family}ForCausalLM")(config)
        self.model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
        # Rotary frequencies are no weights: a model of the same family on the CPU has them.
        small = getattr(transformers, f"{family}ForCausalLM")(type(config)(**sizes | dict(num_hidden_layers=1, vocab_size=64)))
        for (_, ours), (_, theirs) in zip(self.model.model.rotary_emb.named_buffers(), small.model.rotary_emb.named_buffers()):
            ours.copy_(theirs)
        for name, parameter in self.model.named_parameters():
            parameter.data.fill_(1.0) if name.endswith("norm.weight") else parameter.data.uniform_(-0.03, 0.03)
        self.tokens = torch.randint(0, config.vocab_size, (8, 256), generator=torch.Generator().manual_seed(0))
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def save(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.model.save_pretrained(self.folder, max_shard_size="1GB")

    def hidden_states_8x256(self) -> float:
        with self.torch.inference_mode():
            return 2048 / best(lambda: self.model.model(input_ids=self.tokens, use_cache=False), REPEATS)

    def decode(self) -> float:
        """Tokens a second of one sequence from its first token on."""
        with self.torch.inference_mode():
            taken = []
            for _ in range(REPEATS + 1):
                cache, token = None, self.tokens[:1, :1]
                started = time.perf_counter()
                for _ in range(DECODED):
                    answer = self.model(input_ids=token, past_key_values=cache, use_cache=True)
                    cache, token = answer.past_key_values, answer.logits[:, -1:].argmax(-1)
                taken.append(time.perf_counter() - started)
            return DECODED / min(taken[1:])


# 2.2 GB in bf16, without anything that is kept twice but the LM head.
LLAMA = ("Llama", dict(
    hidden_size=2048, num_hidden_layers=18, num_attention_heads=16, num_key_value_heads=4, intermediate_size=7168, vocab_size=32768,
    max_position_embeddings=4096,
))


def load(cache: pathlib.Path, rounds: int) -> list[dict]:
    """A sharded checkpoint in the page cache: bytes a second of its load, digest and packing in it, on one core and on all, against `cat` of its files."""
    model = Random(*LLAMA, cache / "load")
    model.save()
    files = sorted(str(path) for path in model.folder.glob("*.safetensors"))
    size = sum(pathlib.Path(path).stat().st_size for path in files)
    del model
    gc.collect()
    cat, ours, peaks = [], {1: [], THREADS: []}, []
    for _ in range(rounds):
        for threads, rates in ours.items():
            started = time.perf_counter()
            subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
            cat.append(size / (time.perf_counter() - started))
            # One core is one core: the digest has a thread of its own.
            cores = ["taskset", "-c", ",".join(map(str, range(threads)))]
            arguments = ["--threads", threads, "--matrices", "no", "--forward", "no", "--model", cache / "load"]
            figures = rust("bench_engine", *arguments, before=cores)
            rates.append(size / figures["load"][0])
            peaks.append(figures["peak_rss"][0] / figures["weights"][0])
    shutil.rmtree(cache / "load")
    table = [result(f"load_on_{threads}_per_core", "bytes/s", [rate / threads for rate in rates], cat, "cat") for threads, rates in ours.items()]
    return table + [result("load_peak_rss_over_packed", "ratio", peaks, 1.1, "goal", smaller_is_better=True)]


def rows(cache: pathlib.Path, rounds: int) -> list[dict]:
    table = load(cache, rounds)
    for name, (family, sizes), figure in (("qwen3_moe_2.6b", QWEN3_MOE, "hidden_states_8x256"), ("deepseek_v2_lite_shaped", DEEPSEEK_V2, "decode")):
        model = Random(family, sizes, cache / name)
        model.save()
        print(json.dumps({"model": name, "parameters": model.parameters}), flush=True)
        ours, theirs = [], []
        for _ in range(rounds):
            theirs.append(getattr(model, figure)())
            print(f"  {figure:34} {theirs[-1]:12.4g} {TORCH}", flush=True)
            ours += rust("bench_engine", "--threads", THREADS, "--repeats", REPEATS, "--matrices", "no", "--model", model.folder)[figure]
        table.append(result(f"{name}_{figure}", "tokens/s", ours, theirs, TORCH))
        shutil.rmtree(model.folder)
        del model
        gc.collect()
    return table
