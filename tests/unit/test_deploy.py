"""deploy/: the manifests for Kubernetes and the units for systemd are what these accept, and fit the settings and ports of the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import kubernetes_validate.utils
import pytest
import trustme
import yaml

from taskplatform.catalogue import load
from taskplatform.cli import cli
from taskplatform.model import parse_duration
from taskplatform.settings import PREFIX, STOP_MARGIN, Settings, load_settings
from tests.conftest import ROOT

KUBERNETES, SYSTEMD = ROOT / "deploy" / "kubernetes", ROOT / "deploy" / "systemd"
#: The oldest that still got fixes when this was written, and the newest that the schemas are there for.
VERSIONS = ("1.33.0", kubernetes_validate.latest_version())
CELERY = ["celery", "-A", "taskplatform.app"]


def _all(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


KUSTOMIZATION = _all(KUBERNETES / "kustomization.yaml")[0]
FILES = sorted(path for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml")
OBJECTS = [one for path in FILES for one in _all(path)]
DEPLOYMENTS = {one["metadata"]["name"]: one for one in OBJECTS if one["kind"] == "Deployment"}


def _named(kind: str, name: str) -> dict[str, Any]:
    [found] = [one for one in OBJECTS if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def _pod(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod of a deployment, and its only container."""
    pod = DEPLOYMENTS[name]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container


def _environment(name: str) -> dict[str, str]:
    """What the process is told by the manifests."""
    _, container = _pod(name)
    told: dict[str, str] = {}
    for source in container["envFrom"]:
        if "configMapRef" in source:
            told |= _named("ConfigMap", source["configMapRef"]["name"])["data"]
        else:
            told |= _named("Secret", source["secretRef"]["name"])["stringData"]
    return told | {one["name"]: one["value"] for one in container.get("env", [])}


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    if any(labels.get(name) != value for name, value in selector.get("matchLabels", {}).items()):
        return False
    return all(one["operator"] == "In" and labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", []))


def _selected(selector: Mapping[str, Any]) -> list[str]:
    return [name for name, one in DEPLOYMENTS.items() if _matches(selector, one["spec"]["template"]["metadata"]["labels"])]


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def test_every_manifest_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    # it would read all schemas anew for each object
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", lru_cache(kubernetes_validate.utils.schema_contents))
    for version in VERSIONS:
        for one in OBJECTS:
            kubernetes_validate.validate(one, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError, match="podSelektor"):
        kubernetes_validate.validate({**_named("NetworkPolicy", "api"), "spec": {"podSelektor": {}}}, VERSIONS[-1], strict=True)


def test_the_kustomization_has_all_that_is_no_example() -> None:
    assert sorted(KUSTOMIZATION["resources"]) == sorted(path.name for path in FILES if ".example." not in path.name)
    [image] = KUSTOMIZATION["images"]
    assert {_pod(name)[1]["image"] for name in DEPLOYMENTS} == {f"{image['name']}:{image['newTag']}"}
    assert {one["metadata"].get("namespace", one["metadata"]["name"]) for one in OBJECTS} == {KUSTOMIZATION["namespace"]}
    names = [(one["kind"], one["metadata"]["name"]) for one in OBJECTS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_settings_are_accepted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = _environment(name)
    assert {variable for variable in told if variable.startswith(PREFIX)} <= {PREFIX + field.upper() for field in Settings.model_fields}
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    for variable, value in told.items():
        monkeypatch.setenv(variable, str(tmp_path / "ca.pem") if variable == f"{PREFIX}REDIS_CA" else value)
    read = load_settings()
    assert read.sentinel is not None
    assert read.sentinel.tls
    if name == "worker":  # what the shipped definitions take from the environment is there for those that call
        assert _environment("beat") == told
        assert len(load(ROOT / "tasks", environment=told)) > 300


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_ports_and_probes_are_those_of_the_process(name: str) -> None:
    _, container = _pod(name)
    told, ports = _environment(name), {one["name"]: one["containerPort"] for one in container["ports"]}
    command = container["command"]
    if name in ("beat", "worker"):
        assert command == [*CELERY, name]
        assert ports == {"ops": int(told[f"{PREFIX}OPS_PORT"])}
    elif name == "api":
        assert command == ["taskplatform", "api"]
        assert "api" in cli.commands
        assert ports == {"https": Settings.model_fields["api_port"].default, "ops": int(told[f"{PREFIX}OPS_PORT"])}
    else:
        assert command[:4] == [*CELERY, "flower"]
        assert f"--port={ports['http']}" in command
    assert told[f"{PREFIX}OPS_HOST"] == told[f"{PREFIX}API_HOST"] == "0.0.0.0"
    live, ready = ("/healthcheck",) * 2 if name == "flower" else ("/health", "/ready")
    for probe, path in (("livenessProbe", live), ("readinessProbe", ready)):
        assert container[probe]["httpGet"]["path"] == path
        assert container[probe]["httpGet"]["port"] in ports
        assert container[probe]["httpGet"].get("scheme", "HTTP") == ("HTTPS" if name == "api" else "HTTP")
    if name != "flower":
        assert container["startupProbe"]["httpGet"] == container["livenessProbe"]["httpGet"]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_pods_have_few_rights_and_bounds(name: str) -> None:
    pod, container = _pod(name)
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert "memory" in container["resources"]["limits"]
    # what is mounted is there, and the files that settings name are in it
    volumes = {one["name"]: one for one in pod["volumes"]}
    mounts = {one["mountPath"]: volumes[one["name"]] for one in container["volumeMounts"]}
    assert set(volumes) == {one["name"] for one in container["volumeMounts"]}
    assert "emptyDir" in mounts["/tmp"]
    files = {
        f"{folder}/{file}"
        for folder, volume in mounts.items()
        if "secret" in volume
        for file in _named("Secret", volume["secret"]["secretName"])["stringData"]
    }
    told = _environment(name)
    wanted = {told[f"{PREFIX}REDIS_CA"]} | ({told[f"{PREFIX}API_TLS_CERT"], told[f"{PREFIX}API_TLS_KEY"]} if name == "api" else set())
    assert files == wanted


def test_whoever_stops_has_time_for_it() -> None:
    pod, container = _pod("worker")
    grace = parse_duration(_environment("worker")[f"{PREFIX}STOP_GRACE"])
    assert timedelta(seconds=pod["terminationGracePeriodSeconds"]) > grace + STOP_MARGIN
    assert "lifecycle" not in container
    pod, container = _pod("api")
    word, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert word == "sleep"
    # what is being answered has 10 s
    assert pod["terminationGracePeriodSeconds"] > int(seconds) + 10


def test_selectors_select_and_budgets_leave_room() -> None:
    for name, one in DEPLOYMENTS.items():
        assert _selected(one["spec"]["selector"]) == [name]
    for one in OBJECTS:
        if one["kind"] == "Service":
            [name] = _selected({"matchLabels": one["spec"]["selector"]})
            ports = {port["name"] for port in _pod(name)[1]["ports"]}
            assert {port["targetPort"] for port in one["spec"]["ports"]} <= ports
    budgets = {one["metadata"]["name"]: one["spec"] for one in OBJECTS if one["kind"] == "PodDisruptionBudget"}
    assert set(budgets) == {"beat", "worker", "api"}
    for name, budget in budgets.items():
        assert _selected(budget["selector"]) == [name]
        replicas = DEPLOYMENTS[name]["spec"]["replicas"]
        assert 0 < budget.get("minAvailable", replicas - budget.get("maxUnavailable", 0)) < replicas
    assert DEPLOYMENTS["beat"]["spec"]["replicas"] == 2


def test_the_network_is_closed_but_for_what_is_needed() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in OBJECTS if one["kind"] == "NetworkPolicy"}
    assert policies["nothing-else"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    opened: dict[str, set[str]] = {name: set() for name in DEPLOYMENTS}
    out: dict[str, set[int]] = {name: set() for name in DEPLOYMENTS}
    for policy in policies.values():
        for name in _selected(policy["podSelector"]):
            opened[name] |= {port["port"] for rule in policy.get("ingress", []) for port in rule["ports"]}
            out[name] |= {port["port"] for rule in policy.get("egress", []) for port in rule["ports"]}
    for name in DEPLOYMENTS:
        assert {port["name"] for port in _pod(name)[1]["ports"]} <= opened[name]
        assert {53, 6379, 26379} <= out[name]
        assert ({80, 443} <= out[name]) == (name == "worker")


# --- systemd ---------------------------------------------------------------------------------------------------------

UNITS = sorted(SYSTEMD.glob("*.service"))


def _unit(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """With this project in place of /opt/taskplatform."""
    program = shutil.which("systemd-analyze")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("systemd-analyze is not installed, and CI has it")
        pytest.skip("systemd-analyze is not installed")
    units = []
    for path in UNITS:
        text = path.read_text(encoding="utf-8").replace("/opt/taskplatform/.venv/bin/", f"{Path(sys.executable).parent}/")
        units.append(str(tmp_path / path.name.replace("@.", "@1.")))
        Path(units[-1]).write_text(text.replace("/opt/taskplatform", str(ROOT)))
    done = subprocess.run([program, "verify", *units], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    exposure = [program, "security", "--offline=true", "--threshold=20", "--no-pager", *units]
    done = subprocess.run(exposure, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout[-300:]


def test_units_fit_the_settings() -> None:
    assert [path.name for path in UNITS] == [f"taskplatform-{role}.service" for role in ("api", "beat", "flower", "worker@")]
    for path in UNITS:
        unit = _unit(path)
        assert unit["Restart"] == ["always"]
        assert unit["KillMode"] == ["mixed"]
        assert unit["User"] == ["taskplatform"]
        assert "/etc/taskplatform/environment" in unit["EnvironmentFile"]
        for assignment in unit.get("Environment", []):
            name, _, value = assignment.partition("=")
            assert load_settings(**{name.removeprefix(PREFIX).lower(): value})
        [start] = unit["ExecStart"]
        words = re.sub(r".*/", "", start.split()[0]), *start.split()[1:]
        if words[0] == "taskplatform":
            assert words[1] in cli.commands
        else:
            assert list(words[:3]) == CELERY
            assert words[3] in path.name
    worker = _unit(SYSTEMD / "taskplatform-worker@.service")
    told = dict(line.split("=", 1) for line in worker["Environment"])
    assert timedelta(seconds=int(worker["TimeoutStopSec"][0])) > parse_duration(told[f"{PREFIX}STOP_GRACE"]) + STOP_MARGIN


def test_what_is_no_python_goes_into_the_package_too() -> None:
    """Scripts, templates, style: a wheel has what `package-data` names."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]["taskplatform"]
    named = {path for pattern in patterns for path in (ROOT / "taskplatform").glob(pattern)}
    there = {path for path in (ROOT / "taskplatform").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert there == named
    assert ROOT / "taskplatform/api/pages/templates/base.html" in named
