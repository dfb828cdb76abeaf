"""The decoder layers of models of six families: found, recorded and run from the middle on; what a notebook cannot work on is refused."""

import families
import pytest
import torch
from safetensors.torch import save_file

from helpers import models

FALCON = {"transformer.h.0.self_attention.query_key_value.weight": (12, 4), "transformer.h.0.mlp.dense.weight": (4, 4)}
GEMMA = {"model.layers.0.self_attn.q_proj.weight": (4, 4), "model.layers.0.pre_feedforward_layernorm.weight": (4,)}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_pass_goes_on_from_any_layer(family):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(families.config(family)).eval()
    ids = torch.randint(0, 1000, (2, 80))  # longer than Gemma's window
    with torch.inference_mode():
        recorded = models.decoder.record(net, ids)
        whole = net(ids, use_cache=False).logits
        for first in range(3):
            assert torch.allclose(recorded.output_from(first), whole, atol=1e-4)
        assert recorded.output_from(1, slice(None, None, 2)).shape == (2, 40, whole.shape[-1])
    assert len(models.decoder.layers(net)) == 2 and len(recorded.states) == 3
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


def folder(tmp_path, shapes):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    return models.Found(str(tmp_path), "small", "", "cpu")


def test_a_notebook_says_which_parts_it_works_on(tmp_path):
    models.decoder.require(folder(tmp_path, GEMMA), ["self_attn.q_proj"])
    with pytest.raises(models.ModelError, match=r"The layers of small have also pre_feedforward_layernorm: "):
        models.decoder.require(folder(tmp_path, GEMMA), ["self_attn.q_proj"], without=["pre_feedforward_layernorm"])
    with pytest.raises(models.ModelError, match=r"have no self_attn\.q_proj and no mlp\.up_proj: .*smollm2-offline"):
        models.decoder.require(folder(tmp_path, FALCON), ["self_attn.q_proj", "mlp.up_proj"])


def test_one_weight_of_any_model(tmp_path):
    found = folder(tmp_path, FALCON)
    assert models.decoder.one_weight(found.path, "mlp.up_proj", 5) == "transformer.h.0.mlp.dense.weight"
    folder(tmp_path, {f"model.layers.{n}.mlp.{kind}.weight": (4, 4) for n in (5, 15) for kind in ("up_proj", "z_proj")})
    assert models.decoder.one_weight(found.path, "mlp.up_proj", 5) == "model.layers.5.mlp.up_proj.weight"
