"""Writes checkpoints as GGUF by llama.cpp's own converter, which lies in the source of llama_cpp_python: `convert.py FOLDER TYPE FILE`…,
where `bf16:8` puts eight tensors into each of several files.

The converter and its library are of one version, so this runs in a process of its own, with both in PYTHONPATH. Only the vocabulary is left out:
what is compared are tensors.
"""

import logging
import pathlib
import sys

import gguf
import torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

TYPES = {"f32": gguf.LlamaFileType.ALL_F32, "bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}


def without_vocabulary(self) -> None:
    self.gguf_writer.add_tokenizer_model("none")
    # llama.cpp wants to know how many tokens there are; some architectures have written it already.
    key = gguf.Keys.LLM.VOCAB_SIZE.format(arch=self.gguf_writer.arch)
    self.gguf_writer.kv_data[-1].pop(key, None)
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])


def convert(folder: pathlib.Path, kind: str, path: pathlib.Path, **more) -> None:
    own = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))
    converter = type(own.__name__, (own,), {"set_vocab": without_vocabulary, "model_arch": own.model_arch})
    with torch.inference_mode():
        converter(folder, TYPES[kind], path, eager=True, model_name=path.stem, **more).write()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for folder, kind, path in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        kind, _, tensors = kind.partition(":")
        convert(pathlib.Path(folder), kind, pathlib.Path(path), split_max_tensors=int(tensors or 0))
