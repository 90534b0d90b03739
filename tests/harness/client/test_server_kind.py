"""Servers of others are recognised by the answers that their sources give, and by nothing less."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from adapters.base import LabError
from harness.client.server import Server, find_server
from harness.client.server_kind import find_kind
from harness.settings import HarnessSettings
from tests.harness.fake_server import FakeServer


def listing(owner: str | None, name: str = "m") -> dict[str, Any]:
    entry = {"id": name, "object": "model", "created": 0, "owned_by": owner}
    return {"object": "list", "data": [entry]}


LLAMA_PROPS = {
    "default_generation_settings": {"params": {}, "n_ctx": 4096}, "total_slots": 4,
    "build_info": "b6500-1a2b",
}  # fmt: skip
TGI_INFO = {
    "model_id": "m", "model_sha": None, "max_concurrent_requests": 128, "max_input_tokens": 1024,
    "max_total_tokens": 2048, "router": "text-generation-router", "version": "3.3.6", "docker_label": None,
}  # fmt: skip
OVMS = {"name": "OpenVINO Model Server", "version": "2025.3"}
SGLANG = {"model_path": "m", "internal_states": [{}], "version": "0.5.6"}
SERVERS: dict[str, tuple[dict[str, Any], str, str | None, tuple[str, ...]]] = {
    "vLLM": (
        {"/v1/models": listing("vllm"), "/version": {"version": "0.11.0"}},
        "vLLM", "0.11.0", ("completions", "chat"),
    ),
    "SGLang": (
        {"/v1/models": listing("sglang"), "/server_info": SGLANG},
        "SGLang", "0.5.6", ("completions",),
    ),
    "older SGLang": (
        {"/v1/models": listing("sglang"), "/get_server_info": SGLANG},
        "SGLang", "0.5.6", ("completions",),
    ),
    "llama-server": (
        {"/v1/models": listing("llamacpp"), "/props": LLAMA_PROPS},
        "llama-server", "b6500-1a2b", (),
    ),
    "TensorRT-LLM": (
        {"/v1/models": listing("tensorrt_llm"), "/version": {"version": "1.2.0"}},
        "TensorRT-LLM", "1.2.0", (),
    ),
    "OVMS": ({"/v1/models": listing("OVMS"), "/v2": OVMS}, "OpenVINO Model Server", "2025.3", ()),
    "OVMS at /v3 alone": (
        {"/v1/models": None, "/v3/models": listing("OVMS"), "/v2": OVMS},
        "OpenVINO Model Server", "2025.3", (),
    ),
    "TGI": ({"/v1/models": listing("m"), "/info": TGI_INFO}, "TGI", "3.3.6", ()),
    "Ollama": (
        {"/v1/models": listing("library"), "/": "Ollama is running", "/api/version": {"version": "0.12.3"}},
        "Ollama", "0.12.3", (),
    ),
    "no version": ({"/v1/models": listing("vllm")}, "vLLM", None, ()),
    "older vLLM": (
        {"/v1/models": listing("vllm"), "/version": {"version": "0.6.4.post1"}}, "vLLM", "0.6.4.post1", (),
    ),
    "SGLang without a version": ({"/v1/models": listing("sglang")}, "SGLang", None, ("completions",)),
    "a version of another type": (
        {"/v1/models": listing("vllm"), "/version": {"version": 7}}, "vLLM", None, (),
    ),
    "no owner": ({"/props": LLAMA_PROPS}, "llama-server", "b6500-1a2b", ()),
}  # fmt: skip


def found(server: FakeServer, path: str = "", **settings: Any) -> Server:
    return find_server(server.url + path, HarnessSettings(_env_file=None, **settings))


@pytest.mark.parametrize(("pages", "name", "version", "token_ids_of"), SERVERS.values(), ids=SERVERS)
def test_each_kind_is_recognised(
    pages: dict[str, Any], name: str, version: str | None, token_ids_of: tuple[str, ...]
) -> None:
    with FakeServer(pages=pages) as fake:
        server = found(fake)
    assert server.kind is not None
    assert (server.kind.kind.name, server.kind.version) == (name, version)
    assert server.target.token_ids_of == token_ids_of
    assert server.target.path == ("/v3/completions" if "/v3/models" in pages else "/v1/completions")
    assert server.backend == "external"


@pytest.mark.parametrize(
    "pages",
    [
        {},
        {"/version": {"version": "0.11.0"}},  # vLLM has it, and so have others
        {"/v1/models": listing("lmdeploy"), "/version": {"version": "1"}},
        {"/v1/models": listing("vllm-like")},
        {"/v1/models": listing(None), "/info": {"model_id": "m", "max_input_length": 512}},  # embeddings
        {"/v2": {"name": "triton", "version": "2.60.0"}},
        {"/": "<html>Ollama is running</html>", "/api/version": {"version": "1"}},
        {"/props": [], "/info": "x" * (2 << 20), "/server_info": "[" * 100_000},
    ],
)
def test_what_does_not_say_stays_unknown(pages: dict[str, Any]) -> None:
    with FakeServer(pages=pages) as fake:
        server = found(fake)
    assert (server.kind, server.target.token_ids_of) == (None, ())


def test_a_listing_that_names_the_server_spares_other_pages() -> None:
    with FakeServer(pages={"/v1/models": listing("vllm"), "/version": {"version": "0.11.0"}}) as fake:
        found(fake)
    assert fake.asked == ["/model", "/v1/models", "/version"]


@pytest.mark.parametrize("path", ["/v1", "/v1/completions", "/v1/chat/completions"])
def test_pages_stand_beside_the_api(path: str) -> None:
    with FakeServer(pages={"/v1/models": listing("vllm"), "/version": {"version": "0.11.0"}}) as fake:
        server = found(fake, path)
    assert fake.asked[1:] == ["/v1/models", "/version"]
    assert server.kind is not None


def test_a_server_without_models_needs_a_name() -> None:
    with FakeServer(pages={"/v1/models": {"data": []}}) as fake:
        with pytest.raises(LabError, match="/v1/models does not say which model is served; set MODEL"):
            found(fake)
        server = found(fake, model="mine")
    assert (server.model, server.kind, server.target.path) == ("mine", None, "/v1/completions")


def test_pages_that_hang_cost_little() -> None:
    started_s = time.perf_counter()
    with FakeServer(
        pages={"/v1/models": listing("somebody")}, hang=("/server_info", "/props", "/info")
    ) as fake:
        assert found(fake).kind is None
    assert time.perf_counter() - started_s < 4.0


def test_versions_become_one_short_line() -> None:
    pages = {"/version": {"version": "1\x1b[31m\n" + "x" * 100}}
    kind = find_kind(listing("vllm"), pages.get)
    assert kind is not None
    assert kind.version == "1\\x1b[31m\\n" + "x" * 49
    assert json.dumps(kind.version).isprintable()
