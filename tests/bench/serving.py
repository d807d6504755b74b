"""A pool as gateways and trainers find it, over HTTP: one process, its rows in turns with what they are compared with."""

import contextlib
import pathlib

from common import MODEL
from processes import Process, start_pool
from rows import WORKER, result, rust

# Of the memory row: keys and values of SmolLM2 in bf16 take 23,040 bytes a token (30 layers, 3 heads of 64).
LENGTH = 4096 + 64
BUDGET = 8 * LENGTH * 23_040
DEFINITIONS = pathlib.Path(__file__).resolve().parents[2] / "crds/crds.yaml"


@contextlib.contextmanager
def running(folder: pathlib.Path, **engine):
    pool, url = start_pool(WORKER, MODEL, folder, **engine)
    try:
        yield pool, url
    finally:
        pool.stop()


def decoding(folder: pathlib.Path, rounds: int) -> list[dict]:
    with running(folder) as (_, url):
        heads = rust("bench_serving", url, "heads", rounds)
        prefix = rust("bench_serving", url, "prefix", rounds)
        capture = rust("bench_serving", url, "capture", rounds)
    return [
        result("heads_32_vs_base", "tokens/s", heads["heads_32"], heads["base_32"], "base alone, 32 sequences"),
        compared("prefix_first_token", prefix, "first_token_known_prefix", "first_token_unknown_prefix", "a prefix never seen"),
        compared("decode_p95_beside_capture", capture, "decode_p95_beside", "decode_p95_alone", "without a trainer"),
        result("decode_beside_capture_trainer_share", "tokens/s", capture["capture_beside"], capture["capture_alone"], "the trainer alone"),
    ]


def compared(name: str, figures: dict, ours: str, peer: str, peer_name: str) -> dict:
    """Seconds: the ratio is the peer's over ours, so that more is better here too."""
    return result(name, "s", figures[ours], figures[peer], peer_name, smaller_is_better=True)


def memory(folder: pathlib.Path) -> list[dict]:
    """64 clients with prompts of 4096 tokens, where keys and values of eight have room."""
    if "kvCacheMemory" not in DEFINITIONS.read_text():
        print("SKIPPED, NOT MEASURED: 64 clients against a budget of memory, for pools do not know engine.kvCacheMemory")
        return []
    with running(folder, kvCacheMemory=BUDGET, maxModelLen=LENGTH, maxNumSeqs=64) as (pool, url):
        before = pool.resident()
        figures = rust("bench_serving", url, "memory", 1)
        if pool.child.poll() is not None:
            raise SystemExit(f"the pool ended with {pool.child.returncode}; see {folder / 'pool.log'}")
        grown = (pool.peak_resident - before) / 1024
    row = result("memory_64_clients_budget_for_8", "MiB of RSS above a ready pool", grown, BUDGET / 2**20, "the budget", smaller_is_better=True)
    return [row] + [result(f"memory_64_clients_{name}", "requests", values) for name, values in figures.items()]
