"""The pool's forward pass and a head's training on a GPU: against the oracles, and beside PyTorch on the same card.

    python3 check.py                 needs PyTorch, transformers and an NVIDIA GPU; takes up to ten minutes
    python3 check.py --smoke         a tiny model on the CPU, to see that the check itself works
    CARRYON_MODEL=FILE               SmolLM2-135M-Instruct.Q4_1.gguf, whose oracles are skipped without it

Nothing is built here: `make gpu-check` puts the programs beside this file. The model of 30B parameters gets random weights on the card; they
pass through memory (/dev/shm) to the pool's loader, as many of its 64 layers as there is room for: the rate does not depend on their number.
The last lines are the table for tests/gpu/RESULTS.md. Ends with 1 where an oracle fails or the states of the two sides differ by more than TOLERANCE.
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "worker"
LARGE = dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8, vocab_size=152064)
SMALL = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152)
SMOKE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=320)
PROMPT, COMPARED = 128, 64
# Largest norm of a row's difference over the norm of the row, of final states: both sides compute in bf16, in another order.
TOLERANCE = 5e-2


def fail(reason: str) -> None:
    sys.exit(f"check.py: {reason}")


try:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as missing:
    fail(f"{missing}: PyTorch and transformers are needed beside the bundle")


def library_path() -> str:
    """PyTorch brings cuBLAS, cuRAND and NVRTC of the version that our programs are linked with."""
    packages = pathlib.Path(torch.__file__).resolve().parent.parent / "nvidia"
    folders = [str(folder) for folder in sorted(packages.glob("*/lib"))]
    return ":".join(folders + ["/usr/local/cuda/lib64", os.environ.get("LD_LIBRARY_PATH", "")])


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "LD_LIBRARY_PATH": library_path(), **environment}
    return subprocess.run([PROGRAMS / program, *arguments], cwd=PROGRAMS, env=env, text=True, capture_output=True, check=False)


def oracles(device: str) -> list[tuple[str, str]]:
    """The tests of decoder and head against the numbers of transformers and PyTorch, as they are in the suite; candle computes on `device`."""
    lines = []
    tests = {"oracles": ["tiny_llama", *(["smollm2_in"] if os.environ.get("CARRYON_MODEL") else [])], "head": []}
    for program, names in tests.items():
        done = run(program, "--test-threads", "2", *names, CARRYON_CANDLE_DEVICE=device)
        summary = next((line for line in done.stdout.splitlines() if line.startswith("test result:")), "")
        if done.returncode != 0 or not summary:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
            lines.append((f"oracles: {program}", f"**failed** {summary}"))
        else:
            lines.append((f"oracles: {program}", summary.removeprefix("test result: ").partition("; 0 failed")[0]))
        print(*lines[-1], file=sys.stderr)
    return lines


class Peak:
    """The most memory of the card that is in use meanwhile, beyond what was at the beginning."""

    def __init__(self, device: str):
        self.device, self.used, self.over = device, 0, threading.Event()

    def now(self) -> int:
        if self.device == "cpu":
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free

    def __enter__(self):
        self.before = self.now()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.1):
            self.used = max(self.used, self.now() - self.before)

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def best(device: str, repeats: int, work) -> float:
    """Seconds of the best of some runs, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def tokens(count: int, vocabulary: int) -> list[int]:
    """As in `bench_device`."""
    return [(index * 7919 + 13) % vocabulary for index in range(count)]


def config(shape: dict) -> LlamaConfig:
    return LlamaConfig(
        **shape, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-5,
        tie_word_embeddings=False, initializer_range=0.02,
    )


def model_on(device: str, shape: dict) -> LlamaForCausalLM:
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config(shape)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.02)
    return model


def save(model: LlamaForCausalLM, shape: dict, folder: pathlib.Path) -> None:
    """Shards of a layer each, one tensor in host memory at a time."""
    shards: dict[str, list] = {}
    for name, parameter in model.state_dict().items():
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else parts[-2], []).append((name, parameter))
    weight_map = {}
    for number, tensors in enumerate(shards.values()):
        file, begin, header = f"model-{number:05}.safetensors", 0, {}
        for name, tensor in tensors:
            size = tensor.numel() * 2
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, begin + size]}
            weight_map[name], begin = file, begin + size
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in tensors:
                out.write(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    described = {
        **shape, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"], "max_position_embeddings": 8192, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False,
    }
    (folder / "config.json").write_text(json.dumps(described))


def taps(layers: int) -> list[int]:
    return sorted({layers // 3, layers * 2 // 3, layers * 5 // 6, max(layers - 2, 0)})


@torch.inference_mode()
def torch_side(device: str, model: LlamaForCausalLM, shape: dict, captures: list, decode: list, repeats: int) -> tuple[dict, torch.Tensor]:
    """The same work as `bench_device`: states at the same taps copied to the host, steps with keys and values in its own cache."""
    figures, seen = {}, {}
    wanted = [index for index in taps(shape["num_hidden_layers"]) if index > 0]

    def keep(index):
        return lambda _module, _inputs, output: seen.__setitem__(index, output[0] if isinstance(output, tuple) else output)

    hooks = [model.model.layers[index - 1].register_forward_hook(keep(index)) for index in wanted]
    for count, length in captures:
        prompt = torch.tensor([tokens(length, shape["vocab_size"])] * count, device=device)

        def capture():
            final = model.model(input_ids=prompt, use_cache=False).last_hidden_state
            for state in [*seen.values(), final]:
                state.cpu()

        figures[f"hidden_states_{count}x{length}"] = count * length / best(device, repeats, capture)
    for hook in hooks:
        hook.remove()
    seen.clear()
    for count in decode:
        prompt = torch.tensor([tokens(PROMPT, shape["vocab_size"])] * count, device=device)
        cache = model.model(input_ids=prompt, use_cache=True).past_key_values
        step = prompt[:, :1]

        def decode_step():
            model(input_ids=step, past_key_values=cache, use_cache=True).logits.argmax(-1).cpu()

        figures[f"decode_{count}"] = count / best(device, repeats, decode_step)
        del cache
    compared = torch.tensor([tokens(COMPARED, shape["vocab_size"])], device=device)
    return figures, model.model(input_ids=compared, use_cache=False).last_hidden_state[0].float().cpu()


def matrix_rate() -> float:
    """Operations a second of a large product in bf16."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / best("cuda", 20, lambda: left @ right)


def operations(shape: dict, count: int, length: int) -> float:
    """Of the products of a pass over whole sequences, attention included, its masked half not."""
    width, head_dim = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"]
    weights = width * (2 * width + 2 * shape["num_key_value_heads"] * head_dim) + 3 * width * shape["intermediate_size"]
    return count * length * shape["num_hidden_layers"] * (2 * weights + 2 * width * length)


def read_states(path: pathlib.Path) -> torch.Tensor:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    shape = json.loads(data[8 : 8 + length])["final"]["shape"]
    return torch.frombuffer(bytearray(data[8 + length :]), dtype=torch.float32).reshape(shape)


def room(shape: dict) -> tuple[pathlib.Path, dict]:
    """A folder for the weights, in memory where there is room, and the shape with as many layers as fit."""
    width, head_dim = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"]
    layer = 2 * (width * (2 * width + 2 * shape["num_key_value_heads"] * head_dim) + 3 * width * shape["intermediate_size"])
    rest = 4 * shape["vocab_size"] * width
    free = {folder: shutil.disk_usage(folder).free for folder in ["/dev/shm", tempfile.gettempdir()] if os.path.isdir(folder)}
    place = max(free, key=free.get)
    layers = min(shape["num_hidden_layers"], int((free[place] * 0.9 - rest) // layer))
    if layers < 1:
        fail(f"{place} has {free[place] >> 20} MiB free, a model of one layer takes {(rest + layer) >> 20}: set TMPDIR to a larger folder")
    return pathlib.Path(tempfile.mkdtemp(dir=place, prefix="gpu-check-")), {**shape, "num_hidden_layers": layers}


def compare(device: str, name: str, wanted: dict, captures: list, decode: list, repeats: int, rate: float | None) -> list[list[str]]:
    """Rows of the table: ours, PyTorch's, ratio, share of the card's matrix rate."""
    folder, shape = room(wanted)
    if shape != wanted:
        name = f"{name}, {shape['num_hidden_layers']} of {wanted['num_hidden_layers']} layers"
    try:
        model = model_on(device, shape)
        save(model, shape, folder)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        theirs, expected = torch_side(device, model, shape, captures, decode, repeats)
        their_memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        listed = ["--captures", ",".join(f"{count}x{length}" for count, length in captures), "--decode", ",".join(map(str, decode))]
        with Peak(device) as peak:
            done = run("bench_device", "--device", device, "--model", str(folder), "--output", str(folder / "states"), "--repeats", str(repeats), *listed)
        if done.returncode != 0:
            fail(f"bench_device ended with {done.returncode}: {done.stderr.strip()}")
        ours = {figure["name"]: figure["value"] for figure in map(json.loads, done.stdout.splitlines())}
        found = read_states(folder / "states")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    off = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    rows = []
    for figure, value in theirs.items():
        share = ""
        if rate and figure.startswith("hidden_states_"):
            count, length = map(int, figure.removeprefix("hidden_states_").split("x"))
            share = f"{ours[figure] / (count * length) * operations(shape, count, length) / rate:.0%}"
        rows.append([f"{name}: {figure}, tokens/s", f"{ours[figure]:.0f}", f"{value:.0f}", f"{ours[figure] / value:.2f}", share])
    gib = 1 << 30
    rows.append([f"{name}: memory, GiB", f"{peak.used / gib:.1f}", f"{their_memory / gib:.1f}", f"{peak.used / max(their_memory, 1):.2f}", ""])
    rows.append([f"{name}: load, s", f"{ours['load']:.1f}", "", "", ""])
    rows.append([f"{name}: final states, relative difference", f"{off:.1e}", "", "ok" if off <= TOLERANCE else "**too large**", ""])
    for row in rows:
        print(*row, sep=" | ", file=sys.stderr)
    return rows


def train(device: str, *arguments: str) -> list[list[str]]:
    """Rows of the table: steps of a head with its loss on the card. Its loss must fall on the tokens that it sees again."""
    with Peak(device) as peak:
        done = run("bench_head", "--device", "candle" if device == "cpu" else device, *arguments)
    if done.returncode != 0:
        fail(f"bench_head ended with {done.returncode}: {done.stderr.strip()}")
    found = {figure["name"]: figure["value"] for figure in map(json.loads, done.stdout.splitlines())}
    name = f"a head of {found['parameters'] / 1e6:.0f}M parameters in training"
    learns = found["last_loss"] < found["first_loss"]
    losses = f"{found['first_loss']:.3f} to {found['last_loss']:.3f}"
    rows = [[f"{name}: tokens/s", f"{found['train']:.0f}", "", "", ""]]
    for part in ("forward_and_loss", "backward", "update"):
        rows.append([f"{name}: {part}, ms", f"{found[part] * 1e3:.0f}", "", "", ""])
    rows.append([f"{name}: memory, GiB", f"{peak.used / (1 << 30):.1f}", "", "", ""])
    rows.append([f"{name}: loss of the first and the last step", losses, "", "ok" if learns else "**does not fall**", ""])
    for row in rows:
        print(*row, sep=" | ", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, to see that the check itself works")
    smoke = parser.parse_args().smoke
    device = "cpu" if smoke else "cuda"
    if not smoke and not torch.cuda.is_available():
        fail(f"PyTorch {torch.__version__} sees no GPU: a machine with an NVIDIA GPU is needed, or --smoke")
    with contextlib.suppress(AttributeError):
        torch.backends.cuda.matmul.allow_tf32 = False
    checked = oracles(device)
    if smoke:
        card, rate = "CPU, smoke: no figures", None
        rows = compare(device, "tiny", SMOKE, [(2, 32)], [1, 2], 2, None)
        rows += train(device, "--head", "64,2,3,64", "--vocabulary", "320", "--tokens", "32")
    else:
        rate = matrix_rate()
        card = f"{torch.cuda.get_device_name()}, {rate / 1e12:.0f} TFLOP/s in bf16, PyTorch {torch.__version__}"
        rows = compare(device, "SmolLM2", SMALL, [(8, 512), (2, 2048)], [1, 8, 64], 20, rate)
        rows += compare(device, "30B", LARGE, [(8, 512), (2, 2048)], [1, 8, 64], 5, rate)
        rows += train(device)
    print(f"\n{datetime.date.today()} · {card}\n")
    print("| oracles | |\n|---|---|")
    for line in checked:
        print("|", " | ".join(line), "|")
    print("\n| | ours | PyTorch | ratio | of the matrix rate |\n|---|---|---|---|---|")
    for row in rows:
        print("|", " | ".join(row), "|")
    if any("**" in cell for row in [*checked, *rows] for cell in row):
        sys.exit(1)


if __name__ == "__main__":
    main()
