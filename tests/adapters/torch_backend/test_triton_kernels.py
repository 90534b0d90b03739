"""The Triton kernels without a GPU: right in the interpreter, and compiled for three kinds of devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")
triton = pytest.importorskip("triton", reason="this torch comes without Triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adapters.torch_backend.cuda import triton_kernels
from adapters.torch_backend.cuda.fused import attend_warps

BF16, F32, I32, I64 = "*bf16", "*fp32", "*i32", "*i64"
LAB_8B = {"H": 32, "D": 128, "DP": 128, "PARTS": 8, "PART": 256, "WINDOW": 0}
KERNELS: dict[str, tuple[dict[str, str], dict[str, int], int]] = {
    "rms_norm": ({"x": BF16, "weight": BF16, "out": BF16, "eps": "fp32"}, {"N": 4096, "NP": 4096}, 8),
    "rotate_and_store": (
        {"qkv": BF16, "cos": F32, "sin": F32, "slots": I64, "positions": I64}
        | {"k_cache": BF16, "v_cache": BF16, "max_len": "i32"},
        {"H": 32, "KV": 8, "D": 128, "HALF": 64, "HEADS": 8},
        4,
    ),
    "attend_part": (
        {"q": BF16, "k_cache": BF16, "v_cache": BF16, "key_starts": I32, "lengths": I32}
        | {"sums": F32, "stats": F32, "scale": "fp32", "q_stride": "i32"},
        {**LAB_8B, "KV": 8, "GP": 16, "BLOCK": 32},
        2,
    ),
    "join_parts": ({"sums": F32, "stats": F32, "lengths": I32, "out": BF16}, {**LAB_8B, "HEADS": 8}, 2),
    "silu_times": ({"x": BF16, "out": BF16}, {"N": 14_336, "BLOCK": 1024}, 4),
}
"""Arguments, constants and warps of each kernel as lab-8b launches it."""


@pytest.mark.timeout(600)
def test_the_kernels_are_right_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    file = Path(__file__).with_name("interpreted_kernels.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "[100%]" in run.stdout


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_compile_without_spilling(
    name: str, capability: int, tmp_path: Path, record_property: Any
) -> None:
    arguments, constants, warps = KERNELS[name]
    check_registers(name, arguments, constants, warps, capability, tmp_path, record_property)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "changes",
    [
        {"WINDOW": 100},
        {"D": 256, "DP": 256, "WINDOW": 512},
        {"H": 71, "KV": 1, "GP": 128, "D": 64, "DP": 64},
        {"H": 1, "KV": 1, "D": 8, "DP": 16},
    ],
    ids=["window", "large heads, window", "many heads of one key head", "one small head"],
)
def test_attention_of_other_shapes_compiles_without_spilling(
    changes: dict[str, int], capability: int, tmp_path: Path, record_property: Any
) -> None:
    arguments, constants, _ = KERNELS["attend_part"]
    constants = constants | changes
    warps = attend_warps(constants["GP"], constants["DP"])
    check_registers("attend_part", arguments, constants, warps, capability, tmp_path, record_property)


def check_registers(
    name: str,
    arguments: dict[str, str],
    constants: dict[str, int],
    warps: int,
    capability: int,
    folder: Path,
    record_property: Any,
) -> None:
    kernel = getattr(triton_kernels, name)
    # As a launch has them: torch's tensors begin at multiples of 16, but not the parts of a step's words.
    aligned = [n for n, kind in arguments.items() if kind != "fp32" and n not in ("slots", "positions")]
    source = ASTSource(
        fn=kernel,
        signature={**arguments, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    cubin = folder / f"{name}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = resource_usage(cubin)
    spilled_bytes = usage["STACK"] + usage["LOCAL"]
    record_property("registers", usage["REG"])
    record_property("spilled_bytes", spilled_bytes)
    assert spilled_bytes == 0
    assert 0 < usage["REG"] <= 255


def resource_usage(cubin: Path) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "--dump-resource-usage", cubin]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = next(line for line in out.splitlines() if "REG:" in line).split()
    pairs = (field.partition(":")[::2] for field in fields)
    return {key: int(value) for key, value in pairs if value.isdigit()}
