#!/usr/bin/env python3
"""Checks of what the chart tells Prometheus and Grafana: monitors, alerts, dashboards.

Every metric, label and value that an expression names is looked up in the source of the programs. $PROMTOOL, where it is set, checks the rules
and runs alerts.yaml, in which each alert fires and does not. Needs what check.py needs.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

import yaml

import policies
from check import CHART, HERE, NAMESPACED, ROOT, WATCHED, objects, of_kind, operator_of

EVERYTHING = ["-f", str(HERE / "everything.yaml")]
PROMTOOL = os.environ.get("PROMTOOL")
DEFINED_IN = ["operator/src/cluster/metrics.rs", "worker/src/base/metrics.rs", "worker/src/serve/metrics.rs", "worker/src/train/endpoint.rs"]
# What Prometheus says itself, and what the monitors add to every metric.
OF_PROMETHEUS = {"up": set()}
OF_TARGETS = {"namespace", "job", "pod", "instance", "component", "name"}
# What a selector may hold: metric{label="value",…}
SELECTOR = re.compile(r"\b([a-z_]+)(?:\{([^{}]*)\})?")
MATCHER = re.compile(r'([a-z_]+)\s*(=~|!=|=|!~)\s*"([^"]*)"')


def metrics():
    """The metrics that the programs define, with their labels, as their source has them."""
    found = dict(OF_PROMETHEUS)
    for file in DEFINED_IN:
        source = re.sub(r"\s+", " ", (ROOT / file).read_text().partition("#[cfg(test)]")[0])
        for made in re.finditer(r'(HistogramOpts::new\( ?)?"((?:carryon|process)_[a-z_]+)"(?=(.{0,160}))', source):
            # Its labels come soon behind its name, and before the next one.
            histogram, name, behind = made.groups()
            labels = set(re.findall(r'"([a-z_]+)"', (re.findall(r'&\[("[^\]]+)\]', re.split('"carryon_', behind)[0]) or [""])[0]))
            if histogram:
                found |= {f"{name}_sum": labels, f"{name}_count": labels, f"{name}_bucket": labels | {"le"}}
            else:
                found[name] = labels
    return found


def selectors(expression):
    """(metric, [(label, operator, value)]) of every selector in an expression."""
    for name, matchers in SELECTOR.findall(expression):
        if name.startswith(("carryon_", "process_")) or name == "up":
            yield name, MATCHER.findall(matchers)


def source_text():
    files = [path for folder in ("crds", "operator", "worker") for path in (ROOT / folder / "src").rglob("*.rs")]
    return "\n".join(path.read_text() for path in files)


def alerts(*arguments):
    return of_kind(objects("--set", "prometheusRule.enabled=true", *arguments), "PrometheusRule")[0]["spec"]


def dashboards():
    data = of_kind(objects(*EVERYTHING), "ConfigMap")[0]["data"]
    return {name: json.loads(text) for name, text in data.items()}


def expressions():
    """Everything that Prometheus is asked: (where, expression)."""
    for group in alerts()["groups"]:
        yield from ((rule["alert"], rule["expr"]) for rule in group["rules"])
    for dashboard in dashboards().values():
        yield from ((variable["name"], variable["query"]["query"]) for variable in dashboard["templating"]["list"] if variable["type"] == "query")
        yield from ((panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", []))


class Monitoring(unittest.TestCase):
    maxDiff = None

    def test_nothing_of_it_is_there_unless_asked_for(self):
        kinds = {document["kind"] for document in objects()}
        self.assertFalse(kinds & {"ServiceMonitor", "PodMonitor", "PrometheusRule", "ConfigMap"})

    def test_metrics_are_read_out_of_the_source(self):
        known = metrics()
        for name, labels in {
            "carryon_objects": {"kind", "condition"},
            "carryon_reconcile_seconds_bucket": {"kind", "le"},
            "carryon_requests_total": {"route", "code"},
            "carryon_heads": set(),
            "carryon_gateway_ready": set(),
            "carryon_train_eta_seconds": set(),
        }.items():
            self.assertEqual(known[name], labels, name)
        # Two programs have one of this name, with a label each.
        self.assertEqual(len(re.findall('"carryon_queue_length"', "".join((ROOT / file).read_text() for file in DEFINED_IN))), 2)

    def test_expressions_name_metrics_labels_and_values_that_exist(self):
        known, source = metrics(), source_text()
        known["carryon_queue_length"] = {"kind", "state"}
        asked = list(expressions())
        self.assertGreater(len(asked), 40)
        for where, expression in asked:
            found = list(selectors(expression))
            self.assertTrue(found, where)
            for metric, matchers in found:
                self.assertIn(metric, known, where)
                for label, _, value in matchers:
                    self.assertIn(label, known[metric] | OF_TARGETS, f"{where}: {metric}")
                    # Statuses and patterns aside, a value is a word of the source.
                    for word in value.split("|") if label not in ("namespace", "job", "name", "status", "code") else []:
                        self.assertTrue(word in ("", "/v1/.*") or f'"{word}"' in source, f"{where}: {label}={word!r}")

    def test_pod_monitor_finds_the_workers_and_no_operator(self):
        documents = objects(*EVERYTHING)
        monitor = of_kind(documents, "PodMonitor")[0]["spec"]
        self.assertEqual(monitor["namespaceSelector"], {"any": True})
        found = set()
        for name in ["pool", "job", "deployment"]:
            for document in yaml.safe_load_all((ROOT / f"operator/tests/snapshots/{name}.yaml").read_text()):
                if "template" in document.get("spec", {}):
                    template = document["spec"]["template"]
                    self.assertTrue(policies.matches(monitor["selector"], template["metadata"]["labels"]))
                    self.assertEqual(template["spec"]["containers"][0]["ports"][0]["name"], monitor["podMetricsEndpoints"][0]["port"])
                    found.add(template["metadata"]["labels"]["app.kubernetes.io/component"])
        self.assertEqual(found, {"pool", "trainer", "gateway"})
        self.assertFalse(policies.matches(monitor["selector"], operator_of(documents)["metadata"]["labels"]))
        relabelled = {rule["targetLabel"] for rule in monitor["podMetricsEndpoints"][0]["relabelings"]}
        self.assertLessEqual(relabelled, OF_TARGETS)
        alone = of_kind(objects(*EVERYTHING, *NAMESPACED), "PodMonitor")[0]["spec"]
        self.assertEqual(alone["namespaceSelector"], {"matchNames": WATCHED})

    def test_alerts_look_at_what_the_release_looks_after(self):
        for arguments, namespaces in [([], 'namespace!=""'), (NAMESPACED, 'namespace=~"team-a|team-b"')]:
            for rule in (rule for group in alerts(*arguments)["groups"] for rule in group["rules"]):
                self.assertNotRegex(rule["expr"], "OPERATOR|WORKERS")
                own = 'namespace="carry-on-system",job="carry-on-operator"' in rule["expr"]
                self.assertTrue(own or namespaces in rule["expr"], rule["alert"])
                self.assertEqual(rule["annotations"].keys(), {"summary", "description", "runbook"})
                self.assertIn(rule["labels"]["severity"], {"critical", "warning"})

    def test_dashboards_are_whole(self):
        shown = dashboards()
        self.assertEqual(len({dashboard["uid"] for dashboard in shown.values()}), 2)
        for name, dashboard in shown.items():
            panels = dashboard["panels"]
            self.assertEqual(len({panel["id"] for panel in panels}), len(panels), name)
            variables = {variable["name"] for variable in dashboard["templating"]["list"]}
            used = set(re.findall(r"\$\{?([a-z]+)", json.dumps(dashboard)))
            self.assertEqual(used - {"datasource"}, variables - {"datasource"}, name)
            covered = set()
            for panel in panels:
                place = panel["gridPos"]
                self.assertLessEqual(place["x"] + place["w"], 24, panel["title"])
                cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
                self.assertFalse(cells & covered, f"{panel['title']} lies over another")
                covered |= cells
                if panel["type"] != "row":
                    self.assertEqual(panel["datasource"], {"type": "prometheus", "uid": "${datasource}"}, panel["title"])
                    self.assertTrue(panel["targets"] and panel["title"])
                    self.assertEqual(len({target["refId"] for target in panel["targets"]}), len(panel["targets"]))
                for target in panel.get("targets", []):
                    self.assertTrue(all(word in target["expr"] for word in re.findall(r"\{\{(namespace|name)\}\}", target["legendFormat"])))

    def test_each_alert_is_tested_to_fire_and_not_to(self):
        fires, stays_quiet = set(), set()
        for test in yaml.safe_load((HERE / "alerts.yaml").read_text())["tests"]:
            for case in test["promql_expr_test"]:
                alert = re.fullmatch(r'ALERTS\{alertname="(\w+)",alertstate="firing"\}', case["expr"])[1]
                (fires if case["exp_samples"] else stays_quiet).add(alert)
        names = {rule["alert"] for group in alerts()["groups"] for rule in group["rules"]}
        self.assertEqual((fires, stays_quiet), (names, names))

    def test_readme_names_every_alert(self):
        named = re.findall(r"^\| `(CarryOn\w+)` \|.*\| (\w+) \|$", (CHART / "README.md").read_text(), re.MULTILINE)
        rules = {rule["alert"]: rule["labels"]["severity"] for group in alerts()["groups"] for rule in group["rules"]}
        self.assertEqual(dict(named), rules)

    @unittest.skipUnless(PROMTOOL, "no $PROMTOOL")
    def test_promtool_takes_the_rules_and_sees_them_fire(self):
        with tempfile.TemporaryDirectory() as folder:
            rules = Path(folder) / "rules.yaml"
            rules.write_text(yaml.safe_dump(alerts()))
            shutil.copyfile(HERE / "alerts.yaml", Path(folder) / "alerts.yaml")
            self.promtool(folder, "check", "rules", "--lint=all", "--lint-fatal", "rules.yaml")
            self.promtool(folder, "test", "rules", "alerts.yaml")

    @unittest.skipUnless(PROMTOOL, "no $PROMTOOL")
    def test_promtool_can_read_what_the_dashboards_ask(self):
        """As rules that record it; Grafana's variables stand for what it puts there."""
        asked = [target["expr"] for dashboard in dashboards().values() for panel in dashboard["panels"] for target in panel.get("targets", [])]
        asked = [re.sub(r"\$[a-z]+", ".*", expression.replace("$__rate_interval", "5m")) for expression in asked]
        rules = [{"record": f"dashboard:{number}", "expr": expression} for number, expression in enumerate(asked)]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
            self.promtool(folder, "check", "rules", "--lint=all", "--lint-fatal", "rules.yaml")

    def promtool(self, folder, *arguments):
        done = subprocess.run([PROMTOOL, *arguments], cwd=folder, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)


if __name__ == "__main__":
    unittest.main()
