"""Takes CUDA out of an installed torch, for an image that computes on a CPU: SITE_PACKAGES is the argument.

torch's wheel for Linux is the CUDA build, and importing it loads `libtorch_cuda.so` (0.5 GB) and ten
libraries of CUDA (3 GB). A process on a machine without a GPU calls none of them. One small library replaces
them: it has every name that is asked for, and its functions answer with CUDA's code for "no device". So
torch.cuda.is_available() is False, as on any machine without a GPU.

The standard library, a C compiler and binutils are enough.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

REMOVED = "libtorch_cuda.so", "libtorch_cuda_linalg.so", "libtorch_nvshmem.so", "libcaffe2_nvrtc.so"
STAND_IN = "libwithout_cuda.so"
NO_DEVICE = 100
PATCHES = (
    ("torch/backends/cuda/__init__.py", r"return torch\._C\._has_cuda", "return False"),
    ("torch/version.py", r"(?m)^cuda: .*", "cuda: Optional[str] = None"),
)
"""torch replaces some operators of CUDA at import, where it was built with CUDA."""
OBJECTS = """
static long nothing(void) { return 0; }
static void *type[2] = {0, "without_cuda"};
static void *table[16] = {0, type, [2 ... 15] = nothing};
"""
"""A C++ object begins with the address of its table of functions, after the offset and the type in it."""


def main(site_packages: Path) -> int:
    folder = site_packages / "torch/lib"
    for name in REMOVED:
        (folder / name).unlink(missing_ok=True)
    libraries = sorted(p for p in folder.glob("*.so*") if not p.is_symlink() and p.name != STAND_IN)
    paths = _system_libraries()
    needed = {name for path in libraries for name in _needed(path)}
    absent = sorted(name for name in needed if name not in paths and not (folder / name).exists())
    defined = {
        name
        for path in [*libraries, *(paths[n] for n in needed if n in paths)]
        for name, _, _ in _symbols(path, "--defined-only")
    }
    # Weak names may stay undefined, and Python's own come from the interpreter.
    missing = {
        name: version
        for path in libraries
        for name, version, kind in _symbols(path, "--undefined-only")
        if kind == "U" and name not in defined and not re.match("_?Py", name)
    }
    with tempfile.TemporaryDirectory() as scratch:
        source, versions = Path(scratch, "stand_in.c"), Path(scratch, "versions")
        source.write_text("\n".join([OBJECTS, *map(_stand_in, missing)]), encoding="utf-8")
        versions.write_text(_version_script(missing), encoding="utf-8")
        linked = f"-Wl,-soname,{STAND_IN}", f"-Wl,--version-script={versions}"
        command = ["cc", "-shared", "-fPIC", "-w", *linked, source, "-o", folder / STAND_IN]
        subprocess.run(command, check=True)
    for name in absent:
        (folder / name).symlink_to(STAND_IN)
    for path, old, new in PATCHES:
        text = (site_packages / path).read_text(encoding="utf-8")
        if len(re.findall(old, text)) != 1:
            sys.exit(f"{path} of this torch does not have the line {old!r} once")
        (site_packages / path).write_text(re.sub(old, new, text), encoding="utf-8")
    print(f"{len(missing)} names stand in for {', '.join(absent)}")
    return 0


def _stand_in(name: str) -> str:
    if name.startswith("_ZTI"):  # a type_info: a table of functions, then the name, which is read at import
        return f'void *{name}[4] = {{0, "{name[4:]}"}};'
    if name.startswith("_ZT"):
        return f"void *{name}[64];"
    if name.startswith("cudaGetError"):
        return f'const char *{name}(int code) {{ return "this image is built without CUDA"; }}'
    if "get_gil_checker" in name:  # called at import, and what it returns is written to
        return f"void *{name}(void) {{ static void *room[8]; return room; }}"
    if re.search("C[12]E", name):  # a constructor: the type of a default argument is read at import
        return f"void {name}(void **self) {{ *self = table + 2; }}"
    return f"long {name}(void) {{ return {0 if name.startswith('_Z') else NO_DEVICE}; }}"


def _version_script(missing: dict[str, str]) -> str:
    """The loader refuses a library that lacks the versions that its users were linked with."""
    of_version: dict[str, list[str]] = {}
    for name, version in missing.items():
        of_version.setdefault(version, []).append(name)
    # Names without a version keep none where others have one.
    of_version.pop("", None)
    return "".join(f"{v} {{ global: {'; '.join(names)}; }};\n" for v, names in of_version.items())


def _symbols(path: Path, which: str) -> list[tuple[str, str, str]]:
    """Name, version ("" where it has none) and kind of each."""
    lines = map(str.split, _output("nm", "--dynamic", "--format=posix", which, path).splitlines())
    return [
        (line[0].partition("@")[0], line[0].rpartition("@")[2] if "@" in line[0] else "", line[1])
        for line in lines
    ]


def _needed(path: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _output("readelf", "--dynamic", path))


def _system_libraries() -> dict[str, Path]:
    listed = re.findall(r"^\t(\S+) .*=> (\S+)$", _output("/sbin/ldconfig", "-p"), re.MULTILINE)
    return {name: Path(path) for name, path in reversed(listed) if not name.startswith(("libcu", "libnv"))}


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
