"""Regenerates the fixtures that Rust is checked against and compares them with the committed ones; `--write` commits new ones.

Runs in the PyTorch environment of `make oracles`.
"""

import pathlib
import shutil
import sys
import tempfile

import torch

import families
import formats
import gguf_families
import head
import llama
import prompts
import text
import vocabularies
from common import HERE, compare

# Other machines order their sums otherwise; the tests allow ten times this and more.
TOLERANCE = 1e-5


def main() -> int:
    torch.set_num_threads(2)
    committed = HERE / "fixtures"
    with tempfile.TemporaryDirectory() as temporary:
        fresh = pathlib.Path(temporary)
        parts = [
            llama.generate_tiny, llama.generate_smollm2, families.generate_families, gguf_families.generate_gguf_families, formats.generate_formats,
            head.generate_heads, head.generate_optimizers, head.generate_training, text.generate_chat, text.generate_lessons, text.generate_tokens,
            prompts.generate_prompts, vocabularies.generate_vocabularies,
        ]
        for part in parts:
            print(part.__name__.removeprefix("generate_"), flush=True)
            part(fresh)
        if "--write" in sys.argv:
            shutil.rmtree(committed, ignore_errors=True)
            shutil.copytree(fresh, committed)
            return 0
        problems = compare(committed, fresh, TOLERANCE)
    print("\n".join(problems) or "the committed fixtures are those of this PyTorch")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
