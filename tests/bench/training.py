"""The recipe: our trainer and pool beside PyTorch's training step, its losses, and everybody's memory."""

import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

from common import MODEL
from processes import Process, start_pool, start_trainer
from rows import WORKER, result

HERE = pathlib.Path(__file__).resolve().parent
TORCH = "torch bf16"


def recipe_data(data_python: str, folder: pathlib.Path) -> pathlib.Path:
    encoded = folder / "encoded"
    if not (encoded / "eval.jsonl").exists():
        source = folder / "gsm_symbolic"
        subprocess.run([data_python, HERE.parent.parent / "examples/quickstart/data.py", source, "1000", "200"], check=True)
        subprocess.run([sys.executable, HERE / "recipe.py", "data", source, encoded], check=True)
    return encoded


def first_samples(encoded: pathlib.Path, folder: pathlib.Path, count: int) -> pathlib.Path:
    """A folder with so many of the recipe's training samples and a fifth as many held out; what was there goes."""
    shutil.rmtree(folder, ignore_errors=True)
    data = folder / "data"
    data.mkdir(parents=True)
    for name, some in (("train.jsonl", count), ("eval.jsonl", count // 5)):
        text = (encoded / name).read_text().splitlines(keepends=True)
        (data / name).write_text("".join(text[:some]))
    return data


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.open()] if path.exists() else []


def train(url: str, encoded: pathlib.Path, folder: pathlib.Path, gate: bool, epochs: int) -> tuple[Process, list[dict]]:
    """A whole run of our trainer, in the precision of PyTorch's autocast, its log line shown as it goes."""
    shutil.rmtree(folder, ignore_errors=True)
    changes = {"head": {"width": 256, "blocks": 2, "attentionHeads": 4, "gate": gate}, "training": {"numTrainEpochs": epochs, "perDeviceTrainBatchSize": 8, "bf16": True}}
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


def rows(data_python: str, folder: pathlib.Path, steps: int, epochs: int, gate: bool) -> list[dict]:
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
    table = [result("recipe_base_eval_loss", "nats per target", next(r["base_eval_loss"] for r in evaluations if "base_eval_loss" in r))]
    table += [result(f"recipe_eval_loss_epoch_{row['epoch']:.0f}", "nats per target", row["eval_loss"]) for row in evaluations if row["step"]]
    table.append(result("recipe_eval_loss", "nats per target", evaluations[-1]["eval_loss"]))
    table += [result("recipe_gate_eval_loss", "nats per target", row["eval_loss"]) for row in gated[::-1] if "eval_loss" in row][:1]
    table.append(result("train_step_vs_torch", "s", median_step(metrics), statistics.mean(p["median_step"] for _, p in peers), TORCH, smaller_is_better=True))
    return table + trainer.memory("trainer") + pool.memory("pool") + peers[0][0].memory("torch_states_and_steps")


def median_step(metrics: list[dict]) -> float:
    """Of the steps after the first epoch: those read their states from the cache, as PyTorch's do."""
    steps = [row for row in metrics if "loss" in row and "seconds" in row]
    taken = [(row["epoch"], row["seconds"] - before["seconds"]) for before, row in zip(steps, steps[1:])]
    later = [seconds for epoch, seconds in taken if epoch > 1] or [seconds for _, seconds in taken]
    return statistics.median(later)
