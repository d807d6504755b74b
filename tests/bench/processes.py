"""Processes under measurement: a pool, a trainer, any command; each with its peak memory."""

import json
import pathlib
import socket
import subprocess
import threading
import time
import urllib.request

from rows import THREADS, result


def memory_kib(pid: int) -> dict[str, int]:
    """`RssAnon`, `VmHWM` and `VmRSS` of a process, KiB; empty when it is gone."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value.split()[0]) for name, value in (line.split(":", 1) for line in lines) if name in ("RssAnon", "VmHWM", "VmRSS")}


class Process:
    """A child whose memory is looked at ten times a second."""

    def __init__(self, command: list, log: pathlib.Path | None = None, capture: bool = False):
        out = subprocess.PIPE if capture else log.open("w") if log else None
        self.child = subprocess.Popen([str(word) for word in command], stdout=out, stderr=subprocess.STDOUT if log else None, text=True)
        self.peak_anonymous = self.peak_resident = 0
        self._watch = threading.Thread(target=self._sample, daemon=True)
        self._watch.start()

    def _sample(self) -> None:
        while self.child.poll() is None:
            found = memory_kib(self.child.pid)
            self.peak_anonymous = max(self.peak_anonymous, found.get("RssAnon", 0))
            self.peak_resident = max(self.peak_resident, found.get("VmHWM", 0))
            time.sleep(0.1)

    def resident(self) -> int:
        """KiB, now."""
        return memory_kib(self.child.pid).get("VmRSS", 0)

    def output(self) -> str:
        text, _ = self.child.communicate()
        if self.child.returncode:
            raise SystemExit(f"{self.child.args} ended with {self.child.returncode}")
        return text

    def memory(self, name: str) -> list[dict]:
        rows = [("anonymous_memory", self.peak_anonymous), ("peak_rss", self.peak_resident)]
        return [result(f"{name}_{kind}", "MiB", kib / 1024) for kind, kib in rows]

    def stop(self) -> None:
        if self.child.poll() is None:
            self.child.terminate()
        self.child.wait(60)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_pool(worker: pathlib.Path, model: pathlib.Path, folder: pathlib.Path, dtype: str = "bfloat16", **engine) -> tuple[Process, str]:
    """A pool, once it is ready; what `engine` does not say is as by default."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "pool.json"
    config.write_text(json.dumps({"name": "bench", "dtype": dtype, "engine": engine}))
    url = f"http://127.0.0.1:{free_port()}"
    command = [worker, "base", "--config", config, "--model", model, "--listen", url.removeprefix("http://"), "--threads", THREADS]
    pool = Process(command, folder / "pool.log")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and pool.child.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
            return pool, url
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the pool is not ready; see {folder / 'pool.log'}")


def start_trainer(worker: pathlib.Path, url: str, data: pathlib.Path, folder: pathlib.Path, state_cache: pathlib.Path | None = None, other_pools: list[str] = [], **changes) -> Process:
    """Our trainer on the recipe; `changes` are members of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "train.json"
    recipe = {
        "name": "recipe", "namespace": "default", "task": "CausalLM", "taps": {"layers": [10, 20, 25, 28], "final": True},
        "head": {"width": 256, "blocks": 2, "attentionHeads": 4}, "format": "Tokenized",
        "split": {"train": ["train.jsonl"], "evaluation": ["eval.jsonl"]}, "maxLength": 320, "overlong": "Truncate",
        "training": {"numTrainEpochs": 3, "perDeviceTrainBatchSize": 8}, "evaluation": {}, "checkpoint": {},
    }
    config.write_text(json.dumps(recipe | changes))
    listen = f"127.0.0.1:{free_port()}"
    command = [worker, "train", "--config", config, "--pool", url, "--data", data, "--output", folder / "output", "--listen", listen]
    command += ["--state-cache", state_cache] if state_cache else []
    command += [word for url in other_pools for word in ("--other-pool", url)]
    return Process(command, folder / "trainer.log")
