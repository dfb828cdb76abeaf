"""What the first cell of every notebook calls: `helpers` importable, packages installed where they are missing (Colab), `%explain` defined."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
BASE = (
    "transformers",
    "accelerate",
    "psutil",
    "filelock",
    "platformdirs",
    "gguf",
    "pandas",
    "matplotlib",
    "ipywidgets",
    "nbformat",
)
# Hosted notebooks bring packages along. One that is older than this is replaced by the pinned version; anything else stays.
OLDEST = {
    "transformers": "5",  # chat templates and quantization arguments changed with major 5
    "accelerate": "1.1",  # transformers 5 asks for it
    "peft": "0.20",  # transformers 5.23 asks for it
    "torchao": "0.18",  # peft refuses much older ones with an error; this one was measured
    "bitsandbytes": "0.49",  # the first with NF4 on a CPU
}
# The pinned versions import names that torch has since then; torch is the runtime's, and what decides is said before anything is installed.
NEEDS_TORCH = {"torchao": "2.10", "compressed-tensors": "2.10"}
_replaced = set()  # in this process: imported before they were replaced


class RestartNeeded(ImportError):
    """A package in use was replaced: the process still has the old one, whatever is imported now. The message says what to do."""


def pins() -> dict[str, str]:
    """{package: version} of requirements.txt, empty when helpers was installed without its checkout."""
    if not REQUIREMENTS.is_file():
        return {}
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", REQUIREMENTS.read_text(encoding="utf-8"), re.M))


def start(*packages: str) -> None:
    """Prepare this notebook's process: import path, threads, `%explain`, packages, and the GPU memory it may take.

    The first cell runs this file by its path, because another package may be called `helpers`: the course's comes first on the
    path, and one that was imported already is forgotten. Raises RestartNeeded as `require` does.
    """
    course = Path(__file__).resolve().parent.parent
    sys.path[:] = [str(course), *(entry for entry in sys.path if entry != str(course))]
    loaded = sys.modules.get("helpers")
    if loaded is not None and Path(loaded.__file__ or "").parent != course / "helpers":
        for name in [name for name in sys.modules if name.partition(".")[0] == "helpers"]:
            del sys.modules[name]
    from helpers import bootstrap, process

    process.prepare()
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
        shell.extension_manager.load_extension("helpers.diagnosis")
    bootstrap.require(*packages)
    from helpers import memory  # needs psutil, which may just have been installed

    memory.cap_vram()


def require(*packages: str) -> None:
    """Make sure that `packages` and the course's base are installed; install the pinned versions of those that are missing or too old.

    torch is never replaced under the running kernel, numpy only where a package excludes the one that is there. Raises RestartNeeded
    when, and only when, this process has imported a package (or a dependency) in a version that is no longer the installed one;
    again each time until the restart. A package that nobody has imported yet needs none.
    """
    if importlib.util.find_spec("torch") is None:
        raise ImportError(
            "torch is not installed here. In the course's folder, run `make run`, or `pip install -r requirements.txt`."
        )
    needed = dict.fromkeys((*BASE, *packages))
    torch = version("torch") or "99"  # a build without metadata says nothing; its imports will
    behind = [name for name in needed if _numbers(torch) < _numbers(NEEDS_TORCH.get(name, "0"))]
    if behind:
        raise ImportError(
            f"This runtime has torch {torch}, and {' and '.join(behind)} of this notebook need {NEEDS_TORCH[behind[0]]} or newer. "
            f"Run `%pip install torch=={pins().get('torch', NEEDS_TORCH[behind[0]])}`, restart the session, then run all cells again."
        )
    wanted = [
        f"{name}=={pins()[name]}" if name in pins() else name
        for name in needed
        if version(name) is None or _too_old(name)
    ]
    if wanted:
        before = _installed()
        _install(wanted)
        after = _installed()
        _replaced.update(_in_use(name for name, version in before.items() if after.get(name, version) != version))
    changed = sorted(_replaced | {name for name in needed if _differs(name)})
    if changed:
        raise RestartNeeded(
            f"{', '.join(changed)}: this process has imported a version that has been replaced since. Restart it (Colab: Runtime > Restart "
            "session; Jupyter: Kernel > Restart), then run all cells again. Nothing will be installed a second time."
        )


def _install(wanted):
    print("Installing", ", ".join(wanted), "(once per runtime) ...")
    # auto-gptq has no wheel for Python 3.12: without its CUDA part it builds where no compiler and no torch are at hand
    env = {"BUILD_CUDA_EXT": "0"} | os.environ
    for holding in (("torch", "numpy"), ("torch",)):
        held = [f"{name}=={version(name)}" for name in holding if version(name)]
        command = [sys.executable, "-m", "pip", "install", "--quiet", *wanted, *held]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode == 0:
            importlib.invalidate_caches()
            return
    raise ImportError(
        f"pip could not install {', '.join(wanted)}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    )


def version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _too_old(name):
    return name in OLDEST and _numbers(version(name)) < _numbers(OLDEST[name])


def _numbers(version):
    """(5, 1, 0) of "5.1+cpu"."""
    found = [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]
    return tuple([*found, 0, 0, 0][:3])


def _installed():
    """{distribution: version}; of two with one name the one that Python finds first."""
    found = {}
    for distribution in metadata.distributions():
        if distribution.metadata["Name"]:
            found.setdefault(distribution.metadata["Name"], distribution.version)
    return found


def _in_use(names):
    """Those of the distributions of which this process has imported a module."""
    modules = {}
    for module, distributions in metadata.packages_distributions().items():
        for name in distributions:
            modules.setdefault(name, set()).add(module)
    return {name for name in names if modules.get(name, set()) & sys.modules.keys()}


def _differs(name):
    """True if the imported module says it is another version than the installed one (somebody ran pip in between)."""
    imported = getattr(sys.modules.get(name.replace("-", "_")), "__version__", None)
    return isinstance(imported, str) and _numbers(imported) != _numbers(version(name) or imported)
