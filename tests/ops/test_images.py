"""Dockerfiles and the compose stack, as far as they can be judged without an engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.settings import Settings
from services.strategies import VARIANTS
from tests.ops.servers import ROOT, program

pytestmark = pytest.mark.ops

DOCKER = ROOT / "docker"
SERVICES = {*VARIANTS, "llama", "gpu"}
TARGETS = ["harness", "cpu", "llama", "cuda"]
BUILDX_FOLDERS = [
    f"{folder}/cli-plugins"
    for folder in (
        "/usr/local/lib/docker",
        "/usr/libexec/docker",
        "/usr/lib/docker",
        Path("~/.docker").expanduser(),
    )
]
PROFILES = [part for name in ("all", "llama", "gpu", "harness") for part in ("--profile", name)]


def beside_python(name: str) -> Path:
    return Path(sys.executable).with_name(name)


@pytest.fixture(scope="module")
def stack() -> dict[str, Any]:
    """What compose makes of the file, checked against its schema."""
    command = [beside_python("docker-compose"), "-f", DOCKER / "compose.yml", *PROFILES]
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    options = ["config", "--format", "json"]
    made = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    found: dict[str, Any] = json.loads(made.stdout)
    return found


@pytest.mark.parametrize("name", ["Dockerfile", "test.Dockerfile"])
def test_a_dockerfile_has_no_lint(name: str) -> None:
    subprocess.run([beside_python("hadolint"), DOCKER / name], check=True)


def test_the_base_is_pinned_and_can_be_replaced() -> None:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG BASE=debian:bookworm-slim@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    external = [line for line in re.findall(r"^FROM (\S+)", text, re.MULTILINE) if "$" in line]
    assert external == ["${BASE}"]
    bake = (DOCKER / "bake.hcl").read_text(encoding="utf-8")
    for target in TARGETS:
        assert f" AS {target}\n" in text
        assert f'"{target}"' in bake


def test_bake_makes_every_image_for_both_architectures() -> None:
    buildx = shutil.which("docker-buildx", path=os.pathsep.join([os.environ["PATH"], *BUILDX_FOLDERS]))
    if not buildx:
        pytest.skip(
            "docker buildx is missing (Debian 13's package docker-buildx): docker/bake.hcl was NOT read"
        )
    names = {
        "REGISTRY": "r.test/",
        "TAG": "t",
        "VERSION": "1.2",
        "REVISION": "abc",
        "PATH": os.environ["PATH"],
    }
    command = [buildx, "bake", "--file", "docker/bake.hcl", "--print"]
    printed = subprocess.run(command, cwd=ROOT, env=names, capture_output=True, text=True, check=True).stdout
    made = json.loads(printed)
    assert made["group"]["default"]["targets"] == TARGETS
    for name in TARGETS:
        target = made["target"][name]
        assert (ROOT / target["context"] / target["dockerfile"]).samefile(DOCKER / "Dockerfile")
        assert target["target"] == name
        assert target["platforms"] == ["linux/amd64", "linux/arm64"]
        assert target["tags"] == [f"r.test/batching-lab:{name}-t"]
        assert target["args"] == {"VERSION": "1.2", "REVISION": "abc"}


def test_every_variant_is_a_service_that_waits_for_its_model_and_may_drain(stack: dict[str, Any]) -> None:
    drain_s = Settings.model_fields["drain_timeout_s"].default
    for name in SERVICES:
        service = stack["services"][name]
        assert service["depends_on"]["stage"]["condition"] == "service_completed_successfully"
        assert float(service["stop_grace_period"].removesuffix("s")) > drain_s
        assert {v["source"] for v in service["volumes"]} == {"models"}
        assert {"HOST": "0.0.0.0", "PORT": "8000"}.items() <= service["environment"].items()
    assert {stack["services"][name]["environment"]["VARIANT"] for name in VARIANTS} == set(VARIANTS)
    assert stack["services"]["front"]["environment"]["BACKENDS"].split() == [*VARIANTS, "llama", "gpu"]


def test_nothing_runs_as_root_but_the_one_that_gives_volumes_away(stack: dict[str, Any]) -> None:
    for name, service in stack["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        if name != "volumes":
            assert service["read_only"] is True, name
    assert stack["services"]["volumes"]["cap_add"] == ["CHOWN"]


def test_prometheus_of_the_stack_finds_every_service() -> None:
    file = DOCKER / "stack/prometheus.yml"
    (found,) = (c for c in yaml.safe_load(file.read_text())["scrape_configs"] if "dns_sd_configs" in c)
    assert set(found["dns_sd_configs"][0]["names"]) == SERVICES
    assert found["job_name"] == "batching-lab"  # the alerts ask for it
    subprocess.run([program("promtool"), "check", "config", "--syntax-only", file], check=True)
