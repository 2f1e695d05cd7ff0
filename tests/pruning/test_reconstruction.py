"""Reconstruction: against a training loop of the tests' own, which runs the whole model."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import entangle
from entangle.model.experts import ExpertLinear
from entangle.model.layers import find_layers, weight_of
from entangle.model.text import TokenWindows
from entangle.numerics.routing import CentroidRouter
from entangle.pruning import reconstruction
from entangle.pruning.reconstruction import EPOCHS
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import ARCHITECTURES, tiny_model

RATE = 5e-3  # the tiny models see few tokens, which a higher rate would fit too closely
WITH_MLP = ARCHITECTURES


@pytest.fixture(autouse=True)
def low_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "RATE", RATE)


def mlp_of(model: PreTrainedModel) -> list[str]:
    found = [layer.name for layer in find_layers(model)]
    return [name for name in found if ".mlp." in name or name.endswith(("fc1", "fc2"))]


def pruned(model: PreTrainedModel, windows: TokenWindows, **options: Any) -> Any:
    every: dict[str, Any] = {"sparsity": "0.6", "batch_size": 2, "layers": mlp_of(model)}
    return entangle.sparsify(model, windows, **every | options)


def weight_in(model: PreTrainedModel, layer: str) -> torch.nn.Parameter:
    return model.get_submodule(layer).get_parameter("weight")


def hidden_behind(model: PreTrainedModel, tokens: torch.Tensor, block: int) -> torch.Tensor:
    """Return the hidden states behind a block, before the last norm, by a hook on the block."""
    caught = []
    blocks = model.get_submodule(find_layers(model)[0].name.split(".0.")[0])
    handle = blocks[block].register_forward_hook(  # type: ignore[index]
        lambda _, __, output: caught.append(output if torch.is_tensor(output) else output[0])
    )
    model(input_ids=tokens, use_cache=False)
    handle.remove()
    return caught[0]


def errors_of(
    model: PreTrainedModel, dense: PreTrainedModel, tokens: torch.Tensor, block: int, skip: int = 0
) -> torch.Tensor:
    with torch.no_grad():
        target = hidden_behind(dense, tokens, block)[:, skip:]
    change = hidden_behind(model, tokens, block)[:, skip:] - target
    return (change.square().sum(-1) / target.square().sum(-1)).flatten()


def held_out_error(model: PreTrainedModel, dense: PreTrainedModel, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return float(errors_of(model, dense, tokens, 0, 1).mean())


def test_the_first_block_is_tuned_as_by_a_plain_training_loop() -> None:
    """With the pruned weights and the batches' order as given; the second block is left dense."""
    dense, windows = tiny_model("llama"), random_windows(40)
    layers = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    options = {"layers": layers, "skip_first": 1}
    ours, reference = copy.deepcopy(dense), copy.deepcopy(dense)
    found = pruned(ours, windows, reconstruct="mlp", **options).layers
    pruned(reference, windows, **options)

    batches = windows.tokens.split(2)
    trained, held_out = batches[:15] + batches[16:], batches[15]
    weights = [weight_in(reference, name) for name in layers]
    masks = [weight != 0 for weight in weights]
    rates = [
        RATE * float(w.detach()[m].square().mean().sqrt())
        for w, m in zip(weights, masks, strict=True)
    ]
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_()
    adam = torch.optim.Adam([{"params": [w], "lr": r} for w, r in zip(weights, rates, strict=True)])
    order, steps = np.random.default_rng([windows.seed, 0, 0]), EPOCHS * len(trained)
    errors, kept = [held_out_error(reference, dense, held_out)], []
    step = 0
    for _ in range(EPOCHS):
        for number in order.permutation(len(trained)):
            adam.zero_grad()
            errors_of(reference, dense, trained[number], 0, 1).sum().backward()
            for weight, mask in zip(weights, masks, strict=True):
                assert weight.grad is not None
                weight.grad *= mask
            for group, rate in zip(adam.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps)
            adam.step()
            step += 1
        errors.append(held_out_error(reference, dense, held_out))
        kept.append([weight.detach().clone() for weight in weights])

    best = int(np.argmin(errors))
    assert best > 0
    for name, tuned in zip(layers, kept[best - 1], strict=True):
        torch.testing.assert_close(weight_in(ours, name).detach(), tuned, rtol=1e-4, atol=1e-6)
    assert found["mlp_error_before"].tolist() == pytest.approx([errors[0]] * 3, rel=1e-4)
    assert found["mlp_error"].tolist() == pytest.approx([errors[best]] * 3, rel=1e-4)


@pytest.mark.parametrize("name", WITH_MLP)
def test_reconstruction_keeps_masks_and_comes_nearer_to_the_dense_model(name: str) -> None:
    dense, windows = tiny_model(name), random_windows(40)
    plain, tuned = copy.deepcopy(dense), copy.deepcopy(dense)
    pruned(plain, windows)
    found = pruned(tuned, windows, reconstruct="mlp").layers
    assert (found["mlp_error"] < found["mlp_error_before"]).all()
    first, last = (find_layers(one, mlp_of(dense)) for one in (plain, tuned))
    blocks = {layer.block for layer in first}
    for before, after in zip(first, last, strict=True):
        if before.block == 0:  # the later blocks are pruned on other inputs
            assert torch.equal(weight_of(before) == 0, weight_of(after) == 0)
            assert not torch.equal(weight_of(before), weight_of(after))
        assert int((weight_of(before) == 0).sum()) == int((weight_of(after) == 0).sum())
    with torch.no_grad():
        held_out = windows.tokens[30:32]  # the sixteenth batch
        for block in blocks:
            error = float(errors_of(tuned, dense, held_out, block).mean())
            own = found[found["block"] == block]["mlp_error"]
            assert own.tolist() == pytest.approx([error] * len(own), rel=1e-3)
        assert error < float(errors_of(plain, dense, held_out, block).mean())
    changed = dict(plain.state_dict())
    for name_, tensor in tuned.state_dict().items():
        if name_.removesuffix(".weight") not in mlp_of(dense):
            assert torch.equal(tensor, changed[name_])


def test_experts_are_tuned_by_their_own_tokens_and_routers_stay() -> None:
    dense, windows = tiny_model("llama"), random_windows(40)
    layers = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    plain, tuned = copy.deepcopy(dense), copy.deepcopy(dense)
    options = {"layers": layers, "experts": 3}
    pruned(plain, windows, **options)
    found = pruned(tuned, windows, reconstruct="mlp", **options).layers
    assert (found["mlp_error"] < found["mlp_error_before"]).all()
    for name in layers:
        before, after = plain.get_submodule(name), tuned.get_submodule(name)
        assert isinstance(before, ExpertLinear)
        assert isinstance(after, ExpertLinear)
        assert torch.equal(before.weight == 0, after.weight == 0)
        assert before.weight.dtype == after.weight.dtype
        assert before.counts == after.counts
        assert isinstance(before.router, CentroidRouter)
        assert isinstance(after.router, CentroidRouter)
        assert torch.equal(before.router.matrix, after.router.matrix)
        assert torch.equal(before.router.bias, after.router.bias)
        changed = (before.weight != after.weight).flatten(1).any(dim=1)
        assert changed.tolist() == [True] * 3


def test_the_same_command_gives_the_same_bits_and_another_seed_others() -> None:
    dense = tiny_model("llama")
    found = []
    for seed in (3, 3, 4):
        windows = random_windows(12)
        windows = TokenWindows(windows.tokens, "random", 12, seed, "never")
        model = copy.deepcopy(dense)
        pruned(model, windows, reconstruct="mlp")
        found.append(model.state_dict())
    first, again, other = found
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_block_that_does_not_gain_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "RATE", 1e3)
    dense, windows = tiny_model("llama"), random_windows(40)
    plain, tuned = copy.deepcopy(dense), copy.deepcopy(dense)
    pruned(plain, windows)
    found = pruned(tuned, windows, reconstruct="mlp").layers
    assert found["mlp_error"].tolist() == found["mlp_error_before"].tolist()
    before, after = plain.state_dict(), tuned.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_keep_their_dtype_and_their_zeros(dtype: torch.dtype) -> None:
    dense, windows = tiny_model("llama", dtype=dtype), random_windows(40)
    found = pruned(dense, windows, reconstruct="mlp").layers
    assert (found["mlp_error"] < found["mlp_error_before"]).all()
    for layer, zeros in zip(find_layers(dense, mlp_of(dense)), found["zeros"], strict=True):
        assert weight_of(layer).dtype == dtype
        rows = (weight_of(layer) == 0).sum(dim=1)
        assert rows.tolist() == [round(0.6 * layer.inputs)] * layer.neurons
        assert zeros == layer.neurons * round(0.6 * layer.inputs)


def test_a_kept_weight_that_rounds_to_zero_is_no_zero() -> None:
    weight = torch.tensor([[1e-9, 0.0, 1.0, -1e-9]])
    found = reconstruction._without_new_zeros(weight, weight == 0, torch.float16)
    assert (found == 0).tolist() == [[False, True, False, False]]
    assert found.dtype == torch.float16
    assert float(found[0, 2]) == 1
    assert float(found.abs()[0, [0, 3]].max()) < 1e-4


def test_errors_of_layers_are_those_of_the_tuned_weights() -> None:
    dense, windows = tiny_model("llama"), random_windows(40)
    layers = ["model.layers.0.mlp.up_proj"]
    model = copy.deepcopy(dense)
    found = pruned(model, windows, reconstruct="mlp", layers=layers).layers
    inputs: list[torch.Tensor] = []
    dense.get_submodule(layers[0]).register_forward_hook(
        lambda _, args, __: inputs.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        dense(windows.tokens)
        change = (weight_in(dense, layers[0]) - weight_in(model, layers[0])).double()
        lost = (inputs[0].double() @ change.T).square().sum()
        energy = (inputs[0].double() @ weight_in(dense, layers[0]).double().T).square().sum()
    assert found["error"].tolist() == pytest.approx([float(lost / energy)], rel=1e-4)


def test_a_killed_command_goes_on_with_the_dense_hidden_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = random_windows(12)
    expected, resumed = tiny_model("llama"), tiny_model("llama")
    pruned(expected, windows, reconstruct="mlp", out=tmp_path / "whole")
    tune = reconstruction.reconstruct

    def killed(walk: Any, *args: Any, **options: Any) -> Any:
        if walk.block == 2:
            raise KeyboardInterrupt
        return tune(walk, *args, **options)

    monkeypatch.setattr(reconstruction, "reconstruct", killed)
    with pytest.raises(KeyboardInterrupt):
        pruned(tiny_model("llama"), windows, reconstruct="mlp", out=tmp_path / "killed")
    saved = [path.name for path in (tmp_path / "killed.partial" / "blocks").iterdir()]
    assert "1-hidden" in saved
    assert "0-hidden" not in saved
    tuned: list[int] = []

    def counted(walk: Any, *args: Any, **options: Any) -> Any:
        tuned.append(walk.block)
        return tune(walk, *args, **options)

    monkeypatch.setattr(reconstruction, "reconstruct", counted)
    pruned(resumed, windows, reconstruct="mlp", out=tmp_path / "killed")
    assert tuned == [2]
    whole, killed_files = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "whole", tmp_path / "killed")
    )
    assert {k: v for k, v in whole.items() if k.name != "log.json"} == {
        k: v for k, v in killed_files.items() if k.name != "log.json"
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"propagate": "dense"}, "propagate sparse"),
        ({"layers": "*.self_attn.*"}, "choose other layers of the MLP"),
        ({"windows": random_windows(12)[:1]}, "more windows"),
    ],
)
def test_what_cannot_be_reconstructed_is_refused_before_any_work(
    options: dict[str, Any], words: str
) -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        pruned(model, options.pop("windows", random_windows(12)), reconstruct="mlp", **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_attention_layers_are_pruned_and_not_tuned() -> None:
    dense, windows = tiny_model("llama"), random_windows(40)
    plain, tuned = copy.deepcopy(dense), copy.deepcopy(dense)
    options = {"layers": ["model.layers.0.*"]}
    pruned(plain, windows, **options)
    found = pruned(tuned, windows, reconstruct="mlp", **options).layers
    assert len(found) == 7
    assert not found["mlp_error"].map(math.isnan).any()
    for before, after in zip(find_layers(plain), find_layers(tuned), strict=True):
        same = torch.equal(weight_of(before), weight_of(after))
        assert same == (before.block > 0 or before.role.startswith("self_attn"))


def test_in_inference_mode_it_is_the_same() -> None:
    windows, found = random_windows(40), []
    for mode in (False, True):
        model = tiny_model("llama")
        with torch.inference_mode(mode):
            pruned(model, windows, reconstruct="mlp")
        found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_every_sixteenth_batch_is_held_out() -> None:
    for count, expected in ((2, [1]), (15, [14]), (16, [15]), (40, [15, 31])):
        trained, held_out = reconstruction._split(count)
        assert held_out == expected
        assert sorted(trained + held_out) == [*range(count)]


def test_the_batch_size_changes_nothing() -> None:
    dense, windows = tiny_model("llama"), random_windows(40)
    found = []
    for batch_size in (1, 3):
        model = copy.deepcopy(dense)
        options = {"layers": ["model.layers.0.mlp.*"], "batch_size": batch_size}
        pruned(model, windows, reconstruct="mlp", **options)
        found.append(model.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize(("windows", "length", "size"), [(128, 512, 1), (64, 128, 4), (40, 16, 2)])
def test_a_step_has_512_tokens_or_as_few_as_leave_sixteen_steps(
    windows: int, length: int, size: int
) -> None:
    assert reconstruction.step_size(random_windows(windows, length)) == size
