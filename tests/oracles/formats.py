"""Numbers as checkpoints store them: ggml's blocks after gguf-py, and PyTorch's floats of 8 bits with scales for blocks."""

import pathlib

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType as Kind

from common import save

# Where scales and minima lie in a block, f16 each; all other bytes may be anything.
SCALES = {
    Kind.Q4_0: [0], Kind.Q4_1: [0, 2], Kind.Q5_0: [0], Kind.Q5_1: [0, 2], Kind.Q8_0: [0], Kind.Q2_K: [80, 82], Kind.Q3_K: [108],
    Kind.Q4_K: [0, 2], Kind.Q5_K: [0, 2], Kind.Q6_K: [208], Kind.IQ4_NL: [0],
}
ROWS, COLUMNS, BLOCK = 2, 512, 128


def generate_formats(folder: pathlib.Path) -> None:
    generate_ggml(folder / "ggml.gguf")
    generate_f8(folder / "f8_blocks" / "model.safetensors")


def generate_ggml(path: pathlib.Path) -> None:
    """A tensor of each type under the type's name, and what gguf-py reads from it as `NAME.expected`."""
    random = numpy.random.default_rng(6)
    writer = gguf.GGUFWriter(path, "llama")
    for kind in [Kind.F16, Kind.BF16, *SCALES]:
        if kind in SCALES:
            values, size = gguf.GGML_QUANT_SIZES[kind]
            blocks = random.integers(0, 256, (ROWS * COLUMNS // values, size), numpy.uint8)
            for at in SCALES[kind]:
                scales = random.uniform(-0.1, 0.1, (len(blocks), 1)).astype(numpy.float16)
                blocks[:, at : at + 2] = scales.view(numpy.uint8)
            stored = blocks.reshape(ROWS, -1)
        else:
            stored = gguf.quantize(random.standard_normal((ROWS, COLUMNS), numpy.float32), kind)
        writer.add_tensor(kind.name, stored, raw_dtype=kind)
        writer.add_tensor(f"{kind.name}.expected", gguf.dequantize(stored, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def generate_f8(path: pathlib.Path) -> None:
    """Weights as DeepSeek-V3 stores them, and some of their rows as `NAME.expected`: value times the scale of its block."""
    torch.manual_seed(7)
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).reshape(2, BLOCK)
    random = lambda *shape: torch.randn(shape).to(torch.float8_e4m3fn)
    tensors = {}
    for name, weight, scales, rows in [
        ("bytes", every, torch.ones(1, 1), [0, 1]),
        ("same", every, torch.ones(1, 1), []),
        ("other", every, torch.full((1, 1), 2.0), []),
        ("matrix", random(130, 260), torch.rand(2, 3), [0, 127, 128, 129]),
        ("narrow", random(3, 130), torch.rand(1, 2).bfloat16(), [0, 1, 2]),
    ]:
        tensors |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": scales}
        spread = scales.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
        if rows:
            tensors[f"{name}.expected"] = (weight.float() * spread)[rows]
    save(path, tensors)
