"""Whose file is it: an installed library's, Python's own, or the reader's? A path in a traceback says so.

    package("/x/lib/python3.12/site-packages/peft/utils/other.py")     # "peft"
    package("/home/me/train.py")                                       # ""
    installed("/tmp/site/peft/utils/other.py")                         # True after `pip install --target /tmp/site peft`

`pip install --target FOLDER` leaves no `site-packages` in its paths. There the list of files counts that pip writes beside each package
(FOLDER/peft-0.21.2.dist-info/RECORD). A path of another machine cannot be looked up: `package` and `installed` say what they accept then.
Nothing here imports a library. Paths come from pasted texts: no network share is asked for one.
"""

import functools
import itertools
import os
import re
import sys
from pathlib import Path

PYTHON = "python"  # the package of a frame in the standard library
REMOTE = "transformers_modules"  # the checkpoint's own code, fetched with trust_remote_code
LIBRARIES = set(
    "accelerate auto_gptq awq axolotl bitsandbytes datasets deepspeed diffusers flash_attn gguf gptqmodel huggingface_hub jupyter_client "
    "kernels llama_cpp llmcompressor nbclient nbconvert numpy optimum papermill peft safetensors tokenizers torch torchao torchvision "
    "transformers triton trl unsloth vllm xformers".split()
)
_CHECKOUTS = {
    "awq": "autoawq",
    "torchao": "ao",
    "torch": "pytorch",
    "auto_gptq": "autogptq",
    "gguf": "gguf-py",
    "llama_cpp": "llama-cpp-python",
}
_COMMON = {"awq", "datasets", "gguf", "kernels"}  # a folder of a project may have such a name, too
_PACKAGES = re.compile(r"(?:site|dist)-packages[/\\](?=([\w.-]+)(?:[/\\]([\w.-]+))?)")
_STANDARD = re.compile(r"[/\\]lib(?:64)?[/\\]python\d[\d.]*[/\\]|python[^/\\]*[/\\]lib[/\\]|^<frozen ", re.I)
# A package beside Python's own modules: nobody writes code there.
_VERSIONED = re.compile(r".*[/\\]lib(?:64)?[/\\]python\d[\d.]*[/\\](\w+)[/\\]")
# Where readers keep their own code; a path without a root is below the folder they work in.
_HOME = re.compile(
    r"(?![/\\]|[A-Z]:[/\\])|[/\\](?:home|root|users|volumes|workspaces?|content|kaggle|mnt|data|app|code|src)[/\\]|[A-Z]:[/\\]users[/\\]",
    re.I,
)
_NAMESPACES = {"google", "nvidia"}
_ENTRIES = 5000  # looked at in a folder: one that holds packages has hundreds, one with data may have millions


def package(path: str) -> str:
    """The import name of the package that a file belongs to: PYTHON for the standard library, "" for the reader's own code."""
    if found := _PACKAGES.search(path):
        return _named(found[1], found[2] or "")
    if REMOTE in path:
        return REMOTE
    if tail := _recorded(path):
        return _named(*(*tail.split("/"), "")[:2])
    if (found := _VERSIONED.match(path)) and found[1] in LIBRARIES:
        return found[1]
    if _STANDARD.search(path):
        return PYTHON
    parts = re.split(r"[/\\]", path)
    if parts[-1].startswith("convert_hf_to_gguf"):
        return "gguf"
    if parts[0] in LIBRARIES and len(parts) > 1:
        return parts[0]
    # A source checkout has the package below a folder like it: transformers/src/transformers, AutoAWQ/awq.
    for parent, name in zip(parts, parts[1:-1], strict=False):
        if name in LIBRARIES and parent.lower() in ("src", name, _CHECKOUTS.get(name)):
            return name
    # On another machine FOLDER may be anywhere: the package installed here has the same file.
    for place, name in enumerate(parts[:-2]):
        if name in LIBRARIES and _has_file("/".join(parts[place:])):
            return name
    if len(parts) > 1 and parts[-2] in ("bin", "Scripts") and not parts[-1].endswith(".py"):
        return PYTHON  # the script that a launcher was started by
    return ""


def installed(path: str, module: str = "") -> bool:
    """Whether a file is an installed library's, and not the reader's own. module: the dotted name that Python gives beside the path.

    A file of this machine must lie below site-packages or dist-packages, or stand in a RECORD. A path of another machine counts only
    for a library known by name, if path and name agree: below lib/pythonX.Y, or deep inside a package that has the same file here.
    """
    if _PACKAGES.search(path) or _recorded(path):
        return True
    name, inside = module.partition(".")[0], module.replace(".", "/")
    if name not in LIBRARIES or _exists(path):
        return False
    plain = path.replace("\\", "/")
    tail = next((tail for tail in (f"{inside}.py", f"{inside}/__init__.py") if plain.endswith(f"/{tail}")), "")
    if (found := _VERSIONED.match(path)) and found[1] == name and "/" in tail:
        return plain == f"{plain[: found.end() - len(name) - 1]}{tail}"
    return tail.count("/") > 1 and name not in _COMMON and not _HOME.match(path) and _has_file(tail)


def inside(path: str) -> str:
    """The path from the package on, where that is certain; else the path as it is."""
    if found := _PACKAGES.search(path):
        return path[found.end() :].replace("\\", "/")
    return _recorded(path) or path


def _named(first, second):
    first, second = first.removesuffix(".py"), second.removesuffix(".py")
    return f"{first}.{second}" if first in _NAMESPACES and second else first


def _exists(path):
    # A share of a network would be asked with the reader's name and password.
    return not path.startswith(("//", "\\\\")) and os.path.isfile(os.path.expanduser(path))


def _recorded(path):
    """The path from the package on, if the folder above holds a RECORD that lists this file; else ""."""
    if not _exists(path):
        return ""
    file = Path(os.path.expanduser(path))
    tails = ((folder, file.relative_to(folder).as_posix()) for folder in file.parents)
    return next((tail for folder, tail in tails if _lists(str(folder), tail)), "")


def _has_file(tail):
    """Whether a package that is installed here has this file."""
    folders = (folder for folder in sys.path if os.path.isfile(os.path.join(folder, tail)))
    return ".." not in tail and any(folder.endswith("-packages") or _lists(folder, tail) for folder in folders)


def _lists(folder, tail):
    """Whether a distribution in this folder lists the file in its RECORD."""
    try:
        return _listed(folder or ".", os.stat(folder or ".").st_mtime_ns, tail)
    except OSError:
        return False


@functools.lru_cache(1024)
def _listed(folder, _changed, tail):
    name = tail.partition("/")[0].removesuffix(".py").lower()
    with os.scandir(folder) as entries:
        names = [entry.name for entry in itertools.islice(entries, _ENTRIES) if entry.name.endswith(".dist-info")]
    # Read the distribution first that is called like the package.
    names.sort(key=lambda entry: not entry.lower().startswith(f"{name}-"))
    return any(_reads(os.path.join(folder, entry, "RECORD"), tail) for entry in names)


def _reads(record, tail):
    try:
        with open(record, "rb") as file:
            return f"\n{tail},".encode() in b"\n" + file.read()
    except OSError:
        return False
