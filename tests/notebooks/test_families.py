"""The notebooks on models of other families: each runs, or refuses in one line before the long work."""

import re

import families
import nbformat
import pytest
from conftest import ROOT

from helpers.publishing import run

pytestmark = pytest.mark.slow

NOTEBOOKS = {
    "00_start_here": {},
    "03_hybrid_precision": {"layers_per_block": 1},
    "04_nf4_bitsandbytes": {},
    "05_gptq": {"calibration_samples": 4},
    "06_awq": {},
    "07_qlora": {"steps": 4},
    "08_gguf_llama_cpp": {"calibration_tokens": 1024},
    "09_float_formats": {},
    "10_below_four_bits": {"calibration_samples": 8, "calibration_length": 32, "autoround_iters": 2},
    "11_compare_methods": {},
}
# (family, notebook): the words it refuses with
ELSEWHERE = ("qwen3", "gemma3_text", "phi3", "falcon")
REFUSALS = {(family, "08_gguf_llama_cpp"): "this notebook writes llama, mistral, qwen2 models" for family in ELSEWHERE}
REFUSALS |= {
    (family, "10_below_four_bits"): "this notebook rotates llama, mistral and qwen2 models" for family in ELSEWHERE
}
REFUSALS |= {(family, "05_gptq"): "auto-gptq knows llama, mistral and qwen2 models" for family in ELSEWHERE}
REFUSALS |= {(family, "11_compare_methods"): "knows llama, mistral and qwen2 models" for family in ELSEWHERE}
for notebook in ("06_awq", "07_qlora"):
    REFUSALS |= {(family, notebook): "The layers of .* have no self_attn.q_proj" for family in ("phi3", "falcon")}
REFUSALS["gemma3_text", "06_awq"] = "The layers of .* have also pre_feedforward_layernorm"
REFUSALS["falcon", "03_hybrid_precision"] = "FalconLinear"
REFUSALS["falcon", "09_float_formats"] = "FalconLinear: compressed-tensors loads plain Linear layers only"


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_model_of_another_family_runs_or_is_refused_in_one_line(family, notebook, tokenizer, tmp_path):
    folder = families.write(tmp_path / "models", family, tokenizer)
    path = ROOT / "notebooks" / f"{notebook}.ipynb"
    parameters = {
        "model": str(folder),
        "output_dir": str(tmp_path / "build"),
        "eval_tokens": 1024,
        **NOTEBOOKS[notebook],
    }
    result = run.execute(path, tmp_path / "out.ipynb", parameters, cwd=tmp_path)
    if (family, notebook) in REFUSALS:
        assert re.search(REFUSALS[family, notebook], result.verdict) and result.seconds < 60, result.verdict
    else:
        assert result.ok, result.verdict
        assert run.unexecuted(nbformat.read(tmp_path / "out.ipynb", as_version=4)) == []
