"""What is wrong with rendered Kubernetes manifests: their schemas, and what no schema sees."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor

ROOT = Path(__file__).parents[2]
K8S = ROOT / "docker/k8s"
VERSION = "1.37"
CUSTOM = {"ScaledObject": ScaledObject, "PrometheusRule": PrometheusRule, "ServiceMonitor": ServiceMonitor}
PORT = 8000
WRITABLE = {"/lab/artifacts", "/lab/results", "/tmp"}

Manifest = dict[str, Any]


def rendered(folder: str) -> list[Manifest]:
    """What `kubectl kustomize` makes of a folder."""
    kubectl = Path(sys.executable).with_name("kubectl")
    command = [kubectl, "kustomize", K8S / folder]
    made = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    return list(yaml.safe_load_all(made.stdout))


def problems(manifests: list[Manifest]) -> list[str]:
    """Those that no schema sees are looked for where the schemas have none."""
    return list(_schema_problems(manifests)) or list(_own_problems(manifests))


def _schema_problems(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in manifests:
        kind = manifest.get("kind", "?")
        if kind in CUSTOM:
            yield from _custom_problems(manifest)
            continue
        try:
            kubernetes_validate.validate(manifest, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{kind}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError as error:
            yield f"{kind}: {error.message}"  # an unknown kind or version is no warning here


def _custom_problems(manifest: Manifest) -> Iterator[str]:
    """The models take unknown fields and lose them, so a round trip shows a typo."""
    kind = manifest["kind"]
    try:
        model = CUSTOM[kind].model_validate(manifest)
    except ValueError as error:
        yield f"{kind}: {error}"
        return
    back = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
    known = set(CUSTOM[kind].model_fields) | {"apiVersion"}
    yield from (f"{kind}: {key} is unknown" for key in manifest if key not in known)
    yield from (f"{kind}: {path} is lost" for path in _lost(manifest, back))


def _lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(kept, dict) or key not in kept:
                yield f"{path}.{key}"
            else:
                yield from _lost(value, kept[key], f"{path}.{key}")
    elif isinstance(given, list):
        for index, value in enumerate(given):
            if not isinstance(kept, list) or index >= len(kept):
                yield f"{path}[{index}]"
            else:
                yield from _lost(value, kept[index], f"{path}[{index}]")


def _own_problems(manifests: list[Manifest]) -> Iterator[str]:
    workloads = [m for m in manifests if m["kind"] in ("Deployment", "Job")]
    pods = [(m["metadata"]["name"], m["spec"]["template"]) for m in workloads]
    names = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    for name, template in pods:
        yield from (f"{name}: {text}" for text in _pod_problems(template, names))
    for manifest in manifests:
        where = f"{manifest['kind']} {manifest['metadata']['name']}"
        yield from (f"{where}: {text}" for text in _selector_problems(manifest, manifests, pods))
        if manifest["kind"] == "Deployment":
            yield from (f"{where}: {text}" for text in _service_problems(manifest, manifests))
        if manifest["kind"] == "ScaledObject":
            yield from (f"{where}: {text}" for text in _scaling_problems(manifest, names))
        if manifest["kind"] == "Job" and manifest["spec"].get("completionMode") == "Indexed":
            shards = _setting(manifests, "SHARDS")
            if not manifest["spec"]["completions"] == manifest["spec"]["parallelism"] == int(shards or 0):
                yield f"{where}: completions, parallelism and SHARDS={shards} differ"
            shard = manifest["spec"]["template"]["spec"]["containers"][0]
            if "API_KEY" not in {e["name"] for e in shard.get("env", [])}:
                yield f"{where}: has no API_KEY for a service that asks for one"


def _selector_problems(
    manifest: Manifest, manifests: list[Manifest], pods: list[tuple[str, Manifest]]
) -> Iterator[str]:
    spec, kind = manifest.get("spec", {}), manifest["kind"]
    templates = [template["metadata"].get("labels", {}) for _, template in pods]
    if kind == "Deployment":
        templates = [spec["template"]["metadata"].get("labels", {})]
    selector = {
        "Service": spec.get("selector"),
        "NetworkPolicy": spec.get("podSelector", {}).get("matchLabels"),
    }.get(kind, (spec.get("selector") or {}).get("matchLabels"))
    if kind == "ServiceMonitor":
        templates = [m["metadata"].get("labels", {}) for m in manifests if m["kind"] == "Service"]
        ports = {p["name"] for m in manifests if m["kind"] == "Service" for p in m["spec"]["ports"]}
        for endpoint in spec["endpoints"]:
            if endpoint["port"] not in ports:
                yield f"no Service has the port {endpoint['port']}"
            if endpoint["path"] != "/metrics":
                yield "metrics are at /metrics"
    if selector is not None and not any(selector.items() <= labels.items() for labels in templates):
        yield f"nothing has the labels {selector}"
    open_ports = [p for _, t in pods for c in t["spec"]["containers"] for p in c.get("ports", [])]
    known = {value for port in open_ports for value in (port.get("name"), port["containerPort"])}
    wanted = [p.get("targetPort", p["port"]) for p in spec.get("ports", [])] if kind == "Service" else []
    if kind == "NetworkPolicy":
        wanted = [p["port"] for rule in spec["ingress"] for p in rule["ports"]]
    yield from (f"no container has the port {port}" for port in wanted if port not in known)


def _pod_problems(template: Manifest, names: set[tuple[str, str]]) -> Iterator[str]:
    spec = template["spec"]
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    for name, volume in volumes.items():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim and ("PersistentVolumeClaim", claim) not in names:
            yield f"volume {name}: there is no claim {claim}"
    if not (spec.get("securityContext") or {}).get("runAsNonRoot"):
        yield "runs as root"
    for spread in spec.get("topologySpreadConstraints", []):
        labels = template["metadata"].get("labels", {})
        if not spread["labelSelector"]["matchLabels"].items() <= labels.items():
            yield "spreads other pods than its own"
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        yield from (f"{container['name']}: {p}" for p in _container_problems(container, volumes, names))


def _container_problems(container: Manifest, volumes: Manifest, names: set[tuple[str, str]]) -> Iterator[str]:
    context = container.get("securityContext", {})
    if not context.get("readOnlyRootFilesystem") or context.get("allowPrivilegeEscalation", True):
        yield "is not locked down"
    mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
    yield from (f"mounts {name}, which is no volume" for name in mounts.values() if name not in volumes)
    yield from (f"mounts {path}, where nothing is kept" for path in mounts if path not in WRITABLE)
    if "/tmp" not in mounts or not mounts.keys() & {"/lab/artifacts", "/lab/results"}:
        yield "lacks a folder that it writes to"
    for source in container.get("envFrom", []):
        name = source["configMapRef"]["name"]
        if ("ConfigMap", name) not in names:
            yield f"there is no ConfigMap {name}"
    if "memory" not in container.get("resources", {}).get("limits", {}):
        yield "has no limit of memory"
    for resource in {*container.get("resources", {}).get("limits", {})} - {"cpu", "memory"}:
        if resource != "nvidia.com/gpu":
            yield f"asks for {resource}, which no node has"
    if container["image"].partition(":")[2] not in ("harness", "cpu", "llama", "cuda"):
        yield f"no target of the Dockerfile makes {container['image']}"


def _service_problems(manifest: Manifest, manifests: list[Manifest]) -> Iterator[str]:
    spec = manifest["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    env = {e["name"]: e.get("value") for e in container["env"]}
    if {PORT} != set(ports.values()) or env.get("PORT") != str(PORT):
        yield f"the container's ports {ports} are not PORT={env.get('PORT')}"
    num_threads = int(_setting(manifests, "N_THREADS") or 10**9)
    if num_threads + 1 > float(container["resources"]["requests"]["cpu"]):
        yield f"N_THREADS={num_threads} and the API take more than what is asked for: requests.cpu"
    if env.get("HOST") != "0.0.0.0":
        yield "HOST keeps other pods out"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container.get(probe, {}).get("httpGet", {})
        if get.get("path") != "/health" or get.get("port") not in ports:
            yield f"{probe} does not ask /health"
    startup = container.get("startupProbe", {})
    if startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3) < 600:
        yield "startupProbe kills a pod that still loads"
    wait_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    if wait_s < 1:
        yield "no preStop: requests still come when the pod stops taking them"
    drain_s = float(_setting(manifests, "DRAIN_TIMEOUT_S") or 30)
    if spec.get("terminationGracePeriodSeconds", 30) < wait_s + drain_s + 10:
        yield f"the grace period does not cover preStop ({wait_s} s) and DRAIN_TIMEOUT_S ({drain_s:g} s)"
    if "replicas" in manifest["spec"]:
        yield "replicas would be set back at every apply: KEDA sets them"
    stage = spec.get("initContainers", [])
    if [c["args"] for c in stage] != [["model"]]:
        yield "no init container stages the model"
    image = container["image"].partition(":")[2]
    backend = {"cpu": "torch", "cuda": "torch", "llama": "llama_cpp"}.get(image)
    writer = "llama" if backend == "llama_cpp" else "harness"
    if any(not c["image"].endswith(f":{writer}") for c in stage):
        yield f"only the image {writer} has what every model is made of for this backend"
    if _setting(manifests, "BACKEND") != backend:
        yield f"the image {image} has no backend {_setting(manifests, 'BACKEND')}"
    has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
    if has_gpu != (image == "cuda"):
        yield "a GPU and the image cuda go together"


def _scaling_problems(manifest: Manifest, names: set[tuple[str, str]]) -> Iterator[str]:
    spec = manifest["spec"]
    target = spec["scaleTargetRef"]
    if (target.get("kind"), target["name"]) not in names:
        yield f"there is no {target.get('kind')} {target['name']}"
    for trigger in spec["triggers"]:
        for name in re.findall(r"lab_\w+", trigger["metadata"]["query"]):
            if name not in SERIES:
                yield f"there is no series {name}"
        if trigger.get("metricType") != "AverageValue":
            yield "the threshold is for a replica, so the metric is an AverageValue"
        if trigger["metadata"].get("ignoreNullValues") != "false":
            yield "replicas would go when Prometheus has no series: ignoreNullValues"


SERIES = set(re.findall(r"`(lab_\w+)`", (ROOT / "docs/metrics.md").read_text(encoding="utf-8")))


def _setting(manifests: list[Manifest], name: str) -> str | None:
    for manifest in manifests:
        if manifest["kind"] == "ConfigMap" and name in manifest["data"]:
            return str(manifest["data"][name])
    return None
