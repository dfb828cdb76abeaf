"""Memory: peaks are seen, predictions meet measurements, bad settings are named."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from helpers import memory, widgets
from helpers.prediction import cache_size, metamodel

SMALL = dict(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


PEAK = """
import time
from helpers import memory
with memory.track() as used:
    block = bytearray(300_000_000)
    time.sleep(0.1)
    del block
    time.sleep(0.05)
print(used.gained_ram, used.peak_ram - used.end_ram, used.seconds)
"""


@pytest.mark.integration
def test_track_sees_a_peak_that_is_gone_at_the_end():
    """In a process of its own: in this one, what earlier tests left may be freed in the same moment."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    gained, given_back, seconds = map(float, done.stdout.split())
    assert 250e6 < gained < 400e6 and given_back > 200e6 and seconds >= 0.15


@pytest.mark.integration
def test_own_memory_is_told_from_a_mapped_file(tmp_path):
    """A file of 100 MB is mapped and read, and 50 MB are allocated: the file's pages are resident, but not the process's own."""
    (tmp_path / "file").write_bytes(b"1" * 100_000_000)
    program = f"import mmap\nfile = open({str(tmp_path / 'file')!r}, 'rb')\nmapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)"
    found = memory.peaks(program, "(sum(mapped[::4096]), bytearray(b'1' * 50_000_000))", runs=2)
    assert len(found) == 2
    for used in found:
        assert used.gained_ram > 140e6 and (sys.platform != "linux" or 45e6 < used.gained_own < used.gained_ram - 90e6)


@pytest.mark.integration
def test_a_process_that_fails_is_not_a_peak():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        memory.peaks("", "1 / 0", runs=1)


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which pages a file backs")
def test_children_that_map_one_file_count_it_once(tmp_path):
    """In a process of its own: whatever other tests left running is no child of it."""
    (tmp_path / "file").write_bytes(b"1" * 200_000_000)
    child = (
        f"import mmap\nfile = open({str(tmp_path / 'file')!r}, 'rb')\nmapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "sum(mapped[::4096]); print('ready', flush=True); input()"
    )
    parent = (
        "import subprocess, sys\nfrom helpers import memory\n"
        f"run = lambda: subprocess.Popen([sys.executable, '-c', {child!r}], stdin=-1, stdout=-1, text=True)\n"
        "children = [run(), run()]\nready = [child.stdout.readline() for child in children]\n"
        "print(memory.resident(children=True))\n[child.communicate('\\n') for child in children]"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 200e6 < int(done.stdout) < 300e6


def test_track_reports_when_the_block_raises():
    with pytest.raises(KeyError):
        with memory.track() as used:
            raise KeyError
    assert used.peak_ram > 0 and used.seconds > 0


def test_a_child_that_is_about_to_start_another_program_does_not_count_twice(monkeypatch):
    """Between fork and exec it has its parent's pages: one sample sees the double, the next does not."""
    seen, done = iter([1, 3, 3, 6, 3, 1]), threading.Event()

    def resident(process, children):
        value = next(seen, None)
        if value is None:
            done.set()
        return value or 1

    monkeypatch.setattr(memory, "resident", resident)
    with memory.track(interval=0.001, children=True) as used:
        assert done.wait(10)
    assert used.peak_ram == 3


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_prediction_meets_measurement(net, dtype, bits):
    model = net if dtype == torch.float32 else type(net)(net.config).to(dtype)
    assert abs(memory.predict(net.config, bits=bits, rest_bits=bits).model / memory.weight_bytes(model) - 1) < 0.03


@pytest.mark.parametrize("double_quant", [True, False])
def test_prediction_meets_measurement_in_4_bits(found, double_quant):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant)
    model = AutoModelForCausalLM.from_pretrained(
        found.path, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    predicted = memory.predict(model.config, bits=4, group_size=64, scale_bits=32, double_quant=double_quant)
    assert abs(predicted.model / memory.weight_bytes(model) - 1) < 0.03


def test_kv_cache_prediction_is_exact(net):
    with torch.inference_mode():
        past = net(torch.arange(100)[None], use_cache=True, logits_to_keep=1).past_key_values
    assert memory.predict(net.config, context=100, cache_bits=32).kv_cache == memory.cache_bytes(past)


@pytest.mark.skipif(sys.platform == "darwin", reason="torch has no int8 engine on Apple silicon")
def test_weight_bytes_counts_torchs_packed_weights():
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert memory.weight_bytes(quantized) == 64 * 32


def test_weight_bytes_counts_tied_weights_once(net):
    assert memory.weight_bytes(net) < 1.01 * 4 * 134_515_008


@settings(deadline=None, max_examples=30)
@given(bits=st.sampled_from([2, 3, 4, 8, 16, 32]), more=st.integers(1, 4096), batch=st.integers(1, 8))
def test_more_bits_and_longer_contexts_never_need_less(bits, more, batch):
    config = LlamaConfig(**SMALL)
    base = memory.predict(config, bits=bits, context=128, batch=batch)
    assert memory.predict(config, bits=bits, context=128 + more, batch=batch).kv_cache > base.kv_cache
    assert base.total >= memory.predict(config, bits=2, context=128, batch=batch).total
    assert base.bits_per_weight >= bits * 0.99 or bits == 32


@pytest.mark.parametrize("bits", [0, 1, 9, 12, 64, "4", None])
def test_bits_outside_the_range_are_named(bits):
    with pytest.raises(ValueError, match="bits must be"):
        memory.predict(LlamaConfig(**SMALL), bits=bits)


CONFIGS = json.loads((Path(__file__).parent / "data" / "memory_configs.json").read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_real_configs(name):
    """Against published counts and, for the cache, the arithmetic of each architecture; the file says where each figure is from."""
    case = CONFIGS[name]
    found = memory.predict(
        AutoConfig.for_model(**case["config"]), **case.get("ask", {}), context=case.get("context", 0)
    )
    exact = lambda text: eval(text, {"__builtins__": {}}, case)  # noqa: E731, S307 - arithmetic of our own file
    assert found.parameters == pytest.approx(case["parameters"], rel=0.002)
    assert found.model == pytest.approx(exact(case.get("model", "2*parameters")), rel=0.002)
    assert found.kv_cache == exact(case.get("cache", "0"))
    said = " ".join(found.notes)
    if "says" in case:
        assert case["says"] in said


def test_blocks_that_are_alike_run_once():
    """mistral_large4 has room in its config for layers that share a cache, and none that does: 72 blocks, 4 kinds at most."""
    model, _ = metamodel.build(AutoConfig.for_model("mistral_large4"))
    repeats = cache_size._skip_repeated_blocks(model, model.config.get_text_config(decoder=True))
    assert repeats and len(repeats) <= 4 and sum(repeats.values()) == 72


@pytest.mark.integration
def test_repeated_blocks_change_nothing(monkeypatch):
    """A cache counted from one block of each kind is the cache of the whole model."""
    for name in ("gemma2", "qwen3_next", "gpt_oss", "falcon_h1", "deepseek_v3"):
        config = AutoConfig.for_model(name)
        quick = memory.predict(config, context=5000).kv_cache
        with monkeypatch.context() as patch:
            patch.setattr(cache_size, "_skip_repeated_blocks", lambda model, text: None)
            cache_size._cache_numbers.cache_clear()
            assert memory.predict(config, context=5000).kv_cache == quick
        cache_size._cache_numbers.cache_clear()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "falcon", "jamba", "gpt2"])
def test_cache_is_that_of_a_model_that_ran(kind):
    """The same tiny model with data: its cache after a prompt has the predicted size."""
    tiny = dict(vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    more = {
        "gpt2": {}, "falcon": {}, "llama": {"intermediate_size": 64, "num_key_value_heads": 2},
        "gemma3_text": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2},
        "jamba": {"intermediate_size": 64, "num_key_value_heads": 2, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
                  "use_mamba_kernels": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }[kind]  # fmt: skip
    config = AutoConfig.for_model(kind, **tiny, **more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        past = model(torch.arange(20)[None], use_cache=True).past_key_values
    states = lambda layer: [
        *getattr(layer, "conv_states", {}).values(),
        *getattr(layer, "recurrent_states", {}).values(),
    ]  # noqa: E731
    tensors = [
        t
        for layer in past.layers
        for t in (getattr(layer, "keys", None), getattr(layer, "values", None), *states(layer))
        if t is not None
    ]
    assert memory.predict(config, context=20).kv_cache == sum(tensor.nbytes for tensor in tensors)


def test_recurrent_states_do_not_grow():
    config = AutoConfig.for_model("mamba")
    assert memory.predict(config, context=10).kv_cache == memory.predict(config, context=100_000).kv_cache > 0


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({"model_type": "t5"}, {}, "encoder-decoder"),
        ({"model_type": "bert"}, {"context": 10}, "context=0"),
        ({"model_type": "siglip"}, {}, "no causal language model"),
        ({"model_type": "no-such-type"}, {}, "no-such-type"),
        ("mistralai/Mistral-7B-v0.1", {}, "AutoConfig.from_pretrained"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "aqlm"}}, {}, "'aqlm' is not counted here"),
        ({"model_type": "llama"}, {"bits": 4, "library": "ggml"}, "library must be one of"),
        ({"model_type": "llama"}, {"bits": 4, "group_size": 0}, "group_size must be above 0"),
    ],
)
def test_what_cannot_be_counted_is_refused_in_one_line(config, settings, message):
    with pytest.raises(ValueError, match=message) as raised:
        memory.predict(config, **settings)
    assert "\n" not in str(raised.value)


def test_negative_context():
    with pytest.raises(ValueError, match="context"):
        memory.predict(LlamaConfig(**SMALL), context=-1)


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("16 GiB", 16 * 2**30), ("1.5gb", 1_500_000_000), ("500MB", 500 * 10**6)]
)
def test_sizes(text, size):
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "-1GB", "0GB", "24TB", "2 4GB", "", None])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="a size is a number and one of MB, GB, MiB, GiB"):
        memory.parse_size(text)


class Gpus:
    """Stands for torch.cuda on a machine with two GPUs of 80 GB, where no GPU is."""

    def __init__(self):
        self.fractions = {}

    def is_available(self):
        return True

    def device_count(self):
        return 2

    def get_device_properties(self, index):
        return type("Properties", (), {"total_memory": 80 * 10**9})

    def set_per_process_memory_fraction(self, fraction, index):
        self.fractions[index] = fraction


def test_cap_holds_every_gpu_to_it(monkeypatch):
    gpus = Gpus()
    monkeypatch.setattr(torch, "cuda", gpus)
    monkeypatch.delenv(memory.CAP, raising=False)
    assert memory.cap_vram() is None and not gpus.fractions
    monkeypatch.setenv(memory.CAP, "24GB")
    assert memory.cap_vram() == 24 * 10**9 and gpus.fractions == {0: 0.3, 1: 0.3}
    assert memory.cap_vram(160 * 10**9) and gpus.fractions == {0: 1.0, 1: 1.0}, "no more than there is"


def test_free_vram_is_the_smaller_cards_under_a_cap(monkeypatch):
    monkeypatch.delenv(memory.CAP, raising=False)
    gpus = Gpus()
    gpus.mem_get_info, gpus.memory_allocated = lambda: (70 * 10**9, 80 * 10**9), lambda: 5 * 10**9
    monkeypatch.setattr(torch, "cuda", gpus)
    assert memory.free_vram() == 70 * 10**9
    monkeypatch.setenv(memory.CAP, "24GB")
    assert memory.free_vram() == 19 * 10**9
    gpus.is_available = lambda: False
    assert memory.free_vram() == 0


def test_the_first_cell_of_a_notebook_applies_the_cap(monkeypatch):
    from helpers import bootstrap

    monkeypatch.setattr(bootstrap, "require", lambda *_: None)
    monkeypatch.setenv(memory.CAP, "much")
    with pytest.raises(ValueError, match="got 'much'"):
        bootstrap.start()


def test_monitor_reads_and_degrades_to_text(monkeypatch):
    monitor = widgets.Monitor(interval=0.01).start()
    time.sleep(0.05)
    monitor.stop()
    assert "widget-view" in str(monitor._repr_mimebundle_())
    monkeypatch.setenv("COURSE_BATCH", "1")
    bundle = monitor._repr_mimebundle_()
    assert set(bundle) == {"text/plain"} and bundle["text/plain"].startswith("RAM ")


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim belongs to glibc")
def test_release_gives_freed_pages_back():
    blocks = [bytearray(b"x" * 100_000) for _ in range(2_000)]  # too small for a mapping of their own
    cycle = [blocks.pop()]
    cycle.append(cycle)  # the last block, at the end of the heap, keeps what is below it from being returned
    full = memory.resident()
    del blocks
    memory.release()
    assert full - memory.resident() > 150e6
    del cycle
    memory.release()
