#!/usr/bin/env python3
"""Checks of the Helm chart against an API server ($KUBECONFIG) that has no Carry-On yet; of what they make, empty namespaces stay.

No node is needed: nothing here waits for a pod. Of the controllers only clusterrole-aggregation-controller is.
Needs what check.py needs, and helm and kubectl on the PATH.
"""

import json
import re
import shutil
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

import yaml

from check import CHART, HERE, KINDS, CLUSTER_RULES, OPERATOR_RULES, ROOT, of_kind, operator_of, permissions

CRDS = [f"{kind}.carryon.dev" for kind in KINDS]


def run(*command, stdin=None, cwd=None):
    done = subprocess.run(command, input=stdin, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout


def helm(*arguments):
    return run("helm", *arguments)


def kubectl(*arguments, stdin=None):
    return run("kubectl", *arguments, stdin=stdin)


def install(release, namespace, *arguments, chart=CHART):
    return helm("install", release, str(chart), "--namespace", namespace, "--create-namespace", *arguments)


def upgrade(release, namespace):
    """Without what looks at the objects first: there is no node for its pod."""
    return helm("upgrade", release, str(CHART), "--namespace", namespace, "--no-hooks")


def make_namespace(name, **labels):
    """Leaves it there: without its controller a deleted namespace would never be gone."""
    labels = {f"pod-security.kubernetes.io/{mode}": level for mode, level in labels.items()}
    kubectl("apply", "--filename", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}))


def crd(name=CRDS[0]):
    return json.loads(kubectl("get", "crd", name, "--output", "json"))


def chart_with_other_crds(folder):
    """A chart of another version: its pools have another description."""
    chart = Path(folder) / "carry-on"
    shutil.copytree(CHART, chart)
    file = chart / "files/crds.yaml"
    before = file.read_text()
    after = before.replace("description: Desired state of a pool.", "description: As another version had it.")
    assert before != after
    file.write_text(after)
    return chart


def description(crd):
    return crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["description"]


def may(user, namespace, wanted):
    """Whether the API server lets `user` do each of (group, resource, verb), or (…, name), in `namespace`, or in all when None."""
    items = []
    for group, resource, verb, *name in wanted:
        resource, _, subresource = resource.partition("/")
        attributes = {"group": group, "resource": resource, "subresource": subresource, "verb": verb, "namespace": namespace or "", "name": "".join(name)}
        spec = {"user": user, "resourceAttributes": attributes}
        items.append({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec})
    reviews = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    answers = kubectl("create", "--filename", "-", "--output", "jsonpath={.status.allowed} ", stdin=reviews)
    return [answer == "true" for answer in answers.split()]


class Live(unittest.TestCase):
    def setUp(self):
        self.assertNotIn("carryon.dev", kubectl("get", "crd", "--output", "name"), "the cluster has Carry-On already")
        self.addCleanup(self.clean)

    def clean(self):
        for release in json.loads(helm("list", "--all-namespaces", "--output", "json")):
            if release["chart"].startswith("carry-on-"):
                helm("uninstall", release["name"], "--namespace", release["namespace"])
        kubectl("delete", "crd", "--ignore-not-found", *CRDS)

    def test_api_server_takes_every_manifest_strictly(self):
        install("carry-on", "carry-on-system")
        for namespace in ["team-a", "team-b"]:
            make_namespace(namespace)
        for release, values in [("default", []), ("all", ["--values", str(HERE / "everything.yaml")]), ("some", ["--set", "watchNamespaces={team-a,team-b}"])]:
            rendered = helm("template", release, str(CHART), "--namespace", "carry-on-system", "--set", "crds.enabled=false", *values)
            documents = [document for document in yaml.safe_load_all(rendered) if document and not document["apiVersion"].startswith("monitoring.coreos.com/")]
            kubectl("create", "--dry-run=server", "--validate=strict", "--filename", "-", stdin=yaml.dump_all(documents))

    def test_restricted_namespace_takes_the_pods(self):
        make_namespace("restricted", enforce="restricted")
        documents = list(yaml.safe_load_all(helm("template", "carry-on", str(CHART), "--namespace", "restricted", "--set", "crds.enabled=false")))
        pods = of_kind(documents, "Pod")
        template = operator_of(documents)
        template["metadata"] |= {"name": "operator", "namespace": "restricted"}
        del template["spec"]["serviceAccountName"]
        pods.append({"apiVersion": "v1", "kind": "Pod", **template})
        self.assertEqual(len(pods), 2)
        kubectl("create", "--dry-run=server", "--filename", "-", stdin=yaml.dump_all(pods))

    def test_operator_of_all_namespaces_may_do_its_work_everywhere_and_no_more(self):
        install("carry-on", "carry-on-system")
        user = "system:serviceaccount:carry-on-system:carry-on-operator"
        wanted = permissions(OPERATOR_RULES + CLUSTER_RULES)
        self.assertEqual(may(user, None, wanted), [True] * len(wanted))
        lease = [("coordination.k8s.io", "leases", verb, "carryon-operator") for verb in ("get", "create", "update")]
        self.assertEqual(may(user, "kube-system", lease), [True] * len(lease))
        self.assertEqual(may(user, "default", lease), [False] * len(lease))
        others = [("coordination.k8s.io", "leases", verb, "kube-scheduler") for verb in ("get", "update")]
        self.assertEqual(may(user, "kube-system", others), [False] * len(others))
        refused = [*(("", "secrets", verb) for verb in ("get", "list", "watch", "create")), ("", "pods", "create"), ("", "pods", "get"), ("carryon.dev", "carryonjobs/status", "update")]
        refused += [("carryon.dev", "basemodelpools", "delete"), ("apps", "daemonsets", "get")]
        self.assertEqual(may(user, "default", refused), [False] * len(refused))

    def test_operator_of_some_namespaces_may_do_its_work_there_only(self):
        for namespace in ["team-a", "team-b"]:
            make_namespace(namespace)
        install("carry-on", "carry-on-system", "--set", "watchNamespaces={team-a,team-b}")
        user = "system:serviceaccount:carry-on-system:carry-on-operator"
        wanted = permissions(OPERATOR_RULES)
        for namespace, allowed in [("team-a", True), ("team-b", True), ("team-c", False), (None, False)]:
            self.assertEqual(may(user, namespace, wanted), [allowed] * len(wanted), namespace)

    def test_editors_and_viewers_of_a_namespace_get_the_three_kinds(self):
        install("carry-on", "carry-on-system")
        for role in ["view", "edit", "admin"]:
            kubectl("create", "rolebinding", f"test-{role}", f"--clusterrole={role}", f"--user={role}", "--namespace=default")
            self.addCleanup(kubectl, "delete", "rolebinding", f"test-{role}", "--namespace=default")
        see, change = ("carryon.dev", "carryonjobs", "get"), ("carryon.dev", "carryonjobs", "create")
        scale, status = ("carryon.dev", "basemodelpools/scale", "patch"), ("carryon.dev", "carryonjobs/status", "patch")
        want = {"view": [True, False, False, False], "edit": [True, True, True, False], "admin": [True, True, True, False]}
        deadline = time.monotonic() + 30
        while (found := {role: may(role, "default", [see, change, scale, status]) for role in want}) != want:
            self.assertLess(time.monotonic(), deadline, found)

    def test_upgrade_brings_new_crds_and_uninstall_keeps_them(self):
        with tempfile.TemporaryDirectory() as folder:
            install("carry-on", "carry-on-system", chart=chart_with_other_crds(folder))
        self.assertEqual(description(crd()), "As another version had it.")
        upgrade("carry-on", "carry-on-system")
        self.assertEqual(description(crd()), "Desired state of a pool.")
        kubectl("apply", "--filename", str(ROOT / "examples/quickstart/pool.yaml"))
        helm("uninstall", "carry-on", "--namespace", "carry-on-system")
        self.assertIn("smollm2", kubectl("get", "bmp", "--output", "name"))
        install("carry-on", "carry-on-system")

    def test_kept_crds_are_taken_over_by_another_release_that_asks_for_it(self):
        with tempfile.TemporaryDirectory() as folder:
            install("first", "one", chart=chart_with_other_crds(folder))
        kubectl("apply", "--filename", str(ROOT / "examples/quickstart/pool.yaml"))
        helm("uninstall", "first", "--namespace", "one")
        with self.assertRaisesRegex(RuntimeError, 'release-name" must equal "second": current value is "first"'):
            install("second", "two")
        install("second", "two", "--take-ownership")
        self.assertEqual(crd()["metadata"]["annotations"]["meta.helm.sh/release-name"], "second")
        self.assertEqual(description(crd()), "Desired state of a pool.")
        self.assertIn("smollm2", kubectl("get", "bmp", "--output", "name"))
        upgrade("second", "two")

    def test_crds_applied_by_kubectl_are_taken_over(self):
        with tempfile.TemporaryDirectory() as folder:
            kubectl("apply", "--filename", str(chart_with_other_crds(folder) / "files/crds.yaml"))
        install("carry-on", "carry-on-system", "--take-ownership", "--force-conflicts")
        self.assertEqual(description(crd()), "Desired state of a pool.")

    def test_second_operator_lives_beside_the_first_without_crds(self):
        make_namespace("team-a")
        install("one", "carry-on-system")
        install("two", "carry-on-system", "--set", "crds.enabled=false,watchNamespaces={team-a}")

    def test_readme_lets_held_trainers_go_and_nothing_else_when_no_operator_is_left(self):
        make_namespace("held")
        foreign, ours, other = {"app.kubernetes.io/component": "trainer"}, "carryon.dev/last-words", "example.org/other"
        pods = [
            ("ended", foreign | {"app.kubernetes.io/managed-by": "carryon-operator"}, [ours]),
            ("twice", foreign | {"app.kubernetes.io/managed-by": "carryon-operator"}, [ours, other]),
            ("foreign", foreign, [other]),
        ]
        for name, labels, finalizers in pods:
            metadata = {"name": name, "namespace": "held", "labels": labels, "finalizers": finalizers}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [{"name": "trainer", "image": "none"}]}}
            kubectl("create", "--filename", "-", stdin=json.dumps(pod))
            kubectl("delete", "pod", name, "--namespace=held", "--wait=false")
        self.assertEqual(len(kubectl("get", "pods", "--namespace=held", "--output=name").split()), 3, "one is gone already")
        blocks = re.findall(r"```sh\n(.*?)```", (CHART / "README.md").read_text(), re.DOTALL)
        run("bash", "-euo", "pipefail", "-c", next(block for block in blocks if "finalizers" in block), cwd=ROOT)
        left = json.loads(kubectl("get", "pods", "--namespace=held", "--output=json"))["items"]
        found = {pod["metadata"]["name"]: pod["metadata"]["finalizers"] for pod in left}
        self.assertEqual(found, {"twice": [other], "foreign": [other]})
        for name in found:
            kubectl("patch", "pod", name, "--namespace=held", "--type=merge", "--patch", '{"metadata": {"finalizers": null}}')

    def test_uninstall_deletes_the_crds_when_asked_to(self):
        install("carry-on", "carry-on-system", "--set", "crds.keep=false")
        helm("uninstall", "carry-on", "--namespace", "carry-on-system", "--wait")
        self.assertNotIn("carryon.dev", kubectl("get", "crd", "--output", "name"))

    def test_readme_gives_argo_cd_the_health_script(self):
        make_namespace("argocd")
        kubectl("create", "configmap", "argocd-cm", "--namespace=argocd", "--from-literal=kept=yes")
        self.addCleanup(kubectl, "delete", "configmap", "argocd-cm", "--namespace=argocd")
        blocks = re.findall(r"```sh\n(.*?)```", (CHART / "README.md").read_text(), re.DOTALL)
        run("bash", "-euo", "pipefail", "-c", next(block for block in blocks if "argocd-cm" in block), cwd=ROOT)
        data = json.loads(kubectl("get", "configmap", "argocd-cm", "--namespace=argocd", "--output=json"))["data"]
        script = (CHART / "argocd/health.lua").read_text()
        kinds = ["BaseModelPool", "CarryOnJob", "CarryOnDeployment"]
        self.assertEqual(data, {"kept": "yes"} | {f"resource.customizations.health.carryon.dev_{kind}": script for kind in kinds})

    def test_api_server_takes_the_examples(self):
        install("carry-on", "carry-on-system")
        for folder in ["quickstart", "spam", "models", "sources"]:
            kubectl("create", "--dry-run=server", "--validate=strict", "--filename", str(ROOT / "examples" / folder))


if __name__ == "__main__":
    unittest.main()
