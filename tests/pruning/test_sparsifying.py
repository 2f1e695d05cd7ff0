"""Pruning a model: against the model run as a whole with hooks of the tests' own."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import entangle
from entangle.model.layers import LinearLayer, find_layers, weight_of
from entangle.model.text import TokenWindows
from entangle.numerics.masks import prune
from entangle.numerics.moments import InputMoments
from entangle.numerics.sparsity import Mask, Method, Sparsity
from tests.forking import forked
from tests.tiny_models import (
    ARCHITECTURES,
    VOCABULARY,
    tiny_llama4,
    tiny_mamba,
    tiny_model,
    tiny_tokenizer,
)


def random_windows(windows: int = 6, length: int = 16, seed: int = 3) -> TokenWindows:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY - 1, (windows, length), generator=generator)
    return TokenWindows(tokens, "random", windows, 0, "never")


def placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device."""
    model.to(device)  # type: ignore[arg-type]  # a device is right; the stub is not
    return model


def inputs_of(
    model: PreTrainedModel, layers: Sequence[LinearLayer], windows: TokenWindows, skip_first: int
) -> dict[str, torch.Tensor]:
    """Run the model as a whole, in batches of 2, and return the layers' inputs (tokens, inputs)."""
    parts: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _, args, name=layer.name: parts[name].append(args[0].clone())
        )
        for layer in layers
    ]
    with torch.no_grad():
        for batch in windows.tokens.split(2):
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat(
            [part.reshape(-1, windows.length, part.shape[-1])[:, skip_first:] for part in seen]
        ).flatten(0, 1)
        for name, seen in parts.items()
    }


def pruned_naively(
    model: PreTrainedModel,
    windows: TokenWindows,
    method: Method,
    mask: Mask,
    propagate: str,
    skip_first: int,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Prune half of all layers, the whole model run anew for each block; return what became."""
    layers = find_layers(model)
    dense = inputs_of(model, layers, windows, skip_first)
    weights, errors = {}, {}
    for block in sorted({layer.block for layer in layers}):
        here = [layer for layer in layers if layer.block == block]
        seen = dense if propagate == "dense" else inputs_of(model, here, windows, skip_first)
        for layer in here:
            rows, weight = seen[layer.name], weight_of(layer).clone()
            moments = InputMoments.zeros(layer.inputs)
            moments.add(rows)
            pruned = prune(weight, moments, Sparsity(0.5), method=method, mask=mask).weight
            outputs = rows.double() @ weight.double().T
            lost = rows.double() @ (weight - pruned).double().T
            errors[layer.name] = float(lost.square().sum() / outputs.square().sum())
            weights[layer.name] = pruned
            weight_of(layer).copy_(pruned)
    return weights, errors


@pytest.mark.parametrize("propagate", ["sparse", "dense"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_by_block_prunes_as_the_whole_model_would(name: str, propagate: Any) -> None:
    windows, model = random_windows(), tiny_model(name)
    found = entangle.sparsify(
        model, windows, sparsity=0.5, method="wanda", propagate=propagate, batch_size=2
    )
    expected, errors = pruned_naively(tiny_model(name), windows, "wanda", "row", propagate, 0)
    for layer in find_layers(model):
        weight = weight_of(layer)
        assert torch.equal(weight == 0, expected[layer.name] == 0), layer.name
        assert torch.equal(weight, expected[layer.name])
    assert found.layers["layer"].tolist() == list(expected)
    assert found.layers["error"].tolist() == pytest.approx(list(errors.values()), rel=1e-3)


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
@pytest.mark.parametrize("mask", ["row", "block"])
@pytest.mark.parametrize("skip_first", [0, 3])
def test_every_method_and_mask_and_skipped_tokens(
    method: Method, mask: Mask, skip_first: int, device: torch.device
) -> None:
    windows, model = random_windows(12), placed(tiny_model("llama"), device)
    found = entangle.sparsify(
        model,
        windows,
        sparsity="0.5",
        method=method,
        mask=mask,
        solve="greedy",  # rounding changes the number of steps of the others
        batch_size=2,
        skip_first=skip_first,
    )
    expected, errors = pruned_naively(
        tiny_model("llama"), windows, method, mask, "sparse", skip_first
    )
    for layer in find_layers(model):
        weight = weight_of(layer)
        assert weight.device.type == device.type
        different = (weight.cpu() == 0) != (expected[layer.name] == 0)
        assert different.float().mean() <= (0 if device.type == "cpu" else 0.01)  # other Grams
        same = ~different.any(dim=1)
        assert torch.allclose(weight.cpu()[same], expected[layer.name][same], rtol=1e-3, atol=1e-4)
    assert found.layers["error"].tolist() == pytest.approx(list(errors.values()), rel=1e-2)
    assert (found.layers["tokens"] == 12 * (16 - skip_first)).all()


def test_only_the_matching_layers_change() -> None:
    model, before = tiny_model("llama"), tiny_model("llama").state_dict()
    found = entangle.sparsify(
        model, random_windows(), sparsity="0.25", layers=["*.1.mlp.*", "*.q_proj"]
    )
    changed = {
        name.removesuffix(".weight")
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == set(found.layers["layer"])
    assert len(changed) == 6
    zeros = sum(int((weight_of(layer) == 0).sum()) for layer in find_layers(model))
    assert found.layers["zeros"].sum() == zeros
    assert found.sparsity == zeros / found.layers["weights"].sum()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pruned_model_is_saved_loads_and_scores_the_same(name: str, tmp_path: Path) -> None:
    model, windows = tiny_model(name), random_windows()
    found = entangle.sparsify(
        model, windows, sparsity=0.7, tokenizer=tiny_tokenizer(), out=tmp_path / "out"
    )
    held = random_windows(seed=5)
    expected = entangle.perplexity(model, held).window_nats
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain.eval()
    for loaded in (plain, entangle.load_model(tmp_path / "out")):
        assert np.array_equal(entangle.perplexity(loaded, held).window_nats, expected)
    entangle.load_tokenizer(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert [layer["layer"] for layer in manifest["layers"]] == found.layers["layer"].tolist()
    assert manifest["sparsity"] == found.sparsity
    assert abs(found.sparsity - 0.7) < 0.02  # rows of 16 to 48 weights, of which whole ones go
    noted = json.loads((tmp_path / "out" / "run.json").read_text())
    assert noted["fingerprint"] == windows.fingerprint
    assert (noted["sparsity"], noted["mask"], noted["tokens"]) == ("0.7", "row", 96)


def test_the_manifest_counts_the_zeros_of_the_file(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    entangle.sparsify(model, random_windows(), sparsity=0.6, layers="*.mlp.*", out=tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    manifest = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert manifest["model_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    for layer in manifest["layers"]:
        weight = tensors[layer["layer"] + ".weight"]
        assert weight.dtype == torch.bfloat16
        zeros = int((weight == 0).sum())
        assert zeros == layer["zeros"] == layer["neurons"] * round(0.6 * layer["inputs"])
        assert layer["realised"] == zeros / weight.numel()
        assert 0 < layer["error"] < 1


def test_a_pruned_model_is_no_measured_run(tmp_path: Path) -> None:
    entangle.sparsify(tiny_model("llama"), random_windows(2), sparsity=0.5, out=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"\bout\b.*\bmeasured\b.*\bmodel\b"):
        entangle.open_run(tmp_path / "out")


def test_a_layer_without_output_has_no_error_and_json_says_null(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    found = entangle.sparsify(
        model, random_windows(2), sparsity=0.5, method="wanda", out=tmp_path / "out"
    )
    broken = found.layers[found.layers["error"].isna()]["layer"].tolist()
    assert "model.layers.1.mlp.up_proj" in broken
    text = (tmp_path / "out" / "sparsity.json").read_text()
    layers = json.loads(text, parse_constant=lambda name: pytest.fail(name))["layers"]
    assert [layer["layer"] for layer in layers if layer["error"] is None] == broken


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    for out in ("a", "b"):
        entangle.sparsify(tiny_model("gpt2"), random_windows(), sparsity=0.5, out=tmp_path / out)
    for file in ("model.safetensors", "sparsity.json", "run.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.5}, ValueError, r"sparsity.*n:m.*\b1\.5"),
        ({"sparsity": "3:5"}, ValueError, r"layers\.0\.self_attn\.q_proj.*\b3:5\b.*groups.*\b24\b"),
        ({"method": "luck"}, ValueError, "method.*sparsegpt, wanda, magnitude.*'luck'"),
        ({"mask": "column"}, ValueError, "mask.*row, block.*'column'"),
        ({"propagate": "none"}, ValueError, "propagate.*sparse, dense.*'none'"),
        ({"layers": "*.nothing"}, LookupError, r"layer.*'\*\.nothing'"),
        ({"skip_first": 16}, ValueError, r"skip_first.*\b15\b.*windows of 16\D+16\b"),
        ({"batch_size": 0}, ValueError, r"batch size 0\b"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    with pytest.raises(error, match=message):
        entangle.sparsify(
            model, random_windows(), **{"sparsity": 0.5} | options, out=tmp_path / "out"
        )
    for name, tensor in tiny_model("llama").state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_cannot_be_pruned_is_named() -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    message = r"layers\.1\.mlp\.gate_proj.*\b24 inputs.*singular"
    with pytest.raises(ValueError, match=message):
        entangle.sparsify(model, random_windows(), sparsity=0.5)
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = torch.inf
    message = r"layers\.0\.mlp\.up_proj.*\b1 of .*weights.*NaN"
    with pytest.raises(ValueError, match=message):
        entangle.sparsify(model, random_windows(), sparsity=0.5, method="magnitude")


MEMORY = """
import ctypes, sys, torch, entangle
from pathlib import Path
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import tiny_model

def status(name):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].removesuffix("kB"))

for parameter in (-3, -1):  # what is freed is given back at once: mallopt's thresholds
    ctypes.CDLL(None).mallopt(parameter, 65536)
options = {"hidden_size": 96, "intermediate_size": 1280, "num_attention_heads": 3}
entangle.sparsify(tiny_model("llama", **options), random_windows(8, 64), sparsity=0.5)  # warms up
model = tiny_model("llama", **options, num_hidden_layers=int(sys.argv[1]))
windows = random_windows(64, 64)
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
before = status("VmRSS")
entangle.sparsify(model, windows, sparsity=0.5)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_beyond_the_model_does_not_grow_with_the_blocks() -> None:
    peaks = []
    for blocks in ("4", "8"):
        done = forked("-c", MEMORY, blocks)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[0] > 4_000  # kB: hidden states and Grams are seen at all
    assert peaks[1] < 1.1 * peaks[0]


# Layers that are not pruned.


class Twice(torch.nn.Linear):
    """A linear layer that is more than a product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def with_twice() -> PreTrainedModel:
    model: Any = tiny_model()
    twice = Twice(24, 37)
    twice.load_state_dict(model.model.layers[1].mlp.up_proj.state_dict())
    model.model.layers[1].mlp.up_proj = twice
    return model  # type: ignore[no-any-return]


LEFT = {
    tiny_mamba: ["backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"],
    tiny_llama4: ["model.layers.0.feed_forward.router", "model.layers.1.feed_forward.router"],
    with_twice: ["model.layers.1.mlp.up_proj"],
}


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("make", LEFT)
def test_what_cannot_be_pruned_is_left_as_it_is_and_said(
    make: Callable[[], PreTrainedModel], experts: int
) -> None:
    model = make()
    dense = copy.deepcopy(model)
    trained = ["*.experts.*"] if make is tiny_llama4 and experts > 1 else []
    found = entangle.sparsify(
        model, random_windows(), sparsity=0.5, experts=experts, exclude=trained
    )
    every = [layer.name for layer in find_layers(model, "*", trained)]
    assert [*found.layers["layer"]] == [name for name in every if name not in LEFT[make]]
    assert [*found.attributes["skipped_layers"]] == LEFT[make]
    for name in LEFT[make]:
        one, other = model.get_submodule(name), dense.get_submodule(name)
        assert type(one) is type(other)
        assert all(map(torch.equal, one.parameters(), other.parameters()))
    with torch.no_grad():
        assert torch.isfinite(model(random_windows().tokens).logits).all()


@pytest.mark.parametrize("layers", ["*.1.mlp.up_proj", ["*", "model.layers.1.mlp.up_proj"]])
def test_what_cannot_be_pruned_is_refused_if_it_is_asked_for(layers: str | list[str]) -> None:
    model = with_twice()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*Twice"):
        entangle.sparsify(model, random_windows(), sparsity=0.5, layers=layers)
    with pytest.raises(LookupError, match="no layer is left"):
        entangle.sparsify(model, random_windows(), sparsity=0.5, layers=layers, exclude="*")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pruned_folder_of_a_router_that_returns_a_tuple_runs(tmp_path: Path) -> None:
    model, windows = tiny_llama4(), random_windows()
    entangle.sparsify(
        model, windows, sparsity=0.5, tokenizer=tiny_tokenizer(), out=tmp_path / "half"
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    with torch.no_grad():
        logits = plain(windows.tokens).logits[:, :-1].flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(logits, windows.tokens[:, 1:].flatten())
    for packed in (True, False):
        loaded = entangle.load_model(tmp_path / "half", packed=packed, device="cpu")
        assert entangle.perplexity(loaded, windows).nats == pytest.approx(float(nats), rel=1e-5)
