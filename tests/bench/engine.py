"""The engine in its own process, without a server: forward passes and matrix products beside PyTorch's and llama.cpp's."""

import statistics
import time

from common import MODEL
from peers import LlamaCpp, Torch
from rows import THREADS, result, rust

TORCH, LLAMA = "torch bf16", "llama.cpp"
REPEATS = 3  # in a row, on each side of a round
PATIENCE = 180  # seconds after which no further round begins: PyTorch takes a minute for one where the processor knows no bf16
MATRICES = [(2048, 576, 576), (2048, 1536, 576), (2048, 576, 1536), (512, 1536, 576), (2048, 49152, 576)]
WIDE = (256, 28672, 8192)
matmul = lambda shape: "matmul_bf16_" + "x".join(map(str, shape))


def figures(rounds: int) -> tuple[dict, dict, dict]:
    """Every round's figures of ours, PyTorch and llama.cpp, by name: all three in turns."""
    torch, llama = Torch([*MATRICES, WIDE]), LlamaCpp()
    ours, theirs, others = {}, {}, {}

    def keep(side: dict, name: str, value: float) -> None:
        side.setdefault(name, []).append(value)
        print(f"  {name:34} {value:12.4g} {TORCH if side is theirs else LLAMA}", flush=True)

    started = time.monotonic()
    for done in range(rounds):
        if done and time.monotonic() - started > PATIENCE:
            break
        for name, values in rust("bench_engine", "--threads", THREADS, "--repeats", REPEATS, "--model", MODEL).items():
            ours.setdefault(name, []).extend(values)
        keep(theirs, "hidden_states_8x256", torch.hidden_states_8x256(REPEATS))
        keep(theirs, "prefill_512", torch.prefill_512(REPEATS))
        for shape in MATRICES:
            keep(theirs, matmul(shape), torch.matmul(*shape, REPEATS))
        keep(theirs, matmul(WIDE), torch.matmul(*WIDE, REPEATS))
        keep(others, "prefill_512", llama.prefill_512(REPEATS))
        keep(others, "decode", llama.decode(REPEATS))
    return ours, theirs, others


def rows(rounds: int) -> list[dict]:
    ours, torch, llama = figures(rounds)
    table = [result(f"{name}_vs_torch_bf16", "tokens/s", ours[name], torch[name], TORCH) for name in ("hidden_states_8x256", "prefill_512")]
    table += [result(f"{name}_vs_llama_cpp", "tokens/s", ours[name], llama[name], LLAMA) for name in ("prefill_512", "decode")]
    # Without a server: what the answers cost there would be counted once on one side, and eight times on the other.
    table.append(result("decode_8_vs_1", "tokens/s", ours["decode_8"], ours["decode"], "one sequence"))
    table.append(result("wide_layer_vs_torch_bf16", "GFLOP/s", ours[matmul(WIDE)], torch[matmul(WIDE)], TORCH))
    names = [matmul(shape) for shape in MATRICES]
    mean = lambda side: statistics.geometric_mean([max(side[name]) for name in names])
    table.append(result("matmul_bf16_vs_torch", "GFLOP/s, geometric mean", mean(ours), mean(torch), TORCH))
    return table + [result(f"{name}_vs_torch", "GFLOP/s", ours[name], torch[name], TORCH) for name in names]
