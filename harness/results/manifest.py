"""What a result file says about itself: the facts by which a run is repeated, or doubted.

The JSON in the file's metadata is these models and nothing else. Files of every earlier version are read:
a key that came later has a default, and a key that is not known here is kept. `SCHEMA_VERSION` rises only
when a reader of today would misunderstand the JSON. No field holds a secret.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from adapters.base import LabError
from adapters.text.unicode_text import printable
from harness.plan.arrival_times import Load
from harness.results.facts import Facts, ForeignFacts, MachineUse, ServerGauges

SCHEMA_VERSION = 1

Level = Literal["VALID", "CAUTION", "INVALID"]


@dataclass(frozen=True, slots=True)
class Validity:
    """Whether a run counts; each reason is a sentence. CAUTION means usable, with a reason to know."""

    invalid: tuple[str, ...] = ()
    caution: tuple[str, ...] = ()

    # The JSON also holds `level`, which follows from the reasons.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

    @property
    def level(self) -> Level:
        if self.invalid:
            return "INVALID"
        return "CAUTION" if self.caution else "VALID"

    def as_dict(self) -> dict[str, str | list[str]]:
        return {"level": self.level, "invalid": list(self.invalid), "caution": list(self.caution)}

    def reasons(self) -> list[str]:
        """What speaks against it, a line each; names and errors from outside are escaped."""
        told = [*(f"INVALID: {r}" for r in self.invalid), *(f"caution: {r}" for r in self.caution)]
        return [printable(line) for line in told]

    def lines(self) -> list[str]:
        return [self.level, *(f"  {reason}" for reason in self.reasons())]


def _is_instant(text: str) -> str:
    """Raises: ValueError for what is no date and time with an offset."""
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"{text!r} has no offset from UTC")
    return text


Instant = Annotated[str, AfterValidator(_is_instant)]
"""ISO 8601 with an offset, kept as it was written."""
_Validity = Annotated[Validity, PlainSerializer(Validity.as_dict)]
_LOAD = TypeAdapter(Load)


class ServiceFacts(Facts):
    """What the harness reads of the service's `GET /model`; the rest of that page is kept beside it."""

    backend: str
    device: str
    dtype: str
    num_threads: int
    scheduling: str
    strategy: dict[str, str | int | float | bool]
    settings: dict[str, str | int | float | bool | None] = {}
    given: list[str] = []
    details: dict[str, str | int | float | bool] = {}


class SettingsFacts(Facts):
    """What is read again of the settings of the harness, which are all kept."""

    seed: int
    url: str | None = None
    processes: int = 1
    start_at: float | None = None
    ignore_eos: bool = True
    capacity: float | None = None
    """Requests a second that the rate of an open loop is a share of."""


class CorpusFacts(Facts):
    path: str
    sha256: str
    recorded_sha256: str | None
    num_prompts: int
    left_out: str | None = None
    """One sentence on the rows of a trace that were not replayed."""


class ScheduleFacts(Facts):
    """`digest` covers the whole schedule, `part_digest` this shard (index, of how many) alone."""

    digest: str
    num_requests: int
    arrivals: str
    concurrency: int | None
    rate: float | None
    shape: dict[str, float | str] = Field(default_factory=dict)
    shard: tuple[int, int] = (0, 1)
    part_digest: str | None = None
    salt: str | None = None
    """None: prompts were sent as they are in the corpus."""
    unsalted_digest: str | None = None

    @property
    def plan_digest(self) -> str:
        """Of what was planned, whatever numbers stood in front of the prompts."""
        return self.unsalted_digest or self.digest

    draw: int | None = None
    """Which sample of the corpus and which arrivals; None for the corpus in its order."""
    num_blocks: int = 1
    """Of the comparison that this run is one block of."""

    @property
    def load(self) -> Load:
        load = {"arrivals": self.arrivals, "concurrency": self.concurrency or 1, "rate": self.rate}
        return _LOAD.validate_python(load | self.shape)

    @model_validator(mode="after")
    def _is_a_load(self) -> Self:
        if self.load.is_open and not self.rate:
            raise ValueError("an open loop has a rate")
        return self


class GitFacts(Facts):
    sha: str | None = None
    is_dirty: bool | None = None


class HostFacts(Facts):
    """What the system does not tell is None."""

    platform: str = ""
    python: str = ""
    cpu_model: str | None
    cpu_governor: str | None
    physical_cores: int
    logical_cores: int | None = None
    memory_bytes: int | None = None
    gpu: list[str] = Field(default_factory=list)


class StepSummary(Facts):
    """`mean_batch_size` counts live rows a step; `dead_row_share` is dead rows of all rows computed."""

    num_steps: int
    mean_batch_size: float
    dead_row_share: float
    median_step_ms: float
    busy_s: float
    num_dropped: int


class Floor(Facts):
    """What the harness reports of a server that answers at once."""

    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    send_lag_p99_ms: float
    num_requests: int


class RepeatEntry(Facts):
    """One replay. `clock_start_s` is on the clock of the rows' stamps."""

    repeat: int
    ended_at: Instant
    clock_start_s: float
    wall_s: float
    hit_in_flight_cap: bool
    was_interrupted: bool
    service_problem: str | None
    model_digest: str | None
    machine: MachineUse
    steps: StepSummary | None
    round_trip_s: float | None = None
    """Of the idle server, before the replay."""
    server: ServerGauges | None = None
    """Of a foreign server; one of ours has a step log."""
    joules_per_token: float | None = None
    """Of the GPU, for each output token."""

    @property
    def mean_batch_size(self) -> float | None:
        told = self.steps or self.server
        return told.mean_batch_size if told else None


class SimulationFacts(Facts):
    """What stands behind figures that nobody measured."""

    calibration: str
    """Digest."""
    in_words: str
    num_replicas: int
    router: str
    is_exact: bool
    outside: list[str] = []
    """Counts of a step that went beyond those of the calibration, a clause each."""
    notes: list[str] = []


class RunManifest(Facts):
    """One arm, all its repeats. `repeats`, `floor` and `validity` are filled in while it is measured."""

    schema_version: int = Field(le=SCHEMA_VERSION)
    run_id: str
    started_at: Instant
    variant: str
    arm: str
    model: str
    model_digest: str | None
    service: ServiceFacts | None
    """None for a server that is not ours."""
    foreign: ForeignFacts | None = None
    """Of a server that is not ours."""
    is_local: bool
    settings: SettingsFacts
    seeds: dict[str, int] = Field(default_factory=dict)
    corpus: CorpusFacts
    schedule: ScheduleFacts
    git: GitFacts = GitFacts()
    uv_lock_sha256: str | None = None
    packages: dict[str, str] = Field(default_factory=dict)
    event_loop: str | None = None
    host: HostFacts
    planned_repeats: list[int]
    repeats: list[RepeatEntry]
    validity: _Validity | None
    floor: Floor | None = None
    kind: Literal["simulated"] | None = None
    """None for a run that was measured."""
    simulation: SimulationFacts | None = None
    merged_from: list[str] | None = None
    """The runs of the shards that this one was merged from."""
    path: str | None = None
    """The file of this run, in a comparison."""
    damage: str | None = None
    """One sentence on what could not be read back."""
    own_arm: str = Field(default="", exclude=True)
    """Set on reading several files, where `arm` may be another name. Never written, like `file`."""
    file: str = Field(default="", exclude=True)

    @property
    def engine_text(self) -> str:
        """As: torch on cpu, bfloat16, 1 engine thread(s)."""
        service = self.service
        if service is None:
            name = self.foreign.name if self.foreign else None
            return f"{name or 'a server'} at {self.settings.url}"
        if service.backend == "null":
            return "null backend: no model, steps of a set time"
        return (
            f"{service.backend} on {service.device}, {service.dtype}, {service.num_threads} engine thread(s)"
        )


class ComparisonManifest(Facts):
    """Several runs side by side, each with its own manifest."""

    kind: Literal["comparison"]
    schema_version: int = Field(le=SCHEMA_VERSION)
    started_at: Instant
    arms: list[str]
    reference: str
    num_blocks: int
    runs: list[RunManifest] = Field(min_length=1)
    validity: _Validity
    damage: str | None = None


Manifest = RunManifest | ComparisonManifest
_Model = TypeVar("_Model", bound=BaseModel)


def read_manifest(raw: bytes) -> Manifest:
    """Read the manifest of a run or of a comparison, of this version or an earlier one.

    Raises:
        LabError: it is no JSON, or lacks what every manifest has; the message names the first such place.
    """
    try:
        found = from_json(raw)
    except ValueError as error:
        raise LabError(f"the manifest is no JSON: {error}") from error
    if isinstance(found, dict) and found.get("kind") == "comparison":
        return parse_facts(ComparisonManifest, found)
    return parse_facts(RunManifest, found)


def parse_facts(kind: type[_Model], found: object) -> _Model:
    """Check decoded JSON.

    Raises:
        LabError: as `read_manifest`.
    """
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise LabError(f"the manifest cannot be read: {where}: {first['msg']}") from error
