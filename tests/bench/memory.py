"""Memory of the trainer at the paper's headline: a head of 110M parameters on a base of width 5120 with 152k tokens, one sequence of 1024 tokens a step.

A real pool in a process beside it holds that LM head and states by chance, so the loss is remote. Writes {"parameters", "tensor_mb", "planned_mb",
"peak_rss_mb"}, which are Muon's, and the same for each optimizer under "runs"; tensor_mb is what the head takes above the trainer before it has one.
`make bench-memory` runs it.
"""

import argparse
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import machine  # noqa: E402
from processes import start_pool, start_trainer  # noqa: E402
from rows import WORKER  # noqa: E402

TOKENS, STEPS, LAYERS, WIDTH, VOCABULARY = 1024, 2, 4, 5120, 151_936
TOKENIZER = HERE.parent / "oracles/fixtures/tiny_llama/tokenizer.json"
# Thin layers: what counts is how wide their states are.
CONFIG = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=1,
    head_dim=64, intermediate_size=256, vocab_size=VOCABULARY, max_position_embeddings=TOKENS, rms_norm_eps=1e-5, hidden_act="silu",
    tie_word_embeddings=True, rope_theta=1e4, dtype="bfloat16",
)
HEAD = {"width": 1184, "blocks": 4, "attentionHeads": 8, "gate": True}
TRAINING = {
    "perDeviceTrainBatchSize": 1, "maxSteps": STEPS, "optimStateDtype": "Int8", "weightDtype": "Bfloat16", "maxGradNormScope": "PerTensor",
    "gradientCheckpointing": True,
}


def shapes() -> dict[str, list[int]]:
    found = {"model.embed_tokens.weight": [VOCABULARY, WIDTH], "model.norm.weight": [WIDTH]}
    for layer in range(LAYERS):
        part = lambda name, *shape: found.__setitem__(f"model.layers.{layer}.{name}.weight", list(shape))
        part("input_layernorm", WIDTH), part("post_attention_layernorm", WIDTH)
        part("self_attn.q_proj", 256, WIDTH), part("self_attn.k_proj", 64, WIDTH), part("self_attn.v_proj", 64, WIDTH), part("self_attn.o_proj", WIDTH, 256)
        part("mlp.gate_proj", 256, WIDTH), part("mlp.up_proj", 256, WIDTH), part("mlp.down_proj", WIDTH, 256)
    return found


def write_base(folder: pathlib.Path) -> None:
    """A checkpoint of numbers by chance, between 0.008 and 0.03 with either sign."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shutil.copy(TOKENIZER, folder)
    header, end = {}, 0
    for name, shape in shapes().items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    chance, high = random.Random(0), bytes(0x3C | byte & 0x80 for byte in range(256))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end:
            count = min(end, 64 << 20)
            numbers = bytearray(count)
            numbers[::2], numbers[1::2] = chance.randbytes(count // 2), chance.randbytes(count // 2).translate(high)
            file.write(numbers)
            end -= count


def write_data(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True)
    chance = random.Random(1)
    samples = [{"input_ids": [chance.randrange(VOCABULARY) for _ in range(TOKENS)], "prompt_length": 1} for _ in range(STEPS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def measure(url: str, folder: pathlib.Path, optim: str) -> dict:
    place = folder / optim
    changes = {
        "taps": {"layers": list(range(1, LAYERS + 1)), "final": True}, "head": HEAD, "maxLength": TOKENS, "split": {"train": ["train.jsonl"]},
        "training": TRAINING | {"optim": optim},
    }
    trainer = start_trainer(WORKER, url, folder / "data", place, **changes)
    if trainer.child.wait():
        raise SystemExit(f"the trainer ended with {trainer.child.returncode}; see {place / 'trainer.log'}")
    tensor, planned = re.search(r"memory: ([\d.]+) MB for the head at most, ([\d.]+) MB planned", (place / "trainer.log").read_text()).groups()
    (manifest,) = (place / "output/heads").glob("*/head.json")
    figures = {
        "parameters": json.loads(manifest.read_text())["parameters"], "tensor_mb": float(tensor), "planned_mb": float(planned),
        "peak_rss_mb": round(trainer.peak_resident * 1024 / 1e6, 1), "plan": plan(url, folder, place),
    }
    print(json.dumps({"optim": optim} | figures), flush=True)
    return figures


def plan(url: str, folder: pathlib.Path, place: pathlib.Path) -> dict[str, float]:
    """What `--plan` prints, MB by group."""
    command = [WORKER, "train", "--plan", "--config", place / "train.json", "--pool", url, "--data", folder / "data", "--output", place / "none"]
    table = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    if (place / "none").exists():
        raise SystemExit("--plan has touched the output folder")
    return {name: float(megabytes) for name, megabytes, _ in map(str.split, table.splitlines())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    asked = parser.parse_args()
    folder = asked.cache / "memory-headline"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write_base(folder / "base")
        write_data(folder / "data")
        pool, url = start_pool(WORKER, folder / "base", folder / "pool", maxModelLen=TOKENS)
        try:
            runs = {optim: measure(url, folder, optim) for optim in ("Muon", "AdamW")}
        finally:
            pool.stop()
    finally:
        for large in ("base", "Muon/output", "AdamW/output"):
            shutil.rmtree(folder / large, ignore_errors=True)
    headline = {name: runs["Muon"][name] for name in ("parameters", "tensor_mb", "planned_mb", "peak_rss_mb")}
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(json.dumps(headline | {"machine": machine.describe(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
