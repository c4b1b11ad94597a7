"""The files for docker compose, without an engine: what they repeat is the same everywhere, and what they ask for exists."""

from __future__ import annotations

import csv
import io
import re
import stat
from pathlib import Path

import pytest
import yaml

from taskplatform import demo, prepare
from taskplatform.settings import PREFIX, STOP_MARGIN, Settings
from tests.conftest import ROOT

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
DOCKERFILES = [ROOT / "Dockerfile", ROOT / "deploy/mock-api/Dockerfile"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_dockerfiles_need_no_buildkit(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"^# *(syntax|escape) *=|--mount=|--chmod|--link|<<", text, re.MULTILINE)
    assert "HEALTHCHECK" in text
    assert re.search(r"^USER 10001", text, re.MULTILINE)


def test_the_seed_is_the_demos() -> None:
    script = ROOT / "scripts/seed-demo"
    assert script.stat().st_mode & stat.S_IXUSR
    text = script.read_text(encoding="utf-8").partition("<<'CSV'\n")[2].partition("CSV\n")[0]
    rows = [(row["user"], row["definition"]) for row in csv.DictReader(io.StringIO(text))]
    assert rows == [(user, definition) for user, definitions in demo.SUBSCRIPTIONS.items() for definition in definitions]


def test_every_setting_that_is_given_is_one() -> None:
    given = {name for service in COMPOSE["services"].values() for name in service.get("environment", {}) if name.startswith(PREFIX)}
    assert given
    assert {name.removeprefix(PREFIX).lower() for name in given} <= set(Settings.model_fields)


def test_what_dot_env_may_give_is_in_its_example_and_is_no_setting() -> None:
    """`.env` is read by the platform too, which takes no unknown name that looks like one of its settings."""
    used = set(re.findall(r"\$\{([A-Z_]+)", TEXT)) - {"COMPOSE_PROJECT_NAME"}
    example = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(encoding="utf-8"), re.MULTILINE))
    assert {name for name in used if not name.endswith("_USER")} - {"IMAGE_TAG"} == example
    assert not [name for name in used if name.startswith(PREFIX)]
    told = (ROOT / "docs/deploying-compose.md").read_text(encoding="utf-8")
    assert [name for name in used if f"`{name}`" not in told] == []


def test_a_secret_has_one_value_for_everybody_and_init_says_so() -> None:
    values: dict[str, set[str]] = {}
    for name, value in re.findall(r"\$\{([A-Z_]*(?:PASSWORD|KEY)):-([^}]*)\}", TEXT):
        values.setdefault(name, set()).add(value)
    assert set(values) == set(prepare.SECRETS) == set(COMPOSE["services"]["init"]["environment"]) - {"API_HOSTS"}
    for name, known in values.items():
        assert len(known) == 1, name
        assert all(value.startswith(prepare.DEMO) for value in known), name


def test_a_worker_is_given_the_time_that_it_takes_to_stop() -> None:
    grace = Settings.model_fields["stop_grace"].default + STOP_MARGIN
    assert int(COMPOSE["services"]["worker"]["stop_grace_period"].removesuffix("s")) > grace.total_seconds()


def test_every_service_is_confined() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["init"] is True, name
        assert service["mem_limit"], name
        assert service["pids_limit"], name
        assert service["restart"] == ("no" if name == "init" else "unless-stopped"), name
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_grafana_is_told_of_prometheus_and_its_dashboards() -> None:
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8"))
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/taskplatform.yml").read_text(encoding="utf-8"))
    path = provider["providers"][0]["options"]["path"]
    assert any(mount.split(":")[1] == path for mount in COMPOSE["services"]["grafana"]["volumes"])


def test_prometheus_asks_every_process() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    asked = {name for job in config["scrape_configs"] for found in job.get("dns_sd_configs", []) for name in found["names"]}
    assert asked == {"beat", "beat-standby", "worker", "api"}
    assert config["rule_files"] == ["alerts.yml"]
    assert (ROOT / "deploy/prometheus/alerts.yml").is_file()


@pytest.mark.parametrize("word", ["MADE_FOR", "REDISCLI_AUTH"])
def test_redis_is_made_anew_when_a_password_of_its_users_changes(word: str) -> None:
    environment = COMPOSE["services"]["redis"]["environment"]
    names = {name for name in prepare.SECRETS if name.startswith("REDIS_")}
    assert word in environment
    assert {name for value in environment.values() for name in re.findall(r"\$\{([A-Z_]+)", value)} == names
