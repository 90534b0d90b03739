"""What a simulation knows of a machine: the cost of a step, the time around steps, and how sure it is.

The digest covers all that a simulation computes with, so that two figures of one digest rest on the same
numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters.base import BackendConfig, BackendInfo, ConfigError
from adapters.data_files import DATA
from adapters.registry import create_backend
from harness.plan.schedule import PlannedRequest
from harness.results.output_dir import whole_file
from harness.simulator.costs import AnyCost, NullCost
from harness.simulator.overheads import Overheads
from services.read_settings import read_settings

DEFAULT = DATA / "calibrations" / "lab-26m.json"


class FitQuality(BaseModel):
    """On steps that the fit never saw. Errors are relative to the measured duration."""

    model_config = ConfigDict(frozen=True)

    num_fitted: int
    num_held_out: int
    median_error: float
    p95_error: float
    total_error: float
    """Of the sum of all durations: above 0 where the model says too much."""


class Verified(BaseModel):
    """What `lab simulate --verify` found on measured runs that took no part in a calibration."""

    model_config = ConfigDict(frozen=True)

    num_runs: int
    digest: str = ""
    """Of the calibration that they were simulated with: of another one these errors say nothing."""
    median_errors: dict[str, float]
    """Relative, by the label of a figure."""

    def in_words(self) -> str:
        told = ", ".join(f"{name} {error:.1%}" for name, error in self.median_errors.items())
        return f"median errors on {self.num_runs} measured runs: {told}"


class Calibration(BaseModel):
    """`info` has the fields of `BackendInfo`; `base` the settings of the service that are the machine's."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["calibration"] = "calibration"
    name: str
    source: str
    """Where the numbers come from: `formula`, `roofline` or the runs."""
    info: dict[str, Any]
    host: dict[str, Any] = {}
    base: dict[str, str] = {}
    cost: Annotated[AnyCost, Field(discriminator="kind")]
    overheads: Overheads = Overheads()
    ranges: dict[str, tuple[float, float]] = {}
    """Least and most of each count of `StepWork` in the steps of the fit."""
    fit: FitQuality | None = None
    verified: Verified | None = None
    prompt_tokens: dict[str, int] = {}
    """Of the prompts that were seen, by id."""
    tokens_per_byte: float = 1.0
    """Of other texts."""
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _can_be_computed_with(self) -> Self:
        for part in (self.cost, self.overheads):
            for name, value in asdict(part).items():
                numbers = value if isinstance(value, tuple) else () if name == "kind" else (value,)
                if not all(0 <= number < math.inf for number in numbers):
                    raise ValueError(f"{name} must be 0 or more, not {value}")
        try:
            BackendInfo(**self.info)
        except TypeError as error:
            raise ValueError(f"info: {error}") from error
        return self

    @property
    def digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"name", "source", "notes", "host", "verified"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def known_errors(self) -> Verified | None:
        return self.verified if self.verified and self.verified.digest == self.digest else None

    def backend_info(self, config: BackendConfig) -> BackendInfo:
        """What this machine's backend says of itself with another MAX_BATCH or MAX_MODEL_LEN.

        KV grows with the slots where the calibrated backend had one for each slot, and stays otherwise.
        """
        seen = BackendInfo(**{**self.info, "eos_token_ids": ()})
        max_model_len = config.max_model_len or seen.max_model_len
        if not isinstance(self.cost, NullCost):
            max_model_len = min(max_model_len, seen.max_model_len)
        per_slot = seen.kv_capacity_tokens == seen.max_batch_size * seen.max_model_len
        kv = config.max_batch_size * max_model_len if per_slot else seen.kv_capacity_tokens
        return replace(
            seen,
            max_batch_size=config.max_batch_size,
            max_model_len=max_model_len,
            kv_capacity_tokens=kv,
        )

    def num_prompt_tokens(self, planned: PlannedRequest) -> int:
        if not isinstance(planned.prompt, str):
            return len(planned.prompt)
        seen = self.prompt_tokens.get(planned.prompt_id)
        return seen or max(1, round(_num_bytes(planned.prompt) * self.tokens_per_byte))

    def outside(self, most_of: Mapping[str, int]) -> list[str]:
        """One clause for each count of `StepWork` whose most went beyond what the fit saw."""
        told = []
        for name, most in most_of.items():
            if name in self.ranges and most > self.ranges[name][1]:
                told.append(f"{name} up to {most:g}, calibrated up to {self.ranges[name][1]:g}")
        return told

    def in_words(self) -> str:
        words = f"calibration {self.digest[:12]} ({self.name})"
        if isinstance(self.cost, NullCost):
            return f"{words}: the null backend's own formula"
        if self.fit is None:
            return f"{words}: an analytic model, nothing measured stands behind it"
        fit = self.fit
        errors = f"{fit.median_error:.1%} (median) and {fit.p95_error:.0%} (p95)"
        of_runs = self.known_errors.in_words() if self.known_errors else "not verified on measured runs"
        return f"{words}: held-out steps are off by {errors}; {of_runs}"


@lru_cache(maxsize=4096)
def _num_bytes(text: str) -> int:
    """Kept, since a long run asks for the texts of a corpus over and over."""
    return len(text.encode())


def null_calibration() -> Calibration:
    """The null backend with the NULL_ options of the environment: exact, as far as the steps go."""
    info = create_backend(read_settings({"BACKEND": "null"}, None).engine_spec().backend).info
    parts = ("step", "row", "prompt_token")
    step_s, row_s, token_s = (float(info.details[f"null_{part}_s"]) for part in parts)
    return Calibration(
        name="null",
        source="formula",
        info=asdict(info),
        base={"BACKEND": "null"},
        cost=NullCost(step_s, row_s, token_s),
    )


def read_calibration(path: Path) -> Calibration:
    """
    Raises:
        ConfigError: there is no such file, or it is no calibration.
    """
    try:
        return Calibration.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise ConfigError(f"{path} is no calibration: {where}: {first['msg']}") from error


def write_calibration(path: Path, calibration: Calibration) -> None:
    with whole_file(path) as file:
        file.write(calibration.model_dump_json(indent=1).encode() + b"\n")
