"""Memory: what a block of code used, what a model weighs, and what it will need before it is loaded."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from helpers.prediction.predict import Prediction, predict  # noqa: F401 - memory.predict is the public name
from helpers.process import child_environment

if TYPE_CHECKING:
    import torch


@dataclass
class Usage:
    """Filled in while and after a `track()` block runs. Bytes, and seconds.

    ram is resident memory (RSS), which counts pages of a mapped file once they are touched; own is the part of it that no file
    backs, which the system cannot take back (where it tells them apart: Linux); vram is what torch allocated.
    """

    start_ram: int
    peak_ram: int = 0
    end_ram: int = 0
    start_own: int = 0
    peak_own: int = 0
    peak_vram: int = 0
    seconds: float = 0.0

    @property
    def gained_ram(self) -> int:
        """Bytes by which the block's peak stood above its start."""
        return self.peak_ram - self.start_ram

    @property
    def gained_own(self) -> int:
        """As `gained_ram`, without the pages of mapped files."""
        return self.peak_own - self.start_own


@contextmanager
def track(interval: float = 0.01, process: psutil.Process | None = None, children: bool = False) -> Iterator[Usage]:
    """Measure the RAM and VRAM peak of a block: `with track() as used: ...; used.peak_ram`.

    RAM is sampled every `interval` seconds in a thread; VRAM is torch's own high-water mark. With `children`, the RAM of the
    child processes is measured instead (a notebook's kernel is a child of the process that executes it); a peak then counts if
    two samples in a row saw it: a child that is about to start another program still has its parent's pages and would count twice.
    """
    process = process or psutil.Process()
    used = Usage(start_ram=resident(process, children), start_own=own(process))
    used.peak_ram, used.peak_own = used.start_ram, used.start_own
    done = threading.Event()

    def sample():
        before = used.start_ram
        while not done.wait(interval):
            now = resident(process, children)
            used.peak_ram = max(used.peak_ram, min(before, now) if children else now)
            used.peak_own = max(used.peak_own, own(process))
            before = now

    gpu = cuda()
    if gpu:
        gpu.synchronize()
        gpu.reset_peak_memory_stats()
    thread = threading.Thread(target=sample, daemon=True)
    started = time.perf_counter()
    thread.start()
    try:
        yield used
    finally:
        if gpu:
            gpu.synchronize()
            used.peak_vram = gpu.max_memory_allocated()
        used.seconds = time.perf_counter() - started
        done.set()
        thread.join()
        used.end_ram = resident(process, children)
        used.peak_ram = max(used.peak_ram, used.end_ram)
        used.peak_own = max(used.peak_own, own(process))


def peaks(program: str, call: str, runs: int = 5) -> list[Usage]:
    """What `call`, a Python expression, takes after `program`, measured by `track` in `runs` new processes, one after the other.

    One process tells little about a peak: which tensors are loaded at the same moment, and how much of what is freed the allocator
    keeps, differ from run to run. Raises RuntimeError with the end of the error output if a process fails.
    """
    code = (
        f"{program}\nimport dataclasses, json\nfrom helpers import memory\n"
        f"with memory.track(interval=0.002) as used:\n    kept = {call}\n"
        "print(json.dumps(dataclasses.asdict(used)))"
    )
    found = []
    for _ in range(runs):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_environment())
        if done.returncode:
            raise RuntimeError(f"a process that was to be measured failed: {done.stderr[-1000:]}")
        found.append(Usage(**json.loads(done.stdout.splitlines()[-1])))
    return found


def resident(process: psutil.Process | None = None, children: bool = False) -> int:
    """Resident bytes of a process, or with `children` of all its descendants together; 0 if it is gone.

    Descendants map the same libraries and files. So their own pages add up, and of file-backed ones those of the process that
    maps the most count, once (Linux; elsewhere the parts are not known and all add up).
    """
    process = process or psutil.Process()
    try:
        family = process.children(recursive=True) if children else [process]
    except psutil.NoSuchProcess:
        return 0
    pages = [_pages(member) for member in family]
    return sum(private for private, _ in pages) + max((shared for _, shared in pages), default=0)


def own(process: psutil.Process | None = None) -> int:
    """Resident bytes of a process that no file backs; 0 if it is gone."""
    return _pages(process or psutil.Process())[0]


def _pages(process):
    """(resident bytes without a file behind them, those with one) of a process; zeros if it is gone."""
    try:
        info = process.memory_info()
    except psutil.NoSuchProcess:
        return 0, 0
    shared = getattr(info, "shared", 0)
    return info.rss - shared, shared


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of everything a torch model keeps: parameters, buffers, and the constants of quantized layers. Shared storage counts once.

    Knows the places where libraries put quantization constants: bitsandbytes (`quant_state`, `SCB`), tensor subclasses
    (torchao), and the packed parameters of torch.ao's quantized modules.
    """
    tensors = [*model.parameters(), *model.buffers()]
    storages = dict(place for tensor in tensors for place in _storages(tensor))
    return sum(storages.values()) + sum(map(_packed_bytes, model.modules()))


def _storages(tensor) -> Iterator[tuple[object, int]]:
    """(identity, bytes) of each storage behind a tensor, its quantization constants included."""
    if tensor is None:
        return
    if hasattr(tensor, "__tensor_flatten__"):  # a tensor subclass, made of others
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    elif tensor.is_quantized:
        yield id(tensor), tensor.numel() * tensor.element_size()
        for constant in _channel_constants(tensor):
            yield from _storages(constant)
    else:
        storage = tensor.untyped_storage()
        known = (str(tensor.device), storage.data_ptr()) if storage.data_ptr() else id(tensor)
        yield known, storage.nbytes()
        yield from _state_storages(getattr(tensor, "quant_state", None))
        yield from _storages(getattr(tensor, "SCB", None))


def _state_storages(state) -> Iterator[tuple[object, int]]:
    """As `_storages`, of a bitsandbytes QuantState; with double quantization it holds a second one."""
    while state is not None:
        for name in ("absmax", "code", "offset"):
            value = getattr(state, name, None)
            if hasattr(value, "untyped_storage"):
                yield from _storages(value)
        state = getattr(state, "state2", None)


def _channel_constants(tensor):
    """Scales and zero points of a torch.ao tensor that is quantized by channel; of one number each, none."""
    per_channel = "channel" in str(tensor.qscheme())
    return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()] if per_channel else []


def _packed_bytes(module) -> int:
    """Bytes of the packed parameters of one of torch.ao's quantized modules; 0 for any other."""
    if not callable(getattr(module, "_weight_bias", None)) or getattr(module, "weight", None) is None:
        return 0
    weight, bias = module._weight_bias()
    constants = [*_channel_constants(weight), *([] if bias is None else [bias])]
    return weight.numel() * weight.element_size() + sum(constant.nbytes for constant in constants)


def cache_bytes(past_key_values: Any) -> int:
    """Bytes of a transformers KV cache (a `Cache` whose layers have keys and values)."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in past_key_values.layers if layer.keys is not None)


def cuda() -> Any:
    """torch.cuda if torch is already imported and sees a GPU, else None: asking must not import torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def release() -> None:
    """Collect garbage and give freed memory back: glibc keeps freed heap pages, torch keeps freed VRAM, and the next model counts twice."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    if gpu := cuda():
        gpu.empty_cache()


CAP = "COURSE_VRAM_CAP"  # environment variable by which `python -m helpers run --cap 24GB` reaches every notebook's kernel
UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as "24GB", "16 GiB" or "500MB" (decimal and binary units, as they are written)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)\s*", str(text).upper())
    if not match or match[2] not in UNITS or not float(match[1]):
        raise ValueError(f'a size is a number and one of MB, GB, MiB, GiB, such as "24GB"; got {text!r}')
    return int(float(match[1]) * UNITS[match[2]])


def cap_vram(limit: int | None = None) -> int | None:
    """Let torch take at most `limit` bytes of each GPU from now on, as if the card were smaller; the cap in bytes, or None.

    Without an argument, the cap is what `--cap` asked for. What does not fit raises torch.OutOfMemoryError, as on the smaller
    card. A real card also holds the driver's context, some 0.5 GB, which torch does not count. Nothing happens without a GPU.
    """
    if limit is None and os.environ.get(CAP):
        limit = parse_size(os.environ[CAP])
    if not limit:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    for index in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), index)
    return limit


def free_vram() -> int:
    """Bytes torch may still take of the first GPU, under a cap those of the smaller card; 0 without a GPU."""
    if not (gpu := cuda()):
        return 0
    free, _ = gpu.mem_get_info()
    return min(free, parse_size(os.environ[CAP]) - gpu.memory_allocated()) if os.environ.get(CAP) else free


RAM_CAP = "COURSE_RAM_CAP"  # environment variable: a size that this process shall not grow beyond, such as "8GB"


def free_ram() -> int:
    """Bytes this process may still take: what the system has available, or less where COURSE_RAM_CAP, a container or `ulimit -v` caps it."""
    available = psutil.virtual_memory().available
    if os.environ.get(RAM_CAP):
        available = max(0, min(available, parse_size(os.environ[RAM_CAP]) - resident()))
    if sys.platform == "linux":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            available = max(0, min(available, limit - psutil.Process().memory_info().vms))
    try:
        with open("/sys/fs/cgroup/memory.max") as cap, open("/sys/fs/cgroup/memory.current") as now:
            return min(available, int(cap.read()) - int(now.read()))
    except (OSError, ValueError):  # not in a container, or without a cap ("max")
        return available
