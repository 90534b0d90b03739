"""A service as a deployment of Ray Serve: each replica is what `lab serve` runs, behind Serve's proxies.

`app` is the builder that `serve.yaml` and `lab serve-ray` name. The nodes of the cluster have this package
installed, and read no `.env`. A replica also answers on a port of its own, where its `/metrics` are its own:
`/replicas` lists these addresses as Prometheus's HTTP discovery wants them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any

import ray
import uvicorn
from ray import serve
from ray.serve.config import DeploymentActorConfig, RequestRouterConfig
from starlette.responses import JSONResponse, Response

from services.core.service import Service
from services.http.app import create_app
from services.logs import set_up_logs
from services.main import listen_on
from services.read_settings import read_settings
from services.settings import Settings
from tools.ray_serve.router import ROUTING_STATS_PERIOD_S, OutstandingTokensRouter

APPLICATION = "lab"
_ADDRESSES = "addresses"
_FORGOTTEN_AFTER_S = 15.0
_BEYOND_DRAIN_S = 10.0
_BESIDE_GENERATION = 32
"""Requests a replica may hold beside those that generate: health, metrics, the model's card."""


class Addresses:
    """Where each replica answers by itself. One that has said nothing for a while is gone."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, float]] = {}

    def see(self, replica: str, address: str) -> None:
        self._seen[replica] = address, time.monotonic()

    def listed(self) -> dict[str, str]:
        oldest_s = time.monotonic() - _FORGOTTEN_AFTER_S
        self._seen = {name: seen for name, seen in self._seen.items() if seen[1] >= oldest_s}
        return {name: address for name, (address, _) in self._seen.items()}


@serve.ingress()
class LabService:
    async def __init__(self, settings: Mapping[str, Any]) -> None:  # type: ignore[misc]
        """Load the model; Serve sends nothing before. Of several replicas on a node one makes its files."""
        given = read_settings(settings, env_file=None)
        set_up_logs(given.log_level, given.log_format)
        self._service = Service(given)
        self._routes = create_app(self._service)
        self._routes.add_api_route("/replicas", self._replicas, methods=["GET"])
        self._num_reports = 0
        await self._service.start()
        listener = listen_on(given.host, 0)
        host, port = listener.getsockname()[:2]
        self._address = f"{ray.util.get_node_ip_address() if host == '0.0.0.0' else host}:{port}"
        self._name = serve.get_replica_context().replica_tag
        config = uvicorn.Config(self._routes, ws="none", lifespan="off", log_config=None, log_level="error")
        self._serving = asyncio.create_task(uvicorn.Server(config).serve(sockets=[listener]))

    def __serve_build_asgi_app__(self) -> Any:
        """What Serve brings requests to."""
        return self._routes

    async def _replicas(self) -> Response:
        found = await serve.get_deployment_actor(_ADDRESSES).listed.remote()
        targets = [{"targets": [found[name]], "labels": {"replica": name}} for name in sorted(found)]
        return JSONResponse(targets)

    async def record_routing_stats(self) -> dict[str, int]:
        """What `OutstandingTokensRouter` reads; Serve asks for it."""
        with contextlib.suppress(ValueError):  # while Serve starts that actor again
            serve.get_deployment_actor(_ADDRESSES).see.remote(self._name, self._address)
        self._num_reports += 1
        return {
            "report": self._num_reports,
            "outstanding_tokens": self._service.outstanding_tokens,
            "num_requests": self._service.health().active_requests,
        }

    async def check_health(self) -> None:
        """Serve replaces a replica where this raises. An engine that is started again is no reason."""
        if self._service.status == "failed":
            raise RuntimeError("the engine failed too often")

    async def __del__(self) -> None:
        """Serve calls it when the last accepted request has ended, or the drain has taken too long."""
        await self._service.close()


def app(args: Mapping[str, Any]) -> Any:
    """An application of Ray Serve with the service that these settings describe.

    Raises:
        ConfigError: a setting cannot work.
    """
    settings = read_settings(args, env_file=None)
    return deployment(settings).bind(dict(args))


def deployment(settings: Settings) -> Any:
    """`LabService` with the limits that follow from the settings; `.options` and `serve.yaml` set others."""
    return serve.deployment(
        LabService,
        name=APPLICATION,
        ray_actor_options={"num_cpus": settings.num_threads},
        # The service has a queue and limits of its own, and refuses by them.
        max_ongoing_requests=settings.max_batch + settings.max_queue + _BESIDE_GENERATION,
        graceful_shutdown_timeout_s=settings.drain_timeout_s + _BEYOND_DRAIN_S,
        request_router_config=RequestRouterConfig(
            request_router_class=OutstandingTokensRouter,
            request_routing_stats_period_s=ROUTING_STATS_PERIOD_S,
        ),
        deployment_actors=[
            DeploymentActorConfig(
                name=_ADDRESSES, actor_class=ray.remote(Addresses), actor_options={"num_cpus": 0}
            )
        ],
    )


def target_ongoing_requests(settings: Settings) -> int:
    """A full batch has no place for a burst while the next replica loads."""
    return math.ceil(settings.max_batch * 3 / 4)
