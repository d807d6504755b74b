#!/usr/bin/env python3
"""What kube-score and checkov find in the rendered chart and in the pods that the operator makes, less what lint.yaml explains.

    lint.py             every finding that is not explained, and every explanation that explains none, is an error

Needs PyYAML, checkov beside this Python, $KUBE_SCORE and helm ($HELM).
"""

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SNAPSHOTS = ROOT / "operator/tests/snapshots"


def rendered(*arguments):
    """The chart's objects; definitions are no pods, and hold none."""
    command = [os.environ.get("HELM", "helm"), "template", "carry-on", str(ROOT / "charts/carry-on"), "--namespace", "carry-on-system"]
    documents = yaml.safe_load_all(subprocess.run([*command, *arguments], check=True, capture_output=True, text=True).stdout)
    return [document for document in documents if document and document["kind"] != "CustomResourceDefinition"]


def children():
    """What the operator renders, as its own snapshots have it; those of a pod's parts are put into the pool's."""
    documents = {path.stem: list(yaml.safe_load_all(path.read_text())) for path in sorted(SNAPSHOTS.glob("*.yaml"))}
    whole = [document for name in sorted(documents) for document in documents[name] if "kind" in document]
    parts = [document for name in sorted(documents) for document in documents[name] if "kind" not in document]
    pool = next(document for document in whole if document["kind"] == "StatefulSet")
    for number, part in enumerate(parts):
        other = copy.deepcopy(pool)
        other["metadata"]["name"] += f"-{number}"
        pod = other["spec"]["template"]["spec"]
        given = {key: value for key, value in part.items() if value is not None}
        pod |= {key: given[key] for key in given.keys() & {"volumes", "initContainers", "resourceClaims", "runtimeClassName"}}
        pod["containers"][0] |= {key: given[key] for key in given.keys() & {"args", "volumeMounts", "image", "env", "resources"}}
        whole.append(other)
    return whole


def kube_score(file):
    """(check, object, what it says) of each finding."""
    done = subprocess.run([os.environ["KUBE_SCORE"], "score", "--output-format", "json", str(file)], capture_output=True, text=True)
    if not done.stdout:
        raise RuntimeError(done.stderr)
    for found in json.loads(done.stdout):
        name = f"{found['type_meta']['kind']}/{found['object_meta']['name']}"
        for check in found["checks"]:
            # 10 is flawless.
            if not check["skipped"] and check["grade"] < 10:
                for comment in check["comments"] or [{"path": "", "summary": check["check"]["comment"]}]:
                    yield check["check"]["id"], name, f"{comment['path']}: {comment['summary']}"


def checkov(file):
    """(check, object, what it says) of each finding."""
    program = Path(sys.executable).with_name("checkov")
    command = [str(program), "--file", str(file), "--framework", "kubernetes", "--output", "json", "--compact", "--quiet", "--skip-download"]
    done = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(done.stdout)
    if report["summary"]["parsing_errors"] or not report["summary"]["passed"]:
        raise RuntimeError(f"checkov could not read {file.name}: {report['summary']}")
    for found in report["results"]["failed_checks"]:
        kind, _, name = found["resource"].split(".", 2)
        yield found["check_id"], f"{kind}/{name}", found["check_name"]


def main():
    sets = {"default": rendered(), "everything": rendered("-f", str(HERE / "everything.yaml")), "children": children()}
    exceptions = yaml.safe_load((HERE / "lint.yaml").read_text())
    explained = {(check, exception["objects"]): 0 for exception in exceptions for check in exception["checks"]}
    failures = set()
    with tempfile.TemporaryDirectory() as folder:
        for name, documents in sets.items():
            file = Path(folder) / f"{name}.yaml"
            file.write_text(yaml.safe_dump_all(documents))
            for check, subject, words in [*kube_score(file), *checkov(file)]:
                fitting = [key for key in explained if key[0] == check and re.fullmatch(key[1], f"{name}/{subject}")]
                explained |= {key: explained[key] + 1 for key in fitting}
                failures |= set() if fitting else {f"{name}/{subject}: {check}: {words}"}
    failures |= {f"lint.yaml explains {check} on {objects}, which nothing finds" for (check, objects), times in explained.items() if not times}
    print("\n".join(sorted(failures)))
    print(f"{len(failures)} findings beside the {sum(explained.values())} that lint.yaml explains")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
