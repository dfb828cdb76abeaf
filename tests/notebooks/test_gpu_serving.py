"""The committed results of vLLM: their form, what the sentences about them claim, and that the READMEs tell just them."""

import json
import re
import sys
import time
from datetime import date
from pathlib import Path

import pytest
from conftest import ROOT

FOLDER = ROOT / "notebooks" / "gpu"
sys.path.insert(0, str(FOLDER))
import serve  # noqa: E402
import serving  # noqa: E402
import two_gpus  # noqa: E402

RECORD, LARGER, BESIDE = (serving.read(FOLDER / f"{name}.json") for name in ("serving", "serving_7b", "side_by_side"))
TWO = two_gpus.read()
REFUSED = "refused", "refused, said to be symmetric"


def test_form():
    facts = {
        "device",
        "vram_bytes",
        "driver",
        "date",
        "command",
        "model",
        "versions",
        "protocol",
        "checkpoints",
        "lean",
    }
    assert RECORD.keys() == facts | serve.ROWS.keys() and serve.ROWS.keys() == {*serving.BITS, *REFUSED}
    assert date.fromisoformat(RECORD["date"]) and RECORD["device"].startswith("NVIDIA")
    assert not re.search(r"/(home|root|work|tmp|usr)/", json.dumps(RECORD)), "a machine's path"
    assert RECORD["protocol"]["requests"] == [*serve.BATCHES] and RECORD["protocol"]["greedy_tokens"] == serve.GREEDY


@pytest.mark.parametrize("name", serving.BITS)
def test_a_row(name):
    row, answer = RECORD[name], RECORD["protocol"]["new_tokens"]
    speeds = [found["tokens_per_s"] for found in row["requests"].values()]
    assert [*row["requests"]] == [str(n) for n in serve.BATCHES] and speeds == sorted(speeds)
    for requests, found in row["requests"].items():
        whole = int(requests) * answer / found["tokens_per_s"]
        decode = int(requests) * (answer - 1) / (whole - found["first_token_s"])
        assert decode == pytest.approx(found["decode_tokens_per_s"], rel=1e-3), "three figures of one time"
    compared = row["transformers"]
    assert len(compared["same_tokens"]) == len(serve.PROMPTS)
    places = [
        (prompt, n) for prompt, n in zip(serve.PROMPTS, compared["same_tokens"], strict=True) if n < compared["of"]
    ]
    assert [(found["prompt"], found["token"]) for found in compared["differences"]] == places


def test_weights_are_at_least_their_bits():
    layers, tables = 28 * (2 * 1536**2 + 2 * 256 * 1536 + 3 * 8960 * 1536), 2 * 151_936 * 1536
    for name, bits in serving.BITS.items():
        extra = RECORD[name]["weights_bytes"] - (layers * bits / 8 + tables * 2)
        assert 0 < extra < 0.15e9, name  # scales and what else loading allocates


def test_what_the_sentences_say_without_a_number():
    for name in serving.FOUR:
        assert max(serving.times_bf16(RECORD, name).values()) < 1, "no 4-bit format is as fast as bf16"
    fp8 = serving.times_bf16(RECORD, "fp8")
    assert fp8["1"] > 1 and fp8["128"] > 1 and fp8["8"] < 1 and fp8["32"] < 1
    slowest = {n: min(serving.BITS, key=lambda name: serving.times_bf16(RECORD, name)[n]) for n in fp8}  # noqa: B023
    assert slowest["8"] == slowest["32"] == "bitsandbytes"
    assert "sym=False" in RECORD[REFUSED[0]]["failed"]
    reasons = " ".join(RECORD[REFUSED[1]]["reasons"])
    assert (
        "576 is not divisible by min_thread_k = 128" in reasons
        and "Output features size must be divisible by 128" in reasons
    )


def test_differences_are_found_and_shown():
    class Words:
        def decode(self, ids):
            return "-".join(map(str, ids))

    left = [[*range(serve.GREEDY)] for _ in range(2)]
    right = [left[0], [*range(30), 7, 8]]
    found = serve.differences(left, {"with": "bf16", "greedy": right, "gaps": [[0.5] * 32, [0.25] * 32]}, Words())
    assert found["same_tokens"] == [32, 30]
    (one,) = found["differences"]
    assert (one["token"], one["vllm"], one["transformers"], one["transformers_logit_gap"]) == (30, "30-31", "7-8", 0.25)


def test_the_readmes_say_what_the_file_says():
    texts = (
        (FOLDER, serving.section(RECORD, LARGER, BESIDE)),
        (ROOT, serving.headline(RECORD, LARGER)),
        (FOLDER, two_gpus.section(TWO, RECORD, BESIDE)),
    )
    for readme, text in texts:
        assert text in (readme / "README.md").read_text(encoding="utf-8"), "run `python notebooks/gpu/summary.py`"
    assert serving.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_the_larger_model_and_what_the_sentences_say_of_it():
    assert not re.search(r"/(home|root|work|tmp|usr)/", json.dumps([LARGER, BESIDE])), "a machine's path"
    layers, tables = 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096), 2 * 32_768 * 4096
    for name in serving.LARGER:
        scales = layers / 64 * 4 if name == "bitsandbytes" else 0
        extra = LARGER[name]["weights_bytes"] - (layers * serving.BITS[name] / 8 + tables * 2 + scales)
        assert 0 <= extra < 0.25e9, name
        assert [*LARGER[name]["requests"]] == [str(n) for n in serve.BATCHES]
    gptq, fp8, nf4 = (serving.times_bf16(LARGER, name) for name in ("gptq", "fp8", "bitsandbytes"))
    assert gptq["1"] == pytest.approx(1.30, abs=0.005), "notebook 12 says 1.30"
    assert min(gptq[n] for n in ("1", "8", "32")) > 1.1 and gptq["128"] == pytest.approx(1, abs=0.05)
    assert all(fp8[n] > gptq[n] for n in gptq) and max(nf4.values()) < 1
    here, there = LARGER["bf16"]["requests"], TWO["vllm"]["7b"]["bf16"]["requests"]
    apart = [abs(here[n]["tokens_per_s"] / there[n]["tokens_per_s"] - 1) for n in here]
    assert max(apart) < 0.02 and all(abs(fp8[n] / gptq[n] - 1) > max(apart) for n in gptq), "the order is sure"


def test_side_by_side():
    served, compiled = BESIDE["vllm"]["bf16"]["requests"], BESIDE["generate"]
    assert [*compiled] == ["1", "8", "32"] and {"idle_s", "token_s"} <= compiled["1"]["profile"].keys()
    for n, row in compiled.items():
        assert row["low"] <= row["tokens_per_s"] <= row["high"] < served[n]["tokens_per_s"]
    for row in BESIDE["lean"].values():
        assert all(found["low"] <= found["tokens_per_s"] <= found["high"] for found in row["requests"].values())


def test_processes_on_one_gpu():
    """Notebook 12: FSDP saves no memory with the 1.5B model, and the losses are the same."""
    runs = json.loads((ROOT / "notebooks" / "scale_out" / "shared_gpu.json").read_text(encoding="utf-8"))["runs"]
    assert [run["processes"] for run in runs.values()] == [1, 2, 2]
    assert runs["ddp"]["peak_vram_bytes"] < runs["fsdp"]["peak_vram_bytes"] < runs["one"]["peak_vram_bytes"]
    for run in runs.values():
        assert run["losses"] == pytest.approx(runs["one"]["losses"], abs=0.01)


def test_the_packages_are_those_of_the_environment_file():
    pinned = dict(
        re.findall(r"(?m)^([\w-]+)==([\d.]+)", (FOLDER / "requirements-serving.txt").read_text(encoding="utf-8"))
    )
    measured = {name: version for name, version in RECORD["versions"].items() if name in pinned}
    assert len(measured) > 6 and measured == {name: pinned[name] for name in measured}


def test_two_gpus_form_and_sentences():
    assert TWO["gpus"] == 2 and TWO["device"].startswith("NVIDIA") and date.fromisoformat(TWO["date"])
    assert not re.search(r"/(home|root|work|tmp|usr)/", json.dumps(TWO)), "a machine's path"
    seven = TWO["vllm"]["7b"]
    assert all(1.3 < factor < 1.6 for factor in two_gpus.gain(seven).values()), "notebook 12 says 1.4 to 1.5 times"
    one, two = (row["weights_bytes"] for row in seven.values())
    assert two == pytest.approx(one / 2, rel=0.01), "half of the weights is on each GPU"
    for row in (*seven.values(), *TWO["vllm"]["1.5b"].values()):
        assert [*row["requests"]] == [str(n) for n in serve.BATCHES]


def test_a_row_over_gpus_is_named_and_told_to_vllm(monkeypatch):
    monkeypatch.delenv(serve.CACHE, raising=False)
    assert serve.row_name("fp8", 1) == "fp8" and serve.row_name("fp8", 2) == "fp8 on 2 GPUs"
    alone, both = serve.engine_options("fp8"), serve.engine_options("fp8 on 2 GPUs")
    assert "tensor_parallel_size" not in alone and both["tensor_parallel_size"] == 2
    assert alone["quantization"] == both["quantization"] == "fp8"
    assert not any(both["compilation_config"]["pass_config"].values()), "these passes may use multicast"
    monkeypatch.setenv(serve.CACHE, "2.5")
    sized = serve.engine_options("bf16")
    assert sized["kv_cache_memory_bytes"] == 2_500_000_000 and sized["gpu_memory_utilization"] < 0.1
    assert alone["gpu_memory_utilization"] == 0.2, "the committed rows have a fifth of the GPU"
    assert serve.engine_options("refused, said to be symmetric")["compilation_config"] and serve.ROWS["bf16"][1] == {}


def test_a_step_that_hangs_is_ended_with_what_it_started(tmp_path, monkeypatch):
    """The engine's workers would keep the GPU: the whole session of processes goes."""
    script = tmp_path / "step.py"
    script.write_text(
        "import subprocess, sys, time\nprint(subprocess.Popen(['sleep', '600']).pid, flush=True)\ntime.sleep(600)\n"
    )
    monkeypatch.setattr(serve, "__file__", str(script))
    arguments = serve.argparse.Namespace(output=tmp_path / "out.json", timeout=2, cache_gb=None)
    assert serve.run("serve", "bf16", "-", arguments, "bf16") == {"failed": "took longer than 2 s"}
    pid = int((tmp_path / "out.bf16.log").read_text().split()[0])
    deadline = time.time() + 10
    while (
        Path(f"/proc/{pid}").exists()
        and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        and time.time() < deadline
    ):
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
