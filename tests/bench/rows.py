"""Rows of the table: a figure, beside its peer's where there is one, with every round's value."""

import json
import os
import pathlib
import subprocess

BIN = pathlib.Path(os.environ["CARRYON_BIN"])
WORKER = BIN / "carryon-worker"
THREADS = 2  # of both sides


def result(name: str, unit: str, ours, peer=None, peer_name: str | None = None, smaller_is_better: bool = False) -> dict:
    """`ours` and `peer` are numbers, or one number a round, of which the best counts. A ratio above 1 is better than the peer."""
    pick = min if smaller_is_better else max
    rounds = {side: values for side, values in (("ours", ours), ("peer", peer)) if isinstance(values, list)}
    ours, peer = (pick(values) if isinstance(values, list) else values for values in (ours, peer))
    ratio = None if peer is None else peer / ours if smaller_is_better else ours / peer
    row = {"name": name, "unit": unit, "ours": ours, "peer": peer, "peer_name": peer_name, "ratio": ratio}
    return row | ({"rounds": rounds} if rounds else {})


def rust(example: str, *arguments, before=()) -> dict[str, list[float]]:
    """Figures of a Rust benchmark by name, one a round, shown as they come: it prints one JSON line each."""
    command = [str(word) for word in (*before, BIN / "examples" / example, *arguments)]
    figures = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for row in map(json.loads, child.stdout):
            figures.setdefault(row["name"], []).append(row["value"])
            print(f"  {row['name']:34} {row['value']:12.4g} {row['unit']}", flush=True)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return figures


def line(row: dict) -> str:
    versus = f"   {row['peer']:12.4g}  {row['ratio']:6.2f} × {row['peer_name']}" if row["ratio"] else ""
    return f"{row['name']:40} {row['ours']:12.4g} {row['unit']:24}{versus}"
