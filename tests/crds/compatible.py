#!/usr/bin/env python3
"""Whether the definitions in crds/crds.yaml take, keep and show what those of released.yaml do, by crdify's rules.

    compatible.py             says so, and that crdify finds what it should in changed copies of the definitions
    compatible.py --update    writes what is new into released.yaml, which is refused while something is incompatible
    compatible.py --break     writes it all the same: for a change that no stored object can meet; the commit says why

Needs PyYAML and crdify: $CRDIFY, or the one on the PATH.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
CRDS = HERE.parents[1] / "crds/crds.yaml"
RELEASED = HERE / "released.yaml"
ADVICE = "tests/crds/released.yaml: run `make crds-released` and read the difference"


def without_words(value):
    """Descriptions and messages are for people."""
    if isinstance(value, dict):
        return {key: without_words(member) for key, member in value.items() if not (key in ("description", "message") and isinstance(member, str))}
    return [without_words(item) for item in value] if isinstance(value, list) else value


# What stands for the schemas of a list's items and of a map's values in a path.
BELOW = {"items": "[]", "additionalProperties": "{}"}


def flat(schema, path="^"):
    """Every field of a schema and what is said of it alone, by path. An object's default leaves out what is its members' default anyway."""
    own = dict(schema)
    members = own.pop("properties", {})
    below = {f"{path}.{name}": member for name, member in members.items()}
    below |= {path + mark: own.pop(key) for key, mark in BELOW.items() if isinstance(own.get(key), dict)}
    if isinstance(own.get("default"), dict):
        own["default"] = {name: value for name, value in own["default"].items() if value != members[name].get("default")}
    return {path: own} | {at: said for child, field in below.items() for at, said in flat(field, child).items()}


def deep(fields):
    """The schema whose fields these are: what `flat` was made of."""
    schemas = {path: dict(own) for path, own in fields.items()}
    for path, schema in schemas.items():
        key = next((key for key, mark in BELOW.items() if path.endswith(mark)), None)
        if key:
            schemas[path.removesuffix(BELOW[key])][key] = schema
        elif path != "^":
            parent, _, name = path.rpartition(".")
            schemas[parent].setdefault("properties", {})[name] = schema
    return schemas["^"]


def essence(crd):
    """What objects and clients meet of a definition: its head, and its fields by path."""
    spec = crd["spec"]
    version, = spec["versions"]
    head = {"name": crd["metadata"]["name"], "scope": spec["scope"], "names": spec["names"], "storedVersions": [version["name"]]}
    head |= {"version": {key: version[key] for key in ("name", "served", "storage", "subresources")}}
    return {"head": head, "fields": flat(without_words(version["schema"]["openAPIV3Schema"]))}


def definition(essence):
    head = essence["head"]
    version = head["version"] | {"schema": {"openAPIV3Schema": deep(essence["fields"])}}
    spec = {"group": head["name"].partition(".")[2], "names": head["names"], "scope": head["scope"], "versions": [version]}
    kind = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"}
    return kind | {"metadata": {"name": head["name"]}, "spec": spec, "status": {"storedVersions": head["storedVersions"]}}


def current():
    return {crd["spec"]["names"]["kind"]: essence(crd) for crd in yaml.safe_load_all(CRDS.read_text())}


def released():
    return yaml.safe_load(RELEASED.read_text())


def text(all_kinds):
    """A line for each field: what changes is read in the difference."""
    lines = ["# The definitions that users have, without their words; written by `make crds-released`."]
    for kind, essence in all_kinds.items():
        lines += [f"{kind}:", f"  head: {json.dumps(essence['head'])}", "  fields:"]
        lines += [f"    {json.dumps(path)}: {json.dumps(own, sort_keys=True)}" for path, own in essence["fields"].items()]
    return "\n".join(lines) + "\n"


def incompatible(before, after):
    """What crdify finds: `rule path: words`, sorted."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("before.yaml", "after.yaml")]
        for file, essence in zip(files, (before, after)):
            file.write_text(json.dumps(definition(essence)))
        command = [os.environ.get("CRDIFY", "crdify"), "--config", str(HERE / "crdify.yaml"), "--output", "json", *(f"file://{file}" for file in files)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.stderr:
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout)
    results = [("", result) for result in found.get("crdValidation") or []]
    versions = (found.get("sameVersionValidation") or {}).values()
    results += [(path, result) for version in versions for path, of_field in version.items() for result in of_field]
    words = [f"{result['name']} {path}: {error}" for path, result in results for error in result.get("errors") or []]
    assert bool(words) == bool(done.returncode), done.stdout
    return sorted(words)


def all_incompatible():
    before, after = released(), current()
    gone = [f"{kind}: the definition is gone" for kind in before if kind not in after]
    return gone + [f"{kind}: {words}" for kind in before if kind in after for words in incompatible(before[kind], after[kind])]


# A change of a definition, and the rule that finds it.
FORBIDDEN = [
    ("CarryOnJob", "existingFieldRemoval", lambda head, fields: fields.pop("^.spec.training.seed")),
    ("CarryOnJob", "existingFieldRemoval", lambda head, fields: fields.pop("^.status.workerImage")),
    ("CarryOnJob", "scope", lambda head, fields: head.update(scope="Cluster")),
    ("CarryOnJob", "storedVersionRemoval", lambda head, fields: head["version"].update(name="v1alpha2")),
    ("CarryOnJob", "type", lambda head, fields: fields["^.spec.training.seed"].update(type="string")),
    ("CarryOnJob", "required", lambda head, fields: fields["^.spec"]["required"].append("suspend")),
    ("CarryOnJob", "enum", lambda head, fields: fields["^.spec.task"]["enum"].pop()),
    ("CarryOnJob", "enum", lambda head, fields: fields["^.spec.managedBy"].update(enum=["carryon.dev/operator"])),
    ("CarryOnJob", "default", lambda head, fields: fields["^.spec.backoffLimit"].update(default=7)),
    ("CarryOnJob", "default", lambda head, fields: fields["^.spec.backoffLimit"].pop("default")),
    ("CarryOnJob", "default", lambda head, fields: fields["^.spec.training.maxSteps"].update(default=7)),
    ("CarryOnJob", "minimum", lambda head, fields: fields["^.spec.head.width"].update(minimum=fields["^.spec.head.width"]["minimum"] + 1)),
    ("CarryOnJob", "maximum", lambda head, fields: fields["^.spec.head.width"].update(maximum=fields["^.spec.head.width"]["maximum"] - 1)),
    ("CarryOnJob", "minLength", lambda head, fields: fields["^.spec.data.split.train[]"].update(minLength=9)),
    ("CarryOnJob", "maxLength", lambda head, fields: fields["^.spec.data.split.train[]"].update(maxLength=9)),
    ("CarryOnJob", "minItems", lambda head, fields: fields["^.spec.data.split.train"].update(minItems=9)),
    ("CarryOnJob", "maxItems", lambda head, fields: fields["^.spec.data.split.train"].update(maxItems=1)),
    ("CarryOnJob", "minProperties", lambda head, fields: fields["^.spec.trainer.labels"].update(minProperties=1)),
    ("CarryOnJob", "maxProperties", lambda head, fields: fields["^.spec.trainer.labels"].update(maxProperties=1)),
    ("CarryOnJob", "unhandled", lambda head, fields: fields["^.spec.data.split.train[]"].update(pattern="^x$")),
    ("CarryOnJob", "unhandled", lambda head, fields: fields["^.spec.training.seed"].update(format="int32")),
    ("CarryOnJob", "unhandled", lambda head, fields: fields["^.spec"].setdefault("x-kubernetes-validations", []).append({"rule": "has(self.suspend)"})),
    ("CarryOnDeployment", "unhandled", lambda head, fields: fields["^.spec.heads"].update({"x-kubernetes-list-type": "atomic"})),
    ("BaseModelPool", "unhandled", lambda head, fields: fields["^.spec.replicas"].pop("nullable")),
]
ALLOWED = [
    ("CarryOnJob", lambda head, fields: fields.update({"^.spec.fresh": {"type": "string", "maxLength": 9, "x-kubernetes-validations": [{"rule": "self != ''"}]}})),
    ("CarryOnJob", lambda head, fields: fields["^.spec.task"]["enum"].append("Fresh")),
    ("CarryOnJob", lambda head, fields: fields["^.spec"]["required"].pop()),
    ("CarryOnJob", lambda head, fields: fields["^.spec.head.width"].update(minimum=1, maximum=1 << 20)),
]


class Compatible(unittest.TestCase):
    def test_definitions_take_keep_and_show_what_the_released_ones_do(self):
        self.assertEqual(all_incompatible(), [])

    def test_what_is_new_is_among_what_is_released(self):
        self.assertEqual(RELEASED.read_text(), text(current()), ADVICE)

    def test_a_definition_is_the_same_after_it_was_taken_apart(self):
        for essence in current().values():
            self.assertEqual(flat(deep(essence["fields"])), essence["fields"])

    def test_each_rule_finds_a_change_of_the_real_definitions(self):
        before = current()
        for number, (kind, rule, change) in enumerate(FORBIDDEN):
            after = copy.deepcopy(before[kind])
            change(after["head"], after["fields"])
            with self.subTest(rule=rule, number=number):
                found = incompatible(before[kind], after)
                self.assertIn(rule, [words.split()[0] for words in found], found)

    def test_additions_are_no_breach(self):
        before = current()
        for number, (kind, change) in enumerate(ALLOWED):
            after = copy.deepcopy(before[kind])
            change(after["head"], after["fields"])
            with self.subTest(number=number):
                self.assertNotEqual(before[kind], after)
                self.assertEqual(incompatible(before[kind], after), [])


if __name__ == "__main__":
    if sys.argv[1:] in (["--update"], ["--break"]):
        found = all_incompatible() if RELEASED.exists() else []
        print("\n".join(found), file=sys.stderr)
        if found and sys.argv[1] == "--update":
            sys.exit("not written: this is incompatible with what users have")
        RELEASED.write_text(text(current()))
    else:
        unittest.main()
