"""The prompts of a run: a JSON-lines file and the digest it is held to.

A file whose SHA-256 is not the one recorded beside it (`prompts.jsonl` and `prompts.sha256`, in the format of
`sha256sum`) is refused: figures of two runs compare only when both replayed the same prompts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.base import ConfigError
from adapters.data_files import DATA
from harness.plan.text_file import decode, read_text, split_lines
from harness.plan.trace_formats import MAX_TOKENS
from services.contract.requests import ChatMessage

REPOSITORY = Path(__file__).resolve().parents[2]


class Prompt(BaseModel):
    """One line of the corpus; fields beyond these are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str = Field(min_length=1)
    prompt: str | tuple[int, ...] = Field(default="", min_length=1)
    """Text, or token ids."""
    messages: tuple[ChatMessage, ...] = Field(default=(), min_length=1)
    """Instead of a prompt: the turns of a chat so far."""
    max_tokens: int = Field(ge=1, le=MAX_TOKENS)
    category: str = ""
    chat: bool = False
    """The text is the message of a user."""
    user: str | None = Field(default=None, min_length=1)
    """The client that asks, as the order `vtc` tells them apart."""
    priority: int | None = Field(default=None, ge=0, le=2)
    """The class of service; None: as the server has it by default."""

    @property
    def is_chat(self) -> bool:
        """The same in all lines of a corpus."""
        return self.chat or bool(self.messages)


@dataclass(frozen=True, slots=True)
class Corpus:
    prompts: tuple[Prompt, ...]
    path: Path
    sha256: str
    recorded_sha256: str | None
    """What the digest file says; None where there is no such file."""
    left_out: str | None = None
    """One sentence on what its source held and it does not."""

    @property
    def is_as_recorded(self) -> bool:
        return self.sha256 == self.recorded_sha256


def default_path(name: str = "prompts") -> Path:
    """`data/<name>.jsonl` of the working directory, else the one that comes with the lab."""
    local = Path(f"data/{name}.jsonl")
    return local if local.exists() else DATA / local.name


def load_corpus(path: Path, *, allow_changed: bool = False) -> Corpus:
    """Read and check a corpus.

    Raises:
        ConfigError: the file is missing, malformed, or not the recorded one (unless `allow_changed`).
    """
    if not path.is_file():
        raise ConfigError(f"there is no corpus at {path}; `lab prompts` (or `make prompts`) writes it")
    content = path.read_bytes()
    corpus = Corpus(
        prompts=_parse(decode(content, path), path),
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        recorded_sha256=_recorded_digest(path),
    )
    if not corpus.is_as_recorded and not allow_changed:
        raise ConfigError(_refusal(corpus))
    return corpus


def _parse(text: str, path: Path) -> tuple[Prompt, ...]:
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for number, line in enumerate(split_lines(text), start=1):
        if not line.strip():
            continue
        try:
            prompt = Prompt.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "line"
            raise ConfigError(f"{path}, line {number}: {field}: {first['msg']}") from error
        if bool(prompt.prompt) == bool(prompt.messages):
            raise ConfigError(f"{path}, line {number}: needs either a prompt or messages")
        if prompt.chat and not isinstance(prompt.prompt, str):
            raise ConfigError(f"{path}, line {number}: chat needs a text, not token ids")
        if prompts and prompt.is_chat != prompts[0].is_chat:
            raise ConfigError(f"{path}, line {number}: `chat` must be the same in all lines")
        if prompt.id in seen:
            raise ConfigError(f"{path}, line {number}: the id {prompt.id!r} is used twice")
        seen.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{path} holds no prompts; `lab prompts` (or `make prompts`) writes them")
    return tuple(prompts)


def _recorded_digest(path: Path) -> str | None:
    record = path.with_suffix(".sha256")
    if not record.is_file():
        return None
    words = read_text(record).split()
    return words[0].lower() if words else None


def _refusal(corpus: Corpus) -> str:
    record = corpus.path.with_suffix(".sha256")
    if corpus.recorded_sha256 is None:
        return (
            f"{corpus.path} has no recorded digest in {record}. Record it with `sha256sum {corpus.path} > "
            f"{record}`, or pass --allow-changed-corpus for a run that does not count"
        )
    return (
        f"{corpus.path} is not the recorded corpus: its SHA-256 is {corpus.sha256}, {record} says "
        f"{corpus.recorded_sha256}. Restore the file (`git checkout` or `make prompts`), or pass "
        f"--allow-changed-corpus for a run that does not count"
    )
