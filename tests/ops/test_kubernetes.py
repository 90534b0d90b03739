"""The manifests of docker/k8s: each overlay is right, and each planted mistake is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

pytest.importorskip("kubernetes_validate", reason="needs the group ops")

from tests.ops.manifests import K8S, Manifest, problems, rendered
from tools import kubernetes_rules

pytestmark = pytest.mark.ops

FOLDERS = "overlays/cpu", "overlays/gpu", "overlays/llama", "bench"


@pytest.fixture(scope="module")
def made() -> dict[str, list[Manifest]]:
    return {folder: rendered(folder) for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_shipped_has_no_problem(made: dict[str, list[Manifest]], folder: str) -> None:
    assert problems(made[folder]) == []


def test_the_operators_rules_are_those_of_prometheus(made: dict[str, list[Manifest]]) -> None:
    (rules,) = (m for m in made["overlays/cpu"] if m["kind"] == "PrometheusRule")
    files = sorted((K8S.parent / "prometheus").glob("*.yml"))
    groups = [g for f in files for g in yaml.safe_load(f.read_text()).get("groups", [])]
    # kustomize writes folded lines anew, with other white space.
    assert _words(rules["spec"]["groups"]) == _words(groups)
    assert kubernetes_rules.MANIFEST.read_text() == kubernetes_rules.manifest()


def _words(groups: Any) -> list[str]:
    return json.dumps(groups, sort_keys=True).replace("\\n", " ").split()


def test_the_inference_pool_selects_the_services_pods(made: dict[str, list[Manifest]]) -> None:
    pool, route = yaml.safe_load_all((K8S / "examples/inference-pool.yaml").read_text())
    (deployment,) = (m for m in made["overlays/cpu"] if m["kind"] == "Deployment")
    template = deployment["spec"]["template"]
    assert pool["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = {p["containerPort"] for c in template["spec"]["containers"] for p in c["ports"]}
    assert {p["number"] for p in pool["spec"]["targetPorts"]} == ports
    assert route["spec"]["rules"][0]["backendRefs"][0]["name"] == pool["metadata"]["name"]


def container(pod: Any, index: int = 0) -> Any:
    return pod["template"]["spec"]["containers"][index]


# Kind, what the mistake does to its spec, and a word of the problem that is found.
MISTAKES: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "a misspelt field": ("Deployment", lambda s: s.update(replica=2), "replica"),
    "a wrong type": (
        "Deployment",
        lambda s: s["template"]["spec"].update(terminationGracePeriodSeconds="60"),
        "integer",
    ),
    "a selector that matches no pod": (
        "Deployment",
        lambda s: s["selector"]["matchLabels"].update(tier="x"),
        "labels",
    ),
    "a service that selects nothing": ("Service", lambda s: s["selector"].update(app="lab"), "labels"),
    "a target port of another name": (
        "Service",
        lambda s: s["ports"][0].update(targetPort="web"),
        "port web",
    ),
    "a probe of another path": (
        "Deployment",
        lambda s: container(s)["readinessProbe"]["httpGet"].update(path="/healthz"),
        "readinessProbe",
    ),
    "a probe of another port": (
        "Deployment",
        lambda s: container(s)["livenessProbe"]["httpGet"].update(port="metrics"),
        "livenessProbe",
    ),
    "no startup probe": ("Deployment", lambda s: container(s).pop("startupProbe"), "startupProbe"),
    "a startup that is too short": (
        "Deployment",
        lambda s: container(s)["startupProbe"].update(failureThreshold=3),
        "still loads",
    ),
    "a grace below the drain time": (
        "Deployment",
        lambda s: s["template"]["spec"].update(terminationGracePeriodSeconds=30),
        "grace",
    ),
    "no preStop": ("Deployment", lambda s: container(s).pop("lifecycle"), "preStop"),
    "a mount of a volume that is not there": (
        "Deployment",
        lambda s: container(s)["volumeMounts"][0].update(name="model"),
        "no volume",
    ),
    "a mount at another place": (
        "Deployment",
        lambda s: container(s)["volumeMounts"][0].update(mountPath="/models"),
        "/models",
    ),
    "a claim of another name": (
        "Deployment",
        lambda s: s["template"]["spec"]["volumes"][0].update(persistentVolumeClaim={"claimName": "x"}),
        "claim x",
    ),
    "a resource of another name": (
        "Deployment",
        lambda s: container(s)["resources"]["limits"].update({"nvidia.com/gpus": "1"}),
        "nvidia.com/gpus",
    ),
    "a GPU for the CPU image": (
        "Deployment",
        lambda s: container(s)["resources"]["limits"].update({"nvidia.com/gpu": "1"}),
        "image cuda",
    ),
    "more threads than cores that are asked for": (
        "Deployment",
        lambda s: container(s)["resources"]["requests"].update(cpu="1"),
        "N_THREADS",
    ),
    "a container as root": (
        "Deployment",
        lambda s: s["template"]["spec"]["securityContext"].update(runAsNonRoot=False),
        "root",
    ),
    "a port that is not PORT": (
        "Deployment",
        lambda s: container(s)["ports"][0].update(containerPort=8080),
        "PORT",
    ),
    "a set number of replicas": ("Deployment", lambda s: s.update(replicas=3), "KEDA"),
    "no staging": ("Deployment", lambda s: s["template"]["spec"].pop("initContainers"), "stages"),
    "staging by an image without the packages of models": (
        "Deployment",
        lambda s: s["template"]["spec"]["initContainers"][0].update(image="batching-lab:cpu"),
        "only the image harness",
    ),
    "a spread over other pods": (
        "Deployment",
        lambda s: s["template"]["spec"]["topologySpreadConstraints"][0]["labelSelector"].update(
            matchLabels={"app": "x"}
        ),
        "spreads",
    ),
    "settings of another name": (
        "Deployment",
        lambda s: container(s)["envFrom"][0]["configMapRef"].update(name="lab"),
        "ConfigMap",
    ),
    "a budget for nobody": (
        "PodDisruptionBudget",
        lambda s: s["selector"]["matchLabels"].update(tier="x"),
        "labels",
    ),
    "a network policy for nobody": (
        "NetworkPolicy",
        lambda s: s["podSelector"]["matchLabels"].update(tier="x"),
        "labels",
    ),
    "a network policy for another port": (
        "NetworkPolicy",
        lambda s: s["ingress"][0]["ports"][0].update(port=8001),
        "port 8001",
    ),
    "a monitor of no service": (
        "ServiceMonitor",
        lambda s: s["selector"]["matchLabels"].update(tier="x"),
        "labels",
    ),
    "a monitor of another port": (
        "ServiceMonitor",
        lambda s: s["endpoints"][0].update(port="web"),
        "port web",
    ),
    "a misspelt field of a monitor": (
        "ServiceMonitor",
        lambda s: s["endpoints"][0].update(intervall="5s"),
        "intervall",
    ),
    "a rule without an expression": (
        "PrometheusRule",
        lambda s: s["groups"][0]["rules"][0].pop("expr"),
        "expr",
    ),
    "scaling of another deployment": (
        "ScaledObject",
        lambda s: s["scaleTargetRef"].update(name="labs"),
        "labs",
    ),
    "scaling by a series that is not there": (
        "ScaledObject",
        lambda s: s["triggers"][0]["metadata"].update(query="sum(lab_queue_length)"),
        "lab_queue_length",
    ),
    "scaling by a total": (
        "ScaledObject",
        lambda s: s["triggers"][0].update(metricType="Value"),
        "AverageValue",
    ),
    "scaling down where nothing is known": (
        "ScaledObject",
        lambda s: s["triggers"][0]["metadata"].pop("ignoreNullValues"),
        "ignoreNullValues",
    ),
    "a misspelt field of scaling": (
        "ScaledObject",
        lambda s: s.update(maxReplicas=3),
        "maxReplicas",
    ),
    "another number of shards": ("Job", lambda s: s.update(completions=3), "SHARDS"),
    "shards without the key": ("Job", lambda s: container(s).pop("env"), "API_KEY"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(made: dict[str, list[Manifest]], name: str) -> None:
    kind, plant, word = MISTAKES[name]
    manifests = yaml.safe_load(yaml.safe_dump(made["bench" if kind == "Job" else "overlays/cpu"]))
    plant(next(m for m in manifests if m["kind"] == kind)["spec"])
    found = problems(manifests)
    assert any(word in problem for problem in found), found


def test_an_unknown_version_is_found(made: dict[str, list[Manifest]]) -> None:
    manifests = yaml.safe_load(yaml.safe_dump(made["overlays/cpu"]))
    next(m for m in manifests if m["kind"] == "Deployment")["apiVersion"] = "apps/v1beta9"
    assert problems(manifests)
