"""What a figure was measured on, and how quiet it was there."""

import os
import pathlib
import platform

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe() -> dict:
    first = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    known = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.processor()),
        "family_model": f"{fields.get('cpu family')}/{fields.get('model')}",
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in known],
        "load_average": os.getloadavg()[0],
    }
