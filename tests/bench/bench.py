"""Our figures beside PyTorch's, taken in turns in one run, so that both meet the same machine.

Writes {"results": [{"name", "unit", "ours", "peer", "peer_name", "ratio"}]}; a ratio above 1 is better than the peer. `make bench` runs it.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "oracles")]

from common import MODEL  # noqa: E402
from processes import Process, result, start_pool, start_trainer  # noqa: E402

BIN = pathlib.Path(os.environ["CARRYON_BIN"])
WORKER = BIN / "carryon-worker"
TORCH = "torch bf16"
REPEATS = 3  # in a row, on each side of a round
MATRICES = [(2048, 576, 576), (2048, 1536, 576), (2048, 576, 1536), (512, 1536, 576), (2048, 49152, 576)]


def rust(example: str, *arguments) -> dict[str, float]:
    """Figures of a Rust benchmark, by name: it prints one JSON line each."""
    command = [BIN / "examples" / example, *map(str, arguments)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {row["name"]: row["value"] for row in map(json.loads, lines)}


def forward_and_matrices(rounds: int) -> list[dict]:
    """Forward passes without logits, and matrix products; the best of all rounds on each side."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    base = AutoModelForCausalLM.from_pretrained(str(MODEL.parent), gguf_file=MODEL.name, dtype=torch.float32).bfloat16().eval()
    tokens = torch.randint(0, base.config.vocab_size, (8, 256), generator=torch.Generator().manual_seed(0))
    operands = {size: (torch.randn(size[0], size[2]).bfloat16(), torch.randn(size[1], size[2]).bfloat16()) for size in MATRICES}

    @torch.inference_mode()
    def seconds(call) -> float:
        taken = []
        for _ in range(REPEATS + 1):  # once more than ours: the first call makes oneDNN's primitives
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
        return min(taken)

    ours, peer = {}, {}
    keep = lambda best, name, value: best.__setitem__(name, max(best.get(name, 0.0), value))
    for _ in range(rounds):
        for name, value in rust("bench_engine", "--threads", 2, "--repeats", REPEATS, "--model", MODEL).items():
            keep(ours, name, value)
        keep(peer, "hidden_states_8x256", 2048 / seconds(lambda: base.model(input_ids=tokens, use_cache=False)))
        keep(peer, "prefill_512", 512 / seconds(lambda: base.model(input_ids=tokens[:2].reshape(1, 512), use_cache=True)))
        for (m, n, k), (x, w) in operands.items():
            count = max(1, int(5e9 / (m * n * k)))
            taken = seconds(lambda: [torch.nn.functional.linear(x, w) for _ in range(count)]) / count
            keep(peer, f"matmul_bf16_{m}x{n}x{k}", 2 * m * n * k / taken / 1e9)
        print(".", end="", flush=True)
    print()
    rows = [result(f"{name}_vs_torch_bf16", "tokens/s", ours[name], peer[name], TORCH) for name in ("hidden_states_8x256", "prefill_512")]
    names = [f"matmul_bf16_{m}x{n}x{k}" for m, n, k in MATRICES]
    mean = lambda figures: statistics.geometric_mean([figures[name] for name in names])
    rows.append(result("matmul_bf16_vs_torch", "GFLOP/s, geometric mean", mean(ours), mean(peer), TORCH))
    rows += [result(f"{name}_vs_torch", "GFLOP/s", ours[name], peer[name], TORCH) for name in names]
    return rows + [result("decode", "tokens/s", ours["decode"])]


def exchange() -> list[dict]:
    """States that are already computed, served to a client, against a raw copy of as many bytes over loopback."""
    figures = rust("bench_exchange")
    return [result("exchange_vs_loopback", "bytes/s", figures["exchange_bytes_per_second"], figures["loopback_bytes_per_second"], "raw loopback copy")]


def recipe_data(data_python: str, folder: pathlib.Path) -> pathlib.Path:
    encoded = folder / "encoded"
    if not (encoded / "eval.jsonl").exists():
        source = folder / "gsm_symbolic"
        subprocess.run([data_python, HERE.parent.parent / "examples/quickstart/data.py", source, "1000", "200"], check=True)
        subprocess.run([sys.executable, HERE / "recipe.py", "data", source, encoded], check=True)
    return encoded


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.open()] if path.exists() else []


def train(url: str, encoded: pathlib.Path, folder: pathlib.Path, gate: bool, epochs: int) -> tuple[Process, list[dict]]:
    """A whole run of our trainer, its log line shown as it goes."""
    shutil.rmtree(folder, ignore_errors=True)
    changes = {"head": {"width": 256, "blocks": 2, "attentionHeads": 4, "gate": gate}, "training": {"numTrainEpochs": epochs, "perDeviceTrainBatchSize": 8}}
    trainer = start_trainer(WORKER, url, encoded, folder, **changes)
    path, shown = folder / "output/metrics.jsonl", 0
    while trainer.child.poll() is None:
        time.sleep(2)
        rows = lines(path)
        for row in rows[shown:]:
            if "eval_loss" in row:
                print(f"  step {row['step']}: eval loss {row['eval_loss']:.4f}", flush=True)
        shown = len(rows)
    if trainer.child.returncode:
        raise SystemExit(f"the trainer ended with {trainer.child.returncode}; see {folder / 'trainer.log'}")
    return trainer, lines(path)


def training(data_python: str, folder: pathlib.Path, steps: int, epochs: int, gate: bool) -> list[dict]:
    """The recipe: our trainer and pool between two halves of PyTorch's steps."""
    encoded = recipe_data(data_python, folder)
    peers = []

    def peer() -> None:
        process = Process([sys.executable, HERE / "recipe.py", "step", encoded, steps], capture=True)
        peers.append((process, json.loads(process.output().splitlines()[-1])))

    peer()
    pool, url = start_pool(WORKER, MODEL, folder / "pool")
    try:
        trainer, metrics = train(url, encoded, folder / "recipe", False, epochs)
        peer()
        gated = train(url, encoded, folder / "recipe-gate", True, epochs)[1] if gate else []
    finally:
        pool.stop()
    evaluations = [row for row in metrics if "eval_loss" in row]
    rows = [result("recipe_base_eval_loss", "nats per target", next(r["base_eval_loss"] for r in evaluations if "base_eval_loss" in r))]
    rows += [result(f"recipe_eval_loss_epoch_{row['epoch']:.0f}", "nats per target", row["eval_loss"]) for row in evaluations if row["step"]]
    rows.append(result("recipe_eval_loss", "nats per target", evaluations[-1]["eval_loss"]))
    rows += [result("recipe_gate_eval_loss", "nats per target", row["eval_loss"]) for row in gated[::-1] if "eval_loss" in row][:1]
    rows.append(result("train_step_vs_torch", "s", median_step(metrics), statistics.mean(p["median_step"] for _, p in peers), TORCH, smaller_is_better=True))
    return rows + trainer.memory("trainer") + pool.memory("pool") + peers[0][0].memory("torch_states_and_steps")


def median_step(metrics: list[dict]) -> float:
    """Of the steps after the first epoch: those read their states from the cache, as PyTorch's do."""
    steps = [row for row in metrics if "loss" in row and "seconds" in row]
    taken = [(row["epoch"], row["seconds"] - before["seconds"]) for before, row in zip(steps, steps[1:])]
    later = [seconds for epoch, seconds in taken if epoch > 1] or [seconds for _, seconds in taken]
    return statistics.median(later)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-python", required=True)
    parser.add_argument("--cache", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="of PyTorch's training, before and after ours")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--no-gate", action="store_true", help="leave out the second run, with the gate")
    parser.add_argument("--only", choices=["forward", "exchange", "training"])
    arguments = parser.parse_args()
    parts = {
        "forward": lambda: forward_and_matrices(arguments.rounds),
        "exchange": exchange,
        "training": lambda: training(arguments.data_python, arguments.cache, arguments.steps, arguments.epochs, not arguments.no_gate),
    }
    results = []
    for name, part in parts.items():
        if arguments.only in (None, name):
            print(f"{name} …", flush=True)
            results += part()
    for row in results:
        versus = f"   {row['peer']:12.4g}  {row['ratio']:6.2f} × {row['peer_name']}" if row["ratio"] else ""
        print(f"{row['name']:36} {row['ours']:12.4g} {row['unit']:24}{versus}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
