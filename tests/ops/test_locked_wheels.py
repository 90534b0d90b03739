"""Whether uv.lock has a build of every package of every image, on both architectures of docker/bake.hcl."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.tags import Tag, cpython_tags
from packaging.utils import parse_wheel_filename

from tests.ops.servers import ROOT

pytestmark = pytest.mark.ops

EXTRAS = {
    "harness": [],
    "cpu": ["torch", "smollm2"],
    "llama": ["llama", "smollm2"],
    "cuda": ["torch", "smollm2"],
}
"""What each target of docker/Dockerfile may install; `cpu` then leaves CUDA's packages out."""
MACHINES = "x86_64", "aarch64"
PYTHONS = (3, 11), (3, 12), (3, 13)
GLIBC_MINOR = 36
"""Of the base, Debian bookworm: glibc 2.36."""
COMPILED_IN_THE_BUILD = {"llama-cpp-python"}
"""Has a source distribution alone, and the Dockerfile's stage has the compiler for it."""

Package = dict[str, Any]


def lacking(lock: dict[str, Any], extras: list[str], machine: str, python: tuple[int, int]) -> list[str]:
    """Names of the packages that an image needs there and that the lock has no build of, sorted."""
    tags = supported(machine, python)
    return sorted({p["name"] for p in needed(lock, extras, machine, python) if not has_build(p, tags)})


def has_build(package: Package, tags: set[Tag]) -> bool:
    names = (wheel["url"].rpartition("/")[2] for wheel in package.get("wheels", ()))
    return package["name"] in COMPILED_IN_THE_BUILD or any(tags & parse_wheel_filename(n)[3] for n in names)


def supported(machine: str, python: tuple[int, int]) -> set[Tag]:
    glibc = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC_MINOR, 4, -1)]
    platforms = [*glibc, f"manylinux2014_{machine}"]
    pure = {Tag(f"py{version}", "none", "any") for version in ("3", "2.py3", f"3{python[1]}")}
    return {*cpython_tags(python, platforms=platforms), *pure} | {Tag("py3", "none", p) for p in platforms}


def needed(
    lock: dict[str, Any], extras: Iterable[str], machine: str, python: tuple[int, int]
) -> Iterator[Package]:
    """The packages that `uv sync --no-dev` with those extras installs on Linux; not the project."""
    environment = {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python[0]}.{python[1]}.0",
        "python_version": f"{python[0]}.{python[1]}",
        "sys_platform": "linux",
        "extra": "",
    }

    def applies(entry: Package) -> bool:
        return "marker" not in entry or Marker(entry["marker"]).evaluate(environment)

    found: set[tuple[str, str]] = set()
    wanted = [("batching-lab", "", extra) for extra in ("", *extras)]
    while wanted:
        name, version, extra = wanted.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        (package,) = (
            p
            for p in lock["package"]
            if p["name"] == name
            and version in ("", p["version"])
            and any(Marker(m).evaluate(environment) for m in p.get("resolution-markers", ["os_name != ''"]))
        )
        if not extra and name != "batching-lab":
            yield package
        dependencies = package.get("optional-dependencies", {}).get(extra, []) if extra else None
        for entry in package.get("dependencies", []) if dependencies is None else dependencies:
            if applies(entry):
                parts = ["", *entry.get("extra", [])]
                wanted += [(entry["name"], entry.get("version", ""), part) for part in parts]


@pytest.fixture(scope="module")
def lock() -> dict[str, Any]:
    return tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("target", EXTRAS)
def test_every_package_of_an_image_has_a_build(lock: dict[str, Any], target: str, machine: str) -> None:
    for python in PYTHONS:
        assert len(list(needed(lock, EXTRAS[target], machine, python))) > 40
        assert lacking(lock, EXTRAS[target], machine, python) == []


def test_a_package_without_a_build_is_seen(lock: dict[str, Any]) -> None:
    planted = deepcopy(lock)
    (torch,) = (p for p in planted["package"] if p["name"] == "torch")
    torch["wheels"] = [w for w in torch["wheels"] if "aarch64" not in w["url"]]
    # For a newer glibc than the base has, and in the lock for another package's sake alone.
    (core,) = (p for p in planted["package"] if p["name"] == "pydantic-core")
    for wheel in core["wheels"]:
        wheel["url"] = wheel["url"].replace("manylinux2014_aarch64.manylinux_2_17_", "manylinux_2_39_")
    assert lacking(planted, ["torch"], "aarch64", (3, 11)) == ["pydantic-core", "torch"]
    assert lacking(planted, [], "aarch64", (3, 12)) == ["pydantic-core"]
    assert lacking(planted, ["torch"], "x86_64", (3, 11)) == []
