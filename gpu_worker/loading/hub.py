"""A model of a hub, as a local folder with only the files that are needed."""

from __future__ import annotations

import os
from pathlib import Path

from gpu_worker.errors import LoadError

_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


def fetch(name: str) -> Path:
    """Download (or find in the hub's cache) the model `owner/name`; shows a progress bar. Raises LoadError.

    The environment's HF_TOKEN is used where there is one.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise LoadError(f"{name} is no local path, and huggingface-hub is not installed") from error
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except GatedRepoError as error:
        how = "its licence must be accepted on the hub" if os.environ.get("HF_TOKEN") else "set HF_TOKEN to a token that has access"
        raise LoadError(f"{name} is a gated model: {how}") from error
    except RepositoryNotFoundError as error:
        raise LoadError(f"the hub has no model {name}, or HF_TOKEN has no access to it") from error
    except LocalEntryNotFoundError as error:
        raise LoadError(f"{name} is no local path, and the hub cannot be reached") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise LoadError(f"{name} could not be downloaded: {' '.join(str(error).split())}") from error
