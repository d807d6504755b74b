#!/usr/bin/env python3
"""Checks of the Helm chart that need no cluster: lint, schema, RBAC, pods, policies, CRDs, snapshots, Argo CD's health script.

    check.py             runs them all
    check.py --update    rewrites what is generated: snapshots, the chart's copy of the CRDs, the table in its README

Needs PyYAML, lupa (Lua 5.1, what Argo CD speaks) and helm: $HELM, or the one on the PATH.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import yaml
from lupa import lua51

import policies
import readme_table
from schema_cases import ACCEPTED, REFUSED

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHART = ROOT / "charts/carry-on"
HELM = os.environ.get("HELM", "helm")
NAMESPACE = "carry-on-system"
KINDS = ["basemodelpools", "carryonjobs", "carryondeployments"]
SNAPSHOTS = {"rendered.yaml": [], "rendered-everything.yaml": ["-f", str(HERE / "everything.yaml")]}
WATCHED = ["team-a", "team-b"]
NAMESPACED = ["--set", "watchNamespaces={team-a,team-b}"]
OPENED = ["--set", "networkPolicies.enabled=false"]

# The operator's interface, written down a second time: group, resources, verbs.
READ = ["get", "list", "watch"]
WATCH = ["list", "watch"]
OPERATOR_RULES = [
    ("carryon.dev", KINDS, READ),
    ("carryon.dev", ["carryonjobs"], ["delete", "patch"]),
    ("carryon.dev", [f"{kind}/status" for kind in KINDS], ["patch"]),
    ("carryon.dev", [f"{kind}/finalizers" for kind in KINDS], ["update"]),
    ("apps", ["statefulsets"], READ + ["create", "patch"]),
    ("apps", ["deployments"], READ + ["create", "patch", "delete"]),
    ("batch", ["jobs"], READ + ["create", "patch", "delete"]),
    ("apps", ["controllerrevisions"], READ + ["create", "patch", "delete"]),
    ("", ["configmaps"], READ + ["create", "patch", "delete"]),
    ("", ["services"], READ + ["create", "patch"]),
    ("", ["pods"], WATCH + ["patch"]),
    ("", ["persistentvolumeclaims"], WATCH),
    ("policy", ["poddisruptionbudgets"], READ + ["create", "patch"]),
    ("networking.k8s.io", ["networkpolicies"], READ + ["create", "patch", "delete"]),
    ("", ["events"], ["list"]),
    ("events.k8s.io", ["events"], ["create", "patch"]),
]
# Of all namespaces only.
CLUSTER_RULES = [("", ["nodes", "namespaces"], WATCH), ("coordination.k8s.io", ["leases"], ["list"])]
# The operator's own Lease and no other; what is created has no name yet when RBAC is asked.
LEASE_RULES = [("coordination.k8s.io", ["leases/carryon-operator"], ["get", "update"]), ("coordination.k8s.io", ["leases"], ["create"])]

# Where the schema leaves the rest to the API server.
OPEN = {"global", "nodeAffinity", "podAffinity", "podAntiAffinity", "labelSelector", "valueFrom", "namespaceSelector", "podSelector", "ipBlock"}


def helm(*arguments):
    done = subprocess.run([HELM, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"helm {arguments[0]}: {done.stderr or done.stdout}")
    return done.stdout


def render(*arguments, chart=CHART, release="carry-on"):
    return helm("template", release, str(chart), "--namespace", NAMESPACE, *arguments)


def objects(*arguments, **options):
    return [document for document in yaml.safe_load_all(render(*arguments, **options)) if document]


def of_kind(documents, *kinds):
    return [document for document in documents if document["kind"] in kinds]


def snapshot(arguments):
    """Without the CRDs and the dashboards, which have checks of their own."""
    return render(*arguments, "--set", "crds.enabled=false,dashboards.enabled=false")


def permissions(rules):
    """Every (group, resource, verb), whatever rules they are spread over; `resource/name` of a rule with names."""
    return {(group, resource, verb) for group, resources, verbs in rules for resource in resources for verb in verbs}


def rendered_permissions(role):
    for rule in role["rules"]:
        assert rule.keys() - {"resourceNames"} == {"apiGroups", "resources", "verbs"}, rule

    def resources(rule):
        return [f"{resource}/{name}" for resource in rule["resources"] for name in rule["resourceNames"]] if "resourceNames" in rule else rule["resources"]

    return permissions((group, resources(rule), rule["verbs"]) for rule in role["rules"] for group in rule["apiGroups"])


def is_hook(document):
    return "helm.sh/hook" in document["metadata"].get("annotations", {})


def operator_of(documents):
    return of_kind(documents, "Deployment")[0]["spec"]["template"]


def children(*kinds):
    """The operator's children as its own snapshots have them."""
    files = [ROOT / f"operator/tests/snapshots/{name}.yaml" for name in ["pool", "job", "deployment"]]
    return [document for file in files for document in of_kind(yaml.safe_load_all(file.read_text()), *kinds)]


def worker_pods(namespace):
    """Labels and port by component."""
    pods = {}
    for template in [document["spec"]["template"] for document in children("StatefulSet", "Job", "Deployment")]:
        labels = template["metadata"]["labels"]
        port = template["spec"]["containers"][0]["ports"][0]["containerPort"]
        pods[labels["app.kubernetes.io/component"]] = {"namespace": namespace, "labels": labels, "port": port}
    return pods


class Chart(unittest.TestCase):
    maxDiff = None

    def test_lint_finds_nothing(self):
        for arguments in [*SNAPSHOTS.values(), NAMESPACED, OPENED]:
            helm("lint", "--strict", "--quiet", str(CHART), *arguments)

    def test_rendered_manifests_are_those_committed(self):
        for name, arguments in SNAPSHOTS.items():
            self.assertEqual((HERE / name).read_text(), snapshot(arguments), f"{name}: run check.py --update and read the difference")

    def test_crds_are_those_of_the_repository(self):
        committed = (ROOT / "crds/crds.yaml").read_text()
        self.assertEqual((CHART / "files/crds.yaml").read_text(), committed, "charts/carry-on/files/crds.yaml: run check.py --update")
        for keep in ["true", "false"]:
            rendered = of_kind(objects("--set", f"crds.keep={keep}"), "CustomResourceDefinition")
            for crd in rendered:
                metadata = crd["metadata"]
                self.assertEqual(metadata.pop("labels")["app.kubernetes.io/instance"], "carry-on")
                self.assertEqual(metadata.pop("annotations", {}).get("helm.sh/resource-policy"), "keep" if keep == "true" else None)
            self.assertEqual(rendered, list(yaml.safe_load_all(committed)))
        self.assertEqual(of_kind(objects("--set", "crds.enabled=false"), "CustomResourceDefinition"), [])

    def test_packaged_chart_renders_the_same(self):
        with tempfile.TemporaryDirectory() as folder:
            helm("package", str(CHART), "--destination", folder)
            self.assertEqual(render(chart=next(Path(folder).iterdir())), render())

    def test_schema_takes_good_values_and_refuses_bad_ones_by_name(self):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "values.yaml"
            for values in ACCEPTED:
                file.write_text(json.dumps(values))
                render("-f", str(file))
            for values, named in REFUSED:
                file.write_text(json.dumps(values))
                with self.subTest(values=values), self.assertRaisesRegex(RuntimeError, f"(?s)don't meet the specifications.*{named}"):
                    render("-f", str(file))

    def test_schema_is_closed_and_knows_the_same_values(self):
        def objects_in(schema, name):
            if isinstance(schema, dict):
                if schema.get("type") == "object" and name not in OPEN:
                    self.assertIn("additionalProperties", schema, name)
                for key, child in schema.items():
                    objects_in(child, key)

        schema = json.loads((CHART / "values.schema.json").read_text())
        values = yaml.safe_load((CHART / "values.yaml").read_text())
        objects_in(schema, "")
        self.assertEqual(schema["properties"].keys(), values.keys())
        for key, group in schema["properties"].items():
            if key != "affinity" and "properties" in group:
                self.assertEqual(group["properties"].keys(), values[key].keys(), key)

    def test_operator_may_do_what_its_interface_lists_and_nothing_else(self):
        cases = [([], [None], OPERATOR_RULES + CLUSTER_RULES, ["kube-system"]), (NAMESPACED, WATCHED, OPERATOR_RULES, WATCHED)]
        for arguments, namespaces, rules, leases in cases:
            documents = [document for document in objects(*arguments) if not is_hook(document)]

            def by_name(kind):
                found = of_kind(documents, kind, f"Cluster{kind}")
                return {(item["metadata"]["name"], item["metadata"].get("namespace")): item for item in found}

            roles, bindings, account = by_name("Role"), by_name("RoleBinding"), of_kind(documents, "ServiceAccount")[0]["metadata"]
            want = {("carry-on-operator", namespace): rules for namespace in namespaces}
            want |= {("carry-on-operator-lease", namespace): LEASE_RULES for namespace in leases}
            self.assertEqual(bindings.keys(), want.keys())
            for (name, namespace), rules in want.items():
                role, binding = roles.pop((name, namespace)), bindings[name, namespace]
                self.assertEqual(rendered_permissions(role), permissions(rules))
                self.assertEqual(role["kind"], "Role" if namespace else "ClusterRole")
                self.assertEqual(binding["kind"], role["kind"] + "Binding")
                self.assertEqual(binding["roleRef"], {"apiGroup": "rbac.authorization.k8s.io", "kind": role["kind"], "name": name})
                self.assertEqual(binding["subjects"], [{"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}])
            self.assertEqual({name for name, _ in roles}, set() if arguments else {"carry-on-view", "carry-on-edit"})

    def test_who_looks_at_the_objects_before_an_upgrade_may_list_them_and_nothing_else(self):
        hooks = [document for document in objects(*NAMESPACED) if is_hook(document) and document["kind"] != "Pod"]
        self.assertEqual([hook["kind"] for hook in hooks], ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Job"])
        for hook in hooks:
            annotations = hook["metadata"]["annotations"]
            self.assertEqual(annotations["helm.sh/hook"], "pre-upgrade,pre-rollback")
            self.assertEqual(annotations["helm.sh/hook-delete-policy"], "before-hook-creation,hook-succeeded")
        account, role, binding, job = hooks
        self.assertEqual(rendered_permissions(role), permissions([("carryon.dev", KINDS, ["list"])]))
        self.assertEqual((binding["roleRef"]["name"], job["spec"]["template"]["spec"]["serviceAccountName"]), (role["metadata"]["name"], account["metadata"]["name"]))
        self.assertEqual(binding["subjects"], [{"kind": "ServiceAccount", "name": account["metadata"]["name"], "namespace": NAMESPACE}])
        for values in ["crds.enabled=false", "crds.check=false"]:
            self.assertEqual([document["kind"] for document in objects("--set", values) if is_hook(document)], ["Pod"])

    def test_the_lease_has_the_name_that_the_operator_gives_it(self):
        self.assertIn('const LEASE: &str = "carryon-operator";', (ROOT / "operator/src/cluster/leader.rs").read_text())

    def test_users_may_see_or_change_the_three_kinds_but_not_their_status(self):
        roles = {role["metadata"]["name"]: role for role in of_kind(objects(), "ClusterRole")}
        scale = ["basemodelpools/scale", "carryondeployments/scale"]
        view = [("carryon.dev", KINDS, READ), ("carryon.dev", [f"{kind}/status" for kind in KINDS] + scale, ["get"])]
        edit = [("carryon.dev", KINDS, ["create", "delete", "deletecollection", "patch", "update"]), ("carryon.dev", scale, ["patch", "update"])]
        for name, rules, aggregates in [("view", view, {"view", "edit", "admin"}), ("edit", edit, {"edit", "admin"})]:
            role = roles[f"carry-on-{name}"]
            self.assertEqual(rendered_permissions(role), permissions(rules))
            prefix = "rbac.authorization.k8s.io/aggregate-to-"
            self.assertEqual({label.removeprefix(prefix) for label in role["metadata"]["labels"] if label.startswith(prefix)}, aggregates)

    def test_pods_are_restricted(self):
        for arguments in SNAPSHOTS.values():
            documents = objects(*arguments)
            for spec in [operator_of(documents)["spec"], of_kind(documents, "Pod")[0]["spec"], of_kind(documents, "Job")[0]["spec"]["template"]["spec"]]:
                self.assertEqual(spec["securityContext"], {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}})
                restricted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
                self.assertEqual([container["securityContext"] for container in spec["containers"]], [restricted])
                self.assertFalse(spec.keys() & {"initContainers", "hostNetwork", "hostPID", "hostIPC"})

    def test_one_value_changes_the_registry_of_every_image(self):
        digest = "sha256:" + "1" * 64
        cases = [
            ([], "ghcr.io/carry-on/{}:0.1.0"),
            (["global.imageRegistry=mirror.example.org:5000/ghcr"], "mirror.example.org:5000/ghcr/carry-on/{}:0.1.0"),
            (["global.imageRegistry=mirror", f"image.digest={digest},workerImage.digest={digest},workerImage.cuda.digest={digest}"], "mirror/carry-on/{}@" + digest),
            (["image.repository=carry-on/operator,workerImage.repository=localhost/carry-on/worker,workerImage.cuda.repository=a.b/carry-on/worker-cuda,global.imageRegistry=mirror"], "mirror/carry-on/{}:0.1.0"),
        ]
        for values, want in cases:
            documents = objects(*(argument for value in values for argument in ("--set", value)))
            images = [operator_of(documents)["spec"]["containers"][0]["image"], of_kind(documents, "Pod")[0]["spec"]["containers"][0]["image"]]
            self.assertEqual(images, [want.format("operator")] * 2)
            arguments = operator_of(documents)["spec"]["containers"][0]["args"]
            for option, name in [("--worker-image", "worker"), ("--worker-cuda-image", "worker-cuda")]:
                self.assertEqual(arguments[arguments.index(option) + 1], want.format(name))

    def test_who_has_no_image_for_cuda_gives_the_operator_none(self):
        arguments = operator_of(objects("--set", "workerImage.cuda.repository="))["spec"]["containers"][0]["args"]
        self.assertNotIn("--worker-cuda-image", arguments)

    def test_pull_secrets_of_all_charts_and_of_this_one_are_added_up(self):
        documents = objects("--set", "global.imagePullSecrets={one},global.imagePullSecrets[1].name=two,image.pullSecrets[0].name=two,image.pullSecrets[1].name=three")
        for spec in [operator_of(documents)["spec"], of_kind(documents, "Pod")[0]["spec"]]:
            self.assertEqual([secret["name"] for secret in spec["imagePullSecrets"]], ["one", "two", "three"])

    def test_workers_get_the_pull_secrets_of_all_and_their_own_and_the_environment(self):
        def defaults(*values):
            arguments = operator_of(objects(*(argument for value in values for argument in ("--set", value))))["spec"]["containers"][0]["args"]
            return json.loads(arguments[arguments.index("--pod-defaults") + 1]) if "--pod-defaults" in arguments else None

        self.assertEqual(defaults(), None)
        self.assertEqual(defaults("image.pullSecrets[0].name=operator"), None)
        self.assertEqual(defaults("global.imagePullSecrets={one}"), {"imagePullSecrets": [{"name": "one"}]})
        want = {"imagePullSecrets": [{"name": "one"}, {"name": "two"}], "env": [{"name": "NO_PROXY", "value": ".svc,$$(HOST)"}]}
        values = ["global.imagePullSecrets={one}", "worker.imagePullSecrets[0].name=two,worker.imagePullSecrets[1].name=one", "worker.env[0].name=NO_PROXY,worker.env[0].value=.svc\\,$(HOST)"]
        self.assertEqual(defaults(*values), want)

    def test_operator_is_started_as_its_interface_says(self):
        container = operator_of(objects(*NAMESPACED, *OPENED))["spec"]["containers"][0]
        want = ["run", "--worker-image", "ghcr.io/carry-on/worker:0.1.0", "--worker-cuda-image", "ghcr.io/carry-on/worker-cuda:0.1.0"]
        want += ["--pod-user", "auto", "--namespace", "team-a", "--namespace", "team-b"]
        want += ["--listen", "0.0.0.0:8080", "--installation", f"{NAMESPACE}/carry-on", "--identity", "$(POD_NAME)"]
        self.assertEqual((container["command"], container["args"]), (["carryon-operator"], want))

    def test_operator_knows_the_options_it_is_started_with(self):
        binary = Path(os.environ.get("CARRYON_BIN", ROOT / "target/release")) / "carryon-operator"
        documents = objects("--set", "watchNamespaces={team-a}") + objects("--set", "leaseNamespace=leases,global.imagePullSecrets={one}")
        pods = [document["spec"]["template"] for document in of_kind(documents, "Deployment", "Job")]
        for container in [*(pod["spec"]["containers"][0] for pod in pods), of_kind(documents, "Pod")[0]["spec"]["containers"][0]]:
            command, *rest = container["args"]
            if not binary.exists() or f"\n  {command} " not in subprocess.run([binary, "--help"], capture_output=True, text=True).stdout:
                self.skipTest(f"no carryon-operator {command} in $CARRYON_BIN")
            usage = subprocess.run([binary, command, "--help"], capture_output=True, text=True).stdout
            for option in rest:
                if option.startswith("--"):
                    self.assertIn(f"{option} ", usage)

    def test_selectors_find_the_operator_and_no_worker(self):
        documents = objects("-f", str(HERE / "everything.yaml"))
        labels = operator_of(documents)["metadata"]["labels"]
        service = of_kind(documents, "Service")[0]
        selectors = [{"matchLabels": service["spec"]["selector"]}]
        selectors += [document["spec"]["selector"] for document in of_kind(documents, "Deployment", "PodDisruptionBudget")]
        self.assertEqual(len(selectors), 3)
        others = [pod["labels"] | {"app.kubernetes.io/instance": "carry-on"} for pod in worker_pods("team-a").values()]
        others += [of_kind(documents, "Pod")[0]["metadata"]["labels"], of_kind(documents, "Job")[0]["spec"]["template"]["metadata"]["labels"]]
        for selector in selectors:
            self.assertTrue(policies.matches(selector, labels))
            self.assertFalse(any(policies.matches(selector, other) for other in others))
        monitor = of_kind(documents, "ServiceMonitor")[0]["spec"]
        self.assertTrue(policies.matches(monitor["selector"], service["metadata"]["labels"]))
        self.assertEqual(monitor["endpoints"][0]["port"], service["spec"]["ports"][0]["name"])

    def test_replicas_are_spread_over_nodes_unless_told_otherwise(self):
        constraint, = operator_of(objects())["spec"]["topologySpreadConstraints"]
        self.assertEqual((constraint["topologyKey"], constraint["whenUnsatisfiable"]), ("kubernetes.io/hostname", "ScheduleAnyway"))
        self.assertTrue(policies.matches(constraint["labelSelector"], operator_of(objects())["metadata"]["labels"]))
        told = operator_of(objects("-f", str(HERE / "everything.yaml")))["spec"]["topologySpreadConstraints"]
        self.assertEqual(told, yaml.safe_load((HERE / "everything.yaml").read_text())["topologySpreadConstraints"])
        self.assertNotIn("topologySpreadConstraints", operator_of(objects("--set", "topologySpreadConstraints=null"))["spec"])

    def test_a_budget_needs_a_second_replica(self):
        self.assertEqual(of_kind(objects(), "PodDisruptionBudget"), [])
        self.assertEqual(len(of_kind(objects("--set", "replicas=2"), "PodDisruptionBudget")), 1)
        self.assertEqual(of_kind(objects("--set", "replicas=2,podDisruptionBudget.enabled=false"), "PodDisruptionBudget"), [])

    def test_two_releases_share_no_name(self):
        def names(release):
            found = objects("--set", "crds.enabled=false", release=release)
            return {(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in found}

        self.assertFalse(names("one") & names("two"))
        self.assertTrue(all(len(name) <= 63 for _, _, name in names("r" * 53)))

    def test_policies_let_through_what_is_needed_and_nothing_else(self):
        documents = objects()
        rules = of_kind(documents, "NetworkPolicy")
        for policy in children("NetworkPolicy"):
            rules += [policy | {"metadata": policy["metadata"] | {"namespace": namespace}} for namespace in ("team-a", "team-b")]
        self.assertEqual(len(rules), 7)
        own, other = worker_pods("team-a"), worker_pods("team-b")
        operator = {"namespace": NAMESPACE, "labels": operator_of(documents)["metadata"]["labels"], "port": 8080}
        test = {"namespace": NAMESPACE, "labels": of_kind(documents, "Pod")[0]["metadata"]["labels"]}
        impostor, neighbour = ({"namespace": namespace, "labels": operator["labels"]} for namespace in ("team-a", "elsewhere"))
        stranger, scraper = ({"namespace": namespace, "labels": {"app": "shell"}} for namespace in ("team-a", "monitoring"))
        pool, trainer, gateway = own["pool"], own["trainer"], own["gateway"]
        yes = [(trainer, pool), (gateway, pool), (operator, pool), (operator, trainer), (test, operator)]
        yes += [(scraper, target) for target in (pool, trainer, gateway, operator)] + [(None, gateway), (stranger, gateway), (other["pool"], gateway)]
        no = [(other["trainer"], pool), (other["gateway"], pool), (pool, trainer), (gateway, trainer), (pool, operator), (trainer, operator)]
        no += [(source, target) for source in (stranger, impostor, neighbour, None) for target in (pool, trainer)]
        no += [(None, operator), (stranger, operator), (test | {"namespace": "team-a"}, operator)]
        for source, target in yes:
            self.assertTrue(policies.allowed(rules, source, target, target["port"]), (source, target))
        for source, target in no:
            self.assertFalse(policies.allowed(rules, source, target, target["port"]), (source, target))
        self.assertFalse(policies.allowed(rules, stranger, gateway, 8001), "a gateway has one port")

    def test_one_value_opens_the_network(self):
        documents = objects(*OPENED)
        self.assertEqual(of_kind(documents, "NetworkPolicy"), [])
        self.assertNotIn("--network-policies", operator_of(documents)["spec"]["containers"][0]["args"])

    def test_notes_warn_of_open_pools(self):
        def notes(*arguments):
            return helm("install", "carry-on", str(CHART), "--dry-run=client", *arguments).partition("NOTES:")[2]

        self.assertNotIn("No NetworkPolicy", notes())
        self.assertIn("No NetworkPolicy", notes(*OPENED))
        self.assertIn("deletes the CustomResourceDefinitions", notes("--set", "crds.keep=false"))

    def test_readme_lists_every_value(self):
        self.assertEqual((CHART / "README.md").read_text(), readme_with_table(), "charts/carry-on/README.md: run check.py --update")


class Health(unittest.TestCase):
    def test_argo_cd_sees_what_the_conditions_say(self):
        script = (CHART / "argocd/health.lua").read_text()
        for case in yaml.safe_load((HERE / "health.yaml").read_text()):
            with self.subTest(case["name"]):
                lua = lua51.LuaRuntime()
                lua.globals().obj = lua.table_from(case["object"], recursive=True)
                health = dict(lua.execute(script))
                self.assertEqual(health["status"], case["want"])
                self.assertIn(case.get("message", ""), health["message"])


def readme_with_table():
    values = (CHART / "values.yaml").read_text()
    return readme_table.replace((CHART / "README.md").read_text(), readme_table.table(values, yaml.safe_load(values)))


def update():
    shutil.copyfile(ROOT / "crds/crds.yaml", CHART / "files/crds.yaml")
    for name, arguments in SNAPSHOTS.items():
        (HERE / name).write_text(snapshot(arguments))
    (CHART / "README.md").write_text(readme_with_table())


if __name__ == "__main__":
    if sys.argv[1:] == ["--update"]:
        update()
    else:
        unittest.main()
