"""A model of the Hugging Face hub, fetched into the hub's own cache.

Each failure becomes one sentence that says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.base import ConfigError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
NOT_NEEDED = ["original/*", "onnx/*", "consolidated*", "*/*.safetensors"]


def looks_like_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None


def fetch_from_hub(repo_id: str) -> Path:
    """Download what is not cached yet and return the snapshot's folder, named after its commit.

    Raises:
        ConfigError: no network, no such model, no permission, or no weights in it.
    """
    from huggingface_hub import snapshot_download

    def fetch(weights: str) -> Path:
        return Path(
            snapshot_download(repo_id, allow_patterns=[*SMALL_FILES, weights], ignore_patterns=NOT_NEEDED)
        )

    with hub_errors(repo_id):
        folder = fetch("*.safetensors")
        if not any(folder.glob("*.safetensors")):
            folder = fetch("*.bin")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ConfigError(f"{repo_id} has no weights in safetensors or bin format")
    return folder


def fetch_file_from_hub(repo_id: str, file_name: str) -> Path:
    """Download one file, unless it is cached, and return its path.

    Raises:
        ConfigError: no network, no such model or file, or no permission.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(repo_id):
        return Path(hf_hub_download(repo_id, file_name))


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what goes wrong with the hub inside the block into one sentence that says what to do."""
    import httpx2
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ConfigError(
            f"{repo_id} is gated: accept its terms on its hub page, then set HF_TOKEN to a token of yours"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"the hub has no model {repo_id}; check the spelling, or set HF_TOKEN if it is private"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConfigError(
            f"{repo_id} is not in the local cache and the hub cannot be reached; connect once to download "
            f"it, or set MODEL to a local folder or to a preset such as lab-26m"
        ) from error
    except httpx2.TransportError as error:
        raise ConfigError(
            f"the hub cannot be reached for {repo_id} ({error}); connect and run again, which goes on where "
            f"it stopped, or set MODEL to a local folder or to a preset such as lab-26m"
        ) from error
    except EntryNotFoundError as error:
        raise ConfigError(f"{repo_id} has no such file: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(f"downloading {repo_id} failed: {error}") from error


def gguf_in_hub(name: str) -> tuple[str, str] | None:
    """Repository and file of `owner/repository/[folder/]file.gguf`; None where the name has no such form."""
    parts = name.split("/")
    if len(parts) < 3 or not looks_like_hub_id("/".join(parts[:2])):
        return None
    return "/".join(parts[:2]), "/".join(parts[2:])
