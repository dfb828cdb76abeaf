"""Models from the Hugging Face hub, or from its cache on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.models import integrity
from helpers.models.base import (
    MISTRAL,
    OFFLINE,
    SMOLLM2,
    Damaged,
    Found,
    HubUnreachable,
    ModelError,
    choices,
    require_disk,
    require_room,
    this_device,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# The hub's revisions this course was written for: what somebody pushes to these repositories later does not reach its readers.
REVISIONS = {
    MISTRAL: "c170c708c41dac9275d15a8fff4eca08d52bab71",
    SMOLLM2: "12fd25f77366fa6b3b4b768ec3050bf629380bac",
}
WANTED_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
UNWANTED_FILES = ["consolidated*", "original/*", "*.bin", "*.pt", "*.pth", "*.gguf"]  # Mistral ships its weights twice
HUB_TIMEOUT = 10  # seconds before the hub counts as out of reach


def download(name: str, copies: float | None = None, halves: float | None = None, on_gpu: float = 1) -> Found:
    """Download from the hub, or take what an earlier download left complete in the hub's own cache.

    copies, halves, on_gpu: as `find` takes them, asked before a download; copies is None for what "auto" has chosen by the memory that is
    there.
    Raises HubUnreachable where the hub gives no answer, and ModelError for a refusal or for what this course does not load.
    """
    folder = _kept(name)
    if folder is None:
        if offline():
            raise HubUnreachable(
                f'HF_HUB_OFFLINE is set and {name} is not in the hub\'s cache. Unset it, or use model="{OFFLINE}".'
            )
        _require_loadable(name, _ask(name), copies, halves, on_gpu)
        folder = _fetch(name)
        integrity.check_folder(folder)
    return Found(str(folder), name.split("/")[-1], f"hub: {name}", this_device(), name)


def _kept(name):
    """The folder that an earlier download left complete, or None. A damaged file is deleted, so that it is downloaded again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(name, revision=REVISIONS.get(name), local_files_only=True)
        integrity.check_folder(folder)
    except HFValidationError as error:
        raise ModelError(f'"{name}" is not a hub id (owner/name). {choices()}') from error
    except Damaged as error:
        for file in {error.file.resolve(), error.file}:  # the blob, and the link to it
            file.unlink(missing_ok=True)
        return None
    except (ModelError, OSError):  # nothing there, or only part of it
        return None
    return folder


def _ask(name):
    """What the hub says of a model that this reader may download."""
    asked = api()
    try:
        info = asked.model_info(name, revision=REVISIONS.get(name), files_metadata=True, timeout=HUB_TIMEOUT)
        asked.auth_check(name)
    except Exception as error:
        raise _refusal(name, error) from error
    return info


def _refusal(name, error):
    """The error for the reader that says what would help, for one that came while the hub was asked for a model."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return ModelError(_gated(name))
    unknown = isinstance(error, RepositoryNotFoundError)
    if isinstance(error, HfHubHTTPError) and status(error) == 401 and (token_set() or not unknown):
        return ModelError(_bad_token())
    if unknown:
        return ModelError(
            f"The hub has no public model {name}. Check the spelling at https://huggingface.co/models. {choices()}"
        )
    if isinstance(error, HfHubHTTPError):
        return HubUnreachable(
            f'The hub answered with an error for {name} (HTTP {status(error)}). Try later, or use model="{OFFLINE}".'
        )
    return HubUnreachable(  # connection refused, name not resolved, time-out, or an answer that is no hub's
        f'No connection to the hub for {name} ({type(error).__name__}). Check the network, or use model="{OFFLINE}" '
        "or a folder on this machine."
    )


def _require_loadable(name, info, copies, halves, on_gpu):
    """Raise ModelError for a model that this course does not load, or that has no room here. info: as `_ask` returns it."""
    sizes = {item.rfilename: item.size or 0 for item in info.siblings or [] if item.rfilename.endswith(".safetensors")}
    if not sizes:
        raise ModelError(f"{name} has no safetensors weights on the hub, and this course loads no pickles. {choices()}")
    if (info.config or {}).get("auto_map"):
        raise ModelError(f"{name} asks to run its own Python code; this course never does. {choices()}")
    size = sum(size for file, size in sizes.items() if not file.startswith("consolidated"))
    require_disk(Path.home(), size, name)
    if copies is not None:
        require_room(name, size, info.config or {}, copies, halves, on_gpu)


def _fetch(name):
    """Download a model; the folder in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        # The branch by its name and not by `info.sha`: only then does the hub's cache find it again without the hub.
        return snapshot_download(
            name, revision=REVISIONS.get(name), allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES
        )
    except GatedRepoError as error:
        raise ModelError(_gated(name)) from error
    except Exception as error:
        raise HubUnreachable(
            f"The download of {name} broke off ({type(error).__name__}: {error}). Run again: it resumes."
        ) from error


def _gated(name):
    return (
        f"{name} is gated. Accept its terms at https://huggingface.co/{name}, make a read token at "
        "https://huggingface.co/settings/tokens, and log in with `hf auth login` (or set HF_TOKEN). Nothing was downloaded."
    )


def _bad_token():
    return (
        "The hub refuses your token (wrong, expired, or without read access). Make a new one at "
        "https://huggingface.co/settings/tokens and run `hf auth login`, or unset HF_TOKEN for public models."
    )


def api(timeout: float | None = None) -> HfApi:
    """The hub's API with a time limit on every answer (seconds; HUB_TIMEOUT): its own client waits for ever."""
    from huggingface_hub import HfApi, get_session

    get_session().timeout = timeout or HUB_TIMEOUT
    return HfApi()


def endpoint() -> str:
    """Address of the hub in use; HF_ENDPOINT moves it."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return constants.ENDPOINT


def offline() -> bool:
    """True where HF_HUB_OFFLINE forbids to ask the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def in_hub_cache(name: str) -> Path | None:
    """The folder of a hub model that an earlier download left complete on this machine, or None."""
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, revision=REVISIONS.get(name), local_files_only=True))
        integrity.check_folder(folder)
    except (ImportError, ModelError, OSError, ValueError):
        return None
    return folder


def token_set() -> bool:
    """True if there is a hub token here, right or wrong."""
    from huggingface_hub import get_token

    return bool(get_token())


def status(error: Exception) -> int | None:
    """The HTTP status of a hub error, or None."""
    return getattr(getattr(error, "response", None), "status_code", None)
