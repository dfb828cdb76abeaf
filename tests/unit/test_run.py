"""Executing notebooks: what papermill calls a success is looked at again, and one failure does not stop the rest."""

import argparse
import signal

import nbformat
import pytest
import written

from helpers import memory, records
from helpers.publishing import report, run


def notebook(tmp_path, *sources, name="99_test.ipynb"):
    return written.notebook(tmp_path / name, *sources)


def verdict(tmp_path, *sources, **options):
    return run.execute(notebook(tmp_path, *sources), tmp_path / "out" / "99_test.ipynb", **options)


@pytest.mark.integration
def test_a_good_notebook_is_ok_and_its_memory_is_measured(tmp_path):
    result = verdict(tmp_path, "block = bytearray(200_000_000); import time; time.sleep(0.3)", "print('done')")
    assert result.ok and result.notebook == "99_test"
    assert 200e6 < result.peak_ram_bytes < 900e6 and result.seconds > 0.3


@pytest.mark.integration
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise ValueError('bits must be 2 to 8')", "cell 1: ValueError: bits must be 2 to 8"),
        ("import sys; sys.exit(0)", "stopped early: 1 code cells did not run"),
        pytest.param(
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "the kernel died",
            marks=pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows"),
        ),
    ],
)
def test_causes_are_named(tmp_path, source, expected):
    result = verdict(tmp_path, source, "print('never')")
    assert not result.ok and result.verdict.startswith(expected), result.verdict


@pytest.mark.integration
def test_a_cell_that_never_ends(tmp_path):
    result = verdict(tmp_path, "while True: pass", timeout=3)
    assert result.verdict == "a cell took longer than 3 s"


@pytest.mark.integration
def test_the_environment_is_as_before(tmp_path, monkeypatch):
    import os

    before = dict(os.environ)
    verdict(tmp_path, "import os; assert os.environ['TQDM_DISABLE'] == '1'")
    assert dict(os.environ) == before


@pytest.mark.integration
def test_a_kernel_in_batch_has_a_readers_allocator_and_ends_as_it_likes(tmp_path):
    source = (
        "import atexit, os, pathlib\n"
        f"atexit.register(pathlib.Path({str(tmp_path / 'ended')!r}).touch)\n"
        "assert not [name for name in os.environ if 'MALLOC' in name or 'TUNABLES' in name]"
    )
    assert verdict(tmp_path, source).ok
    assert (tmp_path / "ended").exists(), "the kernel was killed"


@pytest.mark.integration
def test_one_failure_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    from helpers.publishing import pages

    paths = [
        notebook(tmp_path, source, name=name) for name, source in (("01_bad.ipynb", "1/0"), ("02_good.ipynb", "1"))
    ]
    monkeypatch.setattr(pages, "paths", lambda: paths)
    results = run.run(output_dir=str(tmp_path / "build"))
    assert [result.ok for result in results] == [False, True]
    printed, complaints = capfd.readouterr()
    assert "encryption" not in complaints, "the kernels' messages could be read on this machine"
    assert "ZeroDivisionError" in printed and "1 of 2 ok" in printed and printed.rstrip().endswith("report.html")


@pytest.mark.integration
def test_cap_reaches_the_kernel(tmp_path, monkeypatch, capsys):
    from helpers.publishing import pages

    source = f"import os; assert os.environ['{memory.CAP}'] == '24GB'"
    path = notebook(tmp_path, source, name="01_capped.ipynb")
    monkeypatch.setattr(pages, "paths", lambda: [path])
    capped = run.run(output_dir=str(tmp_path / "build"), cap="24GB")
    plain = run.run(output_dir=str(tmp_path / "build"))
    assert capped[0].ok and "KeyError" in plain[0].verdict, (capped, plain)
    capsys.readouterr()


def test_a_cap_that_is_no_size_stops_before_any_notebook(monkeypatch):
    monkeypatch.setattr(run, "execute", lambda *_, **__: pytest.fail("a notebook ran"))
    with pytest.raises(ValueError, match="such as \"24GB\"; got '24'"):
        run.run(only=["00"], cap="24")


def test_no_such_notebook():
    with pytest.raises(ValueError, match="no notebook begins with 77"):
        run.run(only=["77"])


@pytest.mark.integration
def test_no_widget_is_committed(tmp_path):
    """Of a widget with a static twin the twin stays, and the notebook holds no state."""
    source = (
        "import ipywidgets\n"
        "class Both:\n"
        "    def _repr_mimebundle_(self, **_):\n"
        "        return {**ipywidgets.HTML('live')._repr_mimebundle_(), 'text/html': '<p>twin</p>', 'text/plain': 'twin'}\n"
        "Both()"
    )
    path = notebook(tmp_path, source)
    result = run.execute(path, tmp_path / "out.ipynb")
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert (
        "widgets" in executed.metadata
        and "application/vnd.jupyter.widget-view+json" in executed.cells[0].outputs[0].data
    )
    run.commit_outputs(path, tmp_path / "out.ipynb", result, disk=0)
    committed = nbformat.read(path, as_version=4)
    assert "widgets" not in committed.metadata and "tags" not in committed.cells[0].metadata
    assert dict(committed.cells[0].outputs[0].data) == {"text/html": "<p>twin</p>", "text/plain": "twin"}


def test_streams_are_merged():
    piece = lambda text: nbformat.v4.new_output("stream", name="stdout", text=text)  # noqa: E731
    picture = nbformat.v4.new_output("display_data", data={"text/plain": "x"})
    merged = run.merged([piece("a"), piece("b"), picture, piece("c")])
    assert [output.get("text") for output in merged] == ["ab", None, "c"]


def test_report_is_one_page_that_escapes_what_it_shows(tmp_path):
    from test_records import FOUND, NUMBERS

    for method, kl in (("fp32", 0.0), ("nf4", 0.3)):
        records.write(
            tmp_path,
            method=method,
            notebook="04",
            found=FOUND,
            **{**NUMBERS, "kl_divergence": kl, "decode_tokens_per_s": None},
        )
    path = report.write(tmp_path, [run.Result("04", 1.0, 10**9, "cell 1: <script>alert(1)</script>")])
    page = path.read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "nf4" in page and "–" in page and "KL divergence from the untouched model" in page
    assert "http" not in page, "the page must be readable without a network"


def test_gpu_memory_is_what_the_driver_says(monkeypatch):
    import time

    from helpers import driver

    monkeypatch.setattr(driver, "memory_in_use", lambda: None)
    with run.gpu_memory(0.01) as before:
        time.sleep(0.1)
    monkeypatch.setattr(driver, "memory_in_use", lambda: 2048 * 2**20)
    with run.gpu_memory(0.01) as samples:
        time.sleep(0.3)
    assert not before and max(samples) == 2048 * 2**20


def test_the_driver_is_asked_for_the_first_visible_gpu(monkeypatch):
    import pynvml

    from helpers import driver

    class Memory:
        used = 7

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda number: ("index", number))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda name: ("name", name))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda gpu: f"GPU {gpu}")
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.1")
    monkeypatch.setattr(pynvml, "nvmlSystemGetCudaDriverVersion_v2", lambda: 12040)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda gpu: Memory)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert driver.describe() == ("GPU ('index', 1)", "580.1", "12.4") and driver.memory_in_use() == 7
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc")
    assert driver.describe()[0] == "GPU ('name', 'GPU-abc')"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert driver.describe()[0] == "GPU ('index', 0)"


@pytest.mark.integration
def test_what_a_run_cost_is_kept_beside_its_report(tmp_path, monkeypatch):
    import json

    from helpers.publishing import pages

    path = notebook(tmp_path, "print(1)")
    monkeypatch.setattr(pages, "paths", lambda: [path])
    (result,) = run.run(output_dir=str(tmp_path / "build"))
    kept = json.loads((tmp_path / "build" / "runs.json").read_text())
    assert kept["results"][0]["seconds"] == result.seconds and kept["results"][0]["verdict"] == "ok"


@pytest.mark.parametrize(
    "text, value",
    [
        ("4", 4), ("-1", -1), ("2e-5", 2e-5), ("0.00002", 2e-5), ("True", True), ("None", None), ("[1.0, 0.5]", [1.0, 0.5]),
        ("kl_divergence", "kl_divergence"), ("all-linear", "all-linear"), ("owner/name", "owner/name"), ("", ""), ("008", "008"),
        ("{'a': 1}", "{'a': 1}"), ("1-2", "1-2"), ("/data/file.txt", "/data/file.txt"), ("'quoted'", "'quoted'"),
    ],
)  # fmt: skip
def test_what_a_parameter_on_the_command_line_means(monkeypatch, text, value):
    """`-p learning_rate=2e-5` once reached the notebook as a text."""
    seen = {}
    monkeypatch.setattr(run, "run", lambda only, output, parameters, *_: seen.update(parameters) or [])
    arguments = argparse.Namespace(
        parameter=[f"name={text}"], model="auto", only=None, output="build", timeout=1, in_place=False, cap=None
    )
    assert run.main(arguments) == 0 and seen == {"name": value} and type(seen["name"]) is type(value)
