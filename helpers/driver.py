"""What the NVIDIA driver says of the first GPU, without torch: asking torch would take GPU memory in this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _first_gpu() -> Iterator[tuple]:
    """Yield (pynvml, handle) of the first GPU as CUDA_VISIBLE_DEVICES names it, or (None, None) where there is none."""
    try:
        import pynvml
    except ImportError:  # in an environment that never saw requirements.txt
        yield None, None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None, None
        return
    try:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
        by_name = first.startswith(("GPU-", "MIG-"))
        yield (
            pynvml,
            pynvml.nvmlDeviceGetHandleByUUID(first) if by_name else pynvml.nvmlDeviceGetHandleByIndex(int(first)),
        )
    except (pynvml.NVMLError, ValueError):
        yield None, None
    finally:
        pynvml.nvmlShutdown()


def describe() -> tuple[str, str, str] | None:
    """(GPU name, driver version, CUDA version the driver takes) of the first GPU, or None without one."""
    with _first_gpu() as (nvml, gpu):
        if gpu is None:
            return None
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        return nvml.nvmlDeviceGetName(gpu), nvml.nvmlSystemGetDriverVersion(), f"{cuda // 1000}.{cuda % 1000 // 10}"


def memory_in_use() -> int | None:
    """Bytes in use on the first GPU by all processes, or None without one."""
    with _first_gpu() as (nvml, gpu):
        return None if gpu is None else nvml.nvmlDeviceGetMemoryInfo(gpu).used
