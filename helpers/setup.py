"""Packages a notebook needs, installed on hosted notebooks (Colab) without touching the torch that is already there."""

import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
BASE = ("transformers", "accelerate", "psutil", "filelock", "platformdirs", "gguf", "pandas", "matplotlib", "ipywidgets", "nbformat")


def pins():
    """{package: version} of requirements.txt, empty when helpers was installed without its checkout."""
    if not REQUIREMENTS.is_file():
        return {}
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", REQUIREMENTS.read_text(encoding="utf-8"), re.M))


def require(*packages):
    """Make sure that `packages` and the course's base are installed; install the pinned versions of those that are missing.

    Never installs or replaces torch or numpy under the running kernel: they are held at the version that is there. Says which
    already imported packages changed and need a restart of the runtime. In notebooks it first defines `%explain` for errors to come.
    """
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        from helpers import explain

        explain.register()
    if importlib.util.find_spec("torch") is None:
        raise ImportError("torch is not installed here. In the course's folder, run `make run`, or `pip install -r requirements.txt`.")
    missing = [name for name in dict.fromkeys((*BASE, *packages)) if _version(name) is None or _too_old(name)]
    if not missing:
        return
    held = [f"{name}=={_version(name)}" for name in ("torch", "numpy") if _version(name)]
    wanted = [f"{name}=={pins()[name]}" if name in pins() else name for name in missing]
    print("Installing", ", ".join(wanted), "(once per runtime) ...")
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted, *held], capture_output=True, text=True)
    if done.returncode:
        raise ImportError(f"pip could not install {', '.join(wanted)}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    loaded = [name for name in missing if name.replace("-", "_") in sys.modules]
    if loaded:
        raise ImportError(f"{', '.join(loaded)} was in use and has been replaced: restart the runtime (Runtime > Restart), then run all cells again.")


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _too_old(name):
    """True for a transformers before major 5: chat templates and quantization arguments changed there."""
    return name == "transformers" and int(_version(name).split(".")[0]) < 5
