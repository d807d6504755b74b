"""A head of two bases beside heads of each alone, on a task that is half one base's and half the other's: three seeds each.

The second base is the first whose training went on with another domain (specialise.py). Every sample is read once: there are enough of them, and heads
learn such texts by heart. A run that has ended is not repeated.
"""

import pathlib
import statistics
import subprocess
import sys
import urllib.request

from common import MODEL
from heads import FIVE_TAPS, RECIPE, SEEDS, interval, losses
from processes import start_pool
from rows import WORKER, result

HERE = pathlib.Path(__file__).resolve().parent
# The bases of each head; loss and answers are the first one's.
HEADS = {"first": ("first",), "second": ("second",), "first_and_second": ("first", "second")}


def rows(bible: pathlib.Path, brown: pathlib.Path, cache: pathlib.Path) -> list[dict]:
    folder = cache / "bible-and-brown"
    make = lambda what, *places: subprocess.run([sys.executable, HERE / "specialise.py", what, bible, *places], check=True)
    first, first_url = start_pool(WORKER, MODEL, folder / "first")
    pools = [first]
    try:
        if not (folder / "data/eval.jsonl").exists():
            make("data", brown, folder / "data")
        if not (folder / "base").exists():
            with urllib.request.urlopen(f"{first_url}/v1/tokenizer") as answer:
                (folder / "tokenizer.json").write_bytes(answer.read())
            make("model", folder / "tokenizer.json", folder / "base")
        second, second_url = start_pool(WORKER, folder / "base", folder / "second")
        pools.append(second)
        urls = {"first": first_url, "second": second_url}
        found = {name: [] for name in HEADS}
        for seed in SEEDS:
            for name, bases in HEADS.items():
                changes = {"head": RECIPE | {"gate": True}, "epochs": 1, "otherPools": [{"taps": FIVE_TAPS}] * (len(bases) - 1)}
                found[name].append(losses([urls[base] for base in bases], folder / "data", folder, name, seed, **changes)[-1])
    finally:
        for pool in pools:
            pool.stop()
    table = []
    for name, values in found.items():
        table.append(result(f"mixed_task_{name}_eval_loss", "nats per target", statistics.mean(values)) | {"rounds": {"ours": values}, "interval": interval(values)})
    return table
