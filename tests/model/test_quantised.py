"""Models stored in a packed format are pruned as plain floats, and codes are never taken as weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import entangle
from entangle.model.layers import find_layers, weight_of
from entangle.model.loading import load_model
from entangle.model.quantised import unused_scales
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import tiny_model

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
EDGE = 16  # of the square blocks of weights that share a scale


def save_fp8(folder: Path, name: str, *, declared: bool = True) -> dict[str, torch.Tensor]:
    """Save a model whose layers are FP8 codes with scales; return the weights that they mean."""
    model = tiny_model(name, **SIZES)
    model.save_pretrained(folder)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for key in [key for key in tensors if ".layers." in key and tensors[key].ndim == 2]:
        weight = tensors[key]
        if "gate.weight" in key or weight.shape[0] % EDGE:
            continue
        rows, columns = (size // EDGE for size in weight.shape)
        blocks = weight.reshape(rows, EDGE, columns, EDGE)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        meant[key] = (codes.float() * scale[:, None, :, None]).reshape(weight.shape)
        tensors[key] = codes.reshape(weight.shape)
        tensors[f"{key}_scale_inv"] = scale.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    format = {
        "quant_method": "fp8",
        "weight_block_size": [EDGE] * 2,
        "activation_scheme": "dynamic",
    }
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": format} if declared else {}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 27).reshape(2, 12)).logits
    return found


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_model_of_fp8_codes_is_pruned_and_saved_as_plain_floats(
    name: str, tmp_path: Path
) -> None:
    meant = save_fp8(tmp_path / "fp8", name)
    model = load_model(tmp_path / "fp8")
    layers = {f"{layer.name}.weight": layer for layer in find_layers(model)}
    assert {*layers} & {*meant}
    for key in {*layers} & {*meant}:
        assert torch.equal(weight_of(layers[key]), meant[key])
    found = entangle.sparsify(model, random_windows(), sparsity="0.5", out=tmp_path / "half")
    assert found.sparsity == pytest.approx(0.5, abs=0.02)
    again: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert not hasattr(again.config, "quantization_config")
    torch.testing.assert_close(logits(again), logits(model))
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    for key, weight in meant.items():
        kept = stored[key] != 0
        assert 0.4 < kept.float().mean() < 0.6
        assert float(stored[key].std()) == pytest.approx(float(weight.std()), rel=0.2)


def test_codes_without_their_format_are_refused(tmp_path: Path) -> None:
    save_fp8(tmp_path, "llama", declared=False)
    with pytest.raises(ValueError, match=r"codes.*model\.layers\.0.*weight_scale_inv"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("key", "refused"),
    [
        ("a.up_proj.weight_scale_inv", True),
        ("a.up_proj.weight_scale", True),
        ("a.up_proj.scale", True),
        ("a.up_proj.scales", True),
        ("a.up_proj.SCB", True),
        ("a.up_proj.weight.absmax", True),
        ("a.experts.gate_up_proj_scales", True),
        ("a.experts.gate_up_proj_scale_inv", True),
        ("a.k_proj.k_scale", False),  # of a cache of keys
        ("a.up_proj.input_scale", False),  # of the inputs
        ("a.up_proj.bias", False),
        ("a.rotary.inv_freq", False),
    ],
)
def test_scales_are_known_by_name(key: str, refused: bool) -> None:
    assert unused_scales([key, "b.weight"]) == ([key] if refused else [])


def test_scales_of_a_part_that_is_left_out_are_harmless() -> None:
    left_out = ["mtp.proj.weight", "mtp.proj.weight_scale_inv", "mtp.experts.up_blocks"]
    left_out += ["mtp.experts.up_scales", "mtp.codes.weight", "mtp.codes.weight.absmax"]
    assert unused_scales(left_out) == []
