"""A model of the Hugging Face hub, fetched into the hub's own cache.

What enters is a repository id; what leaves is a local folder with the files a text model needs, or one
sentence that says what to do. Knows no presets and no backend.
"""

from __future__ import annotations

import re
from pathlib import Path

from adapters.base import ConfigError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_NOT_NEEDED = ["original/*", "onnx/*", "consolidated*", "*/*.safetensors"]


def looks_like_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None


def fetch_from_hub(repo_id: str) -> Path:
    """Download what is not cached yet and return the snapshot's folder, named after its commit.

    Raises:
        ConfigError: no network, no such model, no permission, or no weights in it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    def fetch(weights: str) -> Path:
        return Path(
            snapshot_download(repo_id, allow_patterns=[*_SMALL_FILES, weights], ignore_patterns=_NOT_NEEDED)
        )

    try:
        folder = fetch("*.safetensors")
        if not any(folder.glob("*.safetensors")):
            folder = fetch("*.bin")
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
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(f"downloading {repo_id} failed: {error}") from error
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ConfigError(f"{repo_id} has no weights in safetensors or bin format")
    return folder
