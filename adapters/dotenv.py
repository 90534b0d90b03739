"""What is wrong with `.env`, in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adapters.base import ConfigError


@contextmanager
def reading_dotenv() -> Iterator[None]:
    """Raises: ConfigError: the block met an `.env` that is not UTF-8, as some editors and shells write it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(".env is not UTF-8 text: save it as UTF-8 and try again") from error
