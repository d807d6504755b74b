"""GGUF files of the families: tiny random checkpoints, written by llama.cpp's own converter; states and logits are those of the same checkpoint in
transformers. llama.cpp itself has to compute these logits too, from the same file in f32, wherever it does what the family's own class does.

What a GGUF file cannot say is not in these checkpoints: windows of Mistral and Qwen 2, other scales than by a head's width, dense layers of Qwen 3 with
experts, a choice of layers without positions.
"""

import copy
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy
import torch

from common import difference, save, save_json
from families import FAMILIES, LATENT, YARN, narrowest_choice, random_model, rope, tokens_of
from llama import states

TOKENS = 17
SMALL = dict(num_hidden_layers=2, intermediate_size=32)
# llama.cpp's converter writes one number of YaRN for both, which the published checkpoints have equal too.
EQUAL = YARN | dict(mscale=0.7)
DEEPSEEK = SMALL | LATENT | dict(q_lora_rank=20, moe_intermediate_size=16, num_experts_per_tok=2, rope_parameters=EQUAL)


def like(family: str, **changes) -> tuple[str, dict]:
    own, known = FAMILIES[family]
    return own, known | SMALL | changes


GGUF = {
    "deepseek_v2": ("DeepseekV2", DEEPSEEK | dict(n_routed_experts=6, n_shared_experts=2, topk_method="greedy", routed_scaling_factor=3.0)),
    # 27 layers are how llama.cpp knows that queries are not compressed: it does not read this one.
    "deepseek_v2_lite": like("deepseek_v2_lite", moe_intermediate_size=16, n_routed_experts=3, num_experts_per_tok=2),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK | dict(n_routed_experts=8, n_shared_experts=1, n_group=4, topk_group=2, norm_topk_prob=True,
                                                  routed_scaling_factor=2.5)),
    # Its converter does not write the rotation's base.
    "gemma2": like("gemma2", query_pre_attn_scalar=16, rope_parameters=rope("default", 10_000.0)),
    "gemma3": like("gemma3", head_dim=8, query_pre_attn_scalar=8, num_hidden_layers=6,
                   layer_types=["sliding_attention"] * 5 + ["full_attention"]),
    "glm4": like("glm4"),
    "llama3": like("llama3"),
    "llama_linear": like("llama_linear"),
    "mixtral": like("mixtral", num_local_experts=4),
    "olmo2": like("olmo2"),
    # llama.cpp's context is a multiple of 256, and decides on the factors.
    "phi3": like("phi3", max_position_embeddings=1024, original_max_position_embeddings=256,
                 rope_parameters=FAMILIES["phi3"][1]["rope_parameters"] | dict(original_max_position_embeddings=256)),
    "qwen2_yarn": like("qwen2_yarn"),
    "qwen3": like("qwen3", head_dim=8),
    "qwen3_moe": like("qwen3_moe", head_dim=8, mlp_only_layers=[], moe_intermediate_size=16, num_experts=3, num_experts_per_tok=2),
    "smollm3": like("smollm3", num_hidden_layers=4, intermediate_size=16, no_rope_layers=[1, 1, 1, 0]),
}
# Whose matrices, experts too, are in blocks of 8 bits; the others' are in bf16.
QUANTISED = ["mixtral"]
# In several files of eight tensors.
SPLIT = ["llama3"]
# As files before 2025 are: one tensor makes keys and values of what is compressed, and widths are those of what it makes.
JOINED = ["deepseek_v2"]
# What the converter reads and transformers no longer writes into config.json.
PUBLISHED = {"deepseek_v3": {"scoring_func": "sigmoid"}}
# Rows that llama.cpp computes otherwise: it has no window for Phi-3.
LLAMA_CPP_ROWS = {"deepseek_v2_lite": 0, "phi3": 12}
LLAMA_CPP_TOLERANCE = 1e-4
# Its GELU is a table of f16.
GELU_TOLERANCE = 5e-3


def quantise(model) -> None:
    """Rounds matrices to what Q8_0 can say, so that the file has the same ones."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            blocks = gguf.quantize(parameter.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
            parameter.data = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)).reshape(parameter.shape)
    assert narrowest_choice(model) > 0.02


def write_checkpoint(folder: pathlib.Path, model, published: dict) -> None:
    """As the converter wants it: for Gemma with a vocabulary of the size that it has."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    save_json(folder / "config.json", config | published)
    save_json(folder / "tokenizer.json", {"model": {"vocab": {str(index): index for index in range(config["vocab_size"])}}, "added_tokens": []})


def convert(jobs: list[tuple[pathlib.Path, str, pathlib.Path]]) -> None:
    source = pathlib.Path(os.environ["CARRYON_LLAMA_CPP"])
    script = pathlib.Path(__file__).with_name("convert.py")
    arguments = [str(argument) for job in jobs for argument in job]
    path = os.pathsep.join(map(str, [source / "gguf-py", source]))
    subprocess.run([sys.executable, script, *arguments], env=os.environ | {"PYTHONPATH": path}, check=True, stderr=subprocess.PIPE)


def join(path: pathlib.Path, model) -> None:
    """Puts `attn_kv_b` in place of what the converter has made of it."""
    reader, config = gguf.GGUFReader(path), model.config
    old = {
        "deepseek2.attention.head_count_kv": config.num_attention_heads,
        "deepseek2.attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "deepseek2.attention.value_length": config.v_head_dim,
    }
    writer = gguf.GGUFWriter(path.with_suffix(".joined"), "deepseek2")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and not key.endswith("_mla") and key != "general.architecture":
            writer.add_key_value(key, old.get(key, field.contents()), field.types[0])
    for tensor in reader.tensors:
        layer, _, part = tensor.name.rpartition(".attn_")
        if part == "v_b.weight":
            weight = model.model.layers[int(layer.removeprefix("blk."))].self_attn.kv_b_proj.weight.detach().numpy()
            writer.add_tensor(f"{layer}.attn_kv_b.weight", gguf.quantize(weight, tensor.tensor_type), raw_dtype=tensor.tensor_type)
        elif part != "k_b.weight":
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".joined").replace(path)


def llama_cpp_logits(path: pathlib.Path, sequence: list[int]) -> torch.Tensor:
    from llama_cpp import GGML_TYPE_F32, Llama

    model = Llama(str(path), n_ctx=64, n_batch=64, n_threads=2, logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False)
    model.eval(sequence)
    return torch.from_numpy(numpy.array(model.scores[: len(sequence)]))


def generate_gguf_families(folder: pathlib.Path) -> None:
    sequence = tokens_of(0)[:TOKENS]
    with tempfile.TemporaryDirectory() as temporary:
        work, own, jobs, joined = pathlib.Path(temporary), {}, [], []
        for name, (family, changes) in GGUF.items():
            model = random_model(family, changes)
            if name in QUANTISED:
                quantise(model)
            write_checkpoint(work / name, model, PUBLISHED.get(name, {}))
            own[name] = states(model, sequence)
            target = folder / "gguf" / f"{name}.gguf"
            target.parent.mkdir(parents=True, exist_ok=True)
            kind = ("q8_0" if name in QUANTISED else "bf16") + (":8" if name in SPLIT else "")
            jobs += [(work / name, kind, target), (work / name, "f32", work / f"{name}.gguf")]
            if name in JOINED:
                joined += [(target, copy.deepcopy(model)), (work / f"{name}.gguf", copy.deepcopy(model))]
            save(target.with_suffix(".safetensors"), {"tokens": torch.tensor(sequence, dtype=torch.uint32), **own[name]})
            model = model.bfloat16()
            off = max(difference(own[name][tap], tensor) for tap, tensor in states(model, sequence).items())
            print(f"  {name}: bf16 of transformers is off by {off:.1e}")
        convert(jobs)
        for path, model in joined:
            join(path, model)
        for name in GGUF:
            rows = LLAMA_CPP_ROWS.get(name, TOKENS)
            if rows:
                off = difference(own[name]["logits"][:rows], llama_cpp_logits(work / f"{name}.gguf", sequence[:rows]))
                print(f"  {name}: llama.cpp is off by {off:.1e}")
                assert off < (GELU_TOLERANCE if name.startswith("gemma") else LLAMA_CPP_TOLERANCE), name
