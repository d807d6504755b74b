"""Where fixtures lie and how two generations of them are compared."""

import json
import math
import os
import pathlib

import torch
from safetensors import safe_open
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent
MODEL = pathlib.Path(
    os.environ.get("CARRYON_MODEL", pathlib.Path.home() / ".cache/carry-on/models/SmolLM2-135M-Instruct.Q4_1.gguf")
)


def save(path: pathlib.Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path, metadata)


def save_json(path: pathlib.Path, value, indent: int | None = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False, sort_keys=isinstance(value, dict)) + "\n")


def load(path: pathlib.Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected, the worst row of all."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return math.inf
    if torch.equal(expected.flatten().view(torch.uint8), actual.flatten().view(torch.uint8)):
        return 0.0
    expected, actual = (t.double().reshape(-1, t.shape[-1]) if t.ndim else t.double().reshape(1, 1) for t in (expected, actual))
    scale = expected.norm(dim=-1).clamp_min(1e-12 + 1e-3 * expected.norm(dim=-1).max())
    worst = float(((expected - actual).norm(dim=-1) / scale).max())
    return math.inf if math.isnan(worst) else worst


def compare(committed: pathlib.Path, fresh: pathlib.Path, tolerance: float) -> list[str]:
    """What differs between the committed fixtures and the fresh ones, one line each."""
    names = {p.relative_to(fresh) for p in fresh.rglob("*") if p.is_file()}
    problems = [f"{p.relative_to(committed)}: no longer generated" for p in committed.rglob("*") if p.is_file() and p.relative_to(committed) not in names]
    for name in sorted(names):
        old, new = committed / name, fresh / name
        if not old.exists():
            problems.append(f"{name}: not committed")
        elif name.suffix == ".safetensors":
            old_tensors, new_tensors = load(old), load(new)
            if old_tensors.keys() != new_tensors.keys():
                problems.append(f"{name}: other tensors")
                continue
            worst = max((difference(old_tensors[key], new_tensors[key]), key) for key in old_tensors)
            print(f"  {name}: largest relative difference {worst[0]:.1e} ({worst[1]})")
            if worst[0] > tolerance:
                problems.append(f"{name}: tensor {worst[1]} differs by {worst[0]:.1e}")
        elif name.suffix == ".gguf":
            problems += [] if old.read_bytes() == new.read_bytes() else [f"{name}: other bytes"]
            print(f"  {name}: compared")
        else:
            problems += [f"{name}: {where}" for where in compare_json(json.loads(old.read_text()), json.loads(new.read_text()), tolerance)][:3]
            print(f"  {name}: compared")
    return problems


def compare_json(old, new, tolerance: float, where: str = "$") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [line for key in old for line in compare_json(old[key], new[key], tolerance, f"{where}.{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new)) for line in compare_json(*pair, tolerance, f"{where}[{i}]")]
    if isinstance(old, float) and isinstance(new, float) and math.isclose(old, new, rel_tol=tolerance, abs_tol=1e-12):
        return []
    return [] if old == new else [f"{where}: {str(old)[:60]} became {str(new)[:60]}"]
