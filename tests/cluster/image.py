#!/usr/bin/env python3
"""image.py OUT.tar NAME:TAG PROGRAM[=PATH] ... : a docker-archive image of programs and the libraries they load, made without a container engine.

Each PROGRAM of this machine lands at PATH, or where it lies here; the first is the entry point. Runs as user 65532, or as CARRYON_IMAGE_USER, which may be empty."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile

USER = 65532
PASSWD = f"root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:{USER}:{USER}:nonroot:/home/nonroot:/sbin/nologin\n"


def libraries(program):
    """Paths of what the loader maps for a program, itself included; nothing for a static one."""
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    words = [word for line in listing.splitlines() for word in line.split()]
    return [word for word in words if word.startswith("/")]


def add(archive, name, data=b"", mode=0o644, kind=tarfile.REGTYPE):
    entry = tarfile.TarInfo(name.lstrip("/"))
    entry.size, entry.mode, entry.type = len(data), mode, kind
    archive.addfile(entry, io.BytesIO(data))


def layer(programs):
    """One layer; the same bytes for the same files."""
    files = {path: program for path, program in programs}
    for _, program in programs:
        files.update((path, path) for path in libraries(program))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        add(archive, "tmp", mode=0o1777, kind=tarfile.DIRTYPE)
        add(archive, "etc/passwd", PASSWD.encode())
        add(archive, "etc/group", f"root:x:0:\nnonroot:x:{USER}:\n".encode())
        for path in sorted(files):
            with open(files[path], "rb") as source:
                add(archive, path, source.read(), 0o755)
    return buffer.getvalue()


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    output, reference, *arguments = sys.argv[1:]
    programs = [(path or program, program) for program, _, path in (argument.partition("=") for argument in arguments)]
    content = layer(programs)
    digest = hashlib.sha256(content).hexdigest()
    config = json.dumps({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Entrypoint": [programs[0][0]],
            "Env": ["PATH=/usr/local/bin:/usr/bin:/bin"],
            "User": os.environ.get("CARRYON_IMAGE_USER", f"{USER}:{USER}"),
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }).encode()
    name = hashlib.sha256(config).hexdigest() + ".json"
    manifest = json.dumps([{"Config": name, "RepoTags": [reference], "Layers": [f"{digest}/layer.tar"]}]).encode()
    # Written beside it and renamed: a tar that exists is whole.
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(os.path.abspath(output)), delete=False) as half:
        with tarfile.open(fileobj=half, mode="w") as archive:
            add(archive, name, config)
            add(archive, f"{digest}/layer.tar", content)
            add(archive, "manifest.json", manifest)
    os.replace(half.name, output)


main()
