"""This process and those it starts: its cores, whether a front end draws its widgets, what is set before libraries are imported."""

import logging
import os
from pathlib import Path


def cores() -> int:
    """Number of CPU cores this process may use (a container often has fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def headless() -> bool:
    """True where `python -m helpers run` executes the notebooks: no front end will ever draw a widget, so show text instead."""
    return os.environ.get("COURSE_BATCH") == "1"


def child_environment() -> dict[str, str]:
    """Environment for a new Python process that imports `helpers` from here, with what the reader's PYTHONPATH already holds."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def prepare() -> None:
    """Set the number of threads and quiet two libraries. Call it before torch is imported; what the reader has set stays."""
    os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    # gptqmodel divides its workers by its own rule and ends up with too few on two cores unless told.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, cores())))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer warns in every forked process otherwise
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # torchao announces at import which GPU libraries it could not load; on a CPU that is every one of them.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
