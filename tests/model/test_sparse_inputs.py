"""Sparse inputs of a running model, against masks that the tests make themselves."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import entangle
from entangle.model.blocks import BlockWalk
from entangle.model.experts import ExpertLinear, PackedLinear
from entangle.model.hashing import weights_hash
from entangle.model.hooks import on_trial
from entangle.model.layers import find_layers
from entangle.model.loading import load_model, save_model
from entangle.model.packing import pack_layers
from entangle.model.reloading import check_saved
from entangle.model.sparse_inputs import (
    INPUTS,
    counting_nonzero,
    densify_inputs,
    input_hooks,
    sparsify_inputs,
)
from entangle.numerics.input_rules import Threshold, column_norms, top_inputs
from entangle.numerics.routing import fit_router
from tests.tiny_models import tiny_model, tiny_tokenizer

TOKENS = torch.randint(3, 250, (3, 10), generator=torch.Generator().manual_seed(1))


def small(**changes: Any) -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1, **changes)


def sparse(model: PreTrainedModel, value: float = 0.4) -> PreTrainedModel:
    """Give the layers of a model's MLP and its query sparse inputs, each by another rule."""
    layers = find_layers(model, ["*.mlp.*", "*.q_proj"])
    rules: dict[str, Any] = {
        layer.name: Threshold(value * (1 + 0.2 * place)) for place, layer in enumerate(layers)
    }
    last = layers[-1]
    assert isinstance(last.module.weight, torch.Tensor)
    rules[last.name] = top_inputs(column_norms(last.module.weight), 0.5)
    sparsify_inputs(model, rules)
    return model


def logits(model: PreTrainedModel, tokens: torch.Tensor = TOKENS, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens, **options).logits
    return found


def test_each_layer_has_its_own_mask_and_first_tokens_are_dense() -> None:
    model = sparse(small())
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, when: str) -> Any:
        def hook(_: nn.Module, args: Any, *__: Any) -> None:
            seen.setdefault(f"{name} {when}", []).append(args[0].clone())

        return hook

    for name in input_hooks(model):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(keep(name, "before"), prepend=True)
        module.register_forward_hook(keep(name, "multiplied"))
    with counting_nonzero(model) as counted:
        logits(model)
        for name, hook in counted.items():
            (before,), (used,) = seen[f"{name} before"], seen[f"{name} multiplied"]
            assert hook.rule is not None
            expected = torch.where(hook.rule.keep(before), before, 0)
            expected[:, 0] = before[:, 0]
            assert torch.equal(used, expected)
            assert not torch.equal(used, before)
            assert hook.tokens == TOKENS.numel()
            assert torch.equal(hook.nonzero, (expected != 0).flatten(0, 1).sum(0))
    # Up and gate receive the same tensor, and each has its own threshold.
    gate, up = (seen[f"model.layers.0.mlp.{one}_proj multiplied"][0] for one in ("gate", "up"))
    assert not torch.equal(gate, up)


def test_with_a_cache_only_the_text_has_a_first_token() -> None:
    model = sparse(small())
    whole = logits(model, TOKENS[:1])
    cached = model(input_ids=TOKENS[:1, :4], use_cache=True)
    parts, cache = [cached.logits.detach()], cached.past_key_values
    for place in range(4, 10):
        mask = torch.ones(1, place + 1) if place % 2 else None  # as generate gives, and without
        step = model(
            input_ids=TOKENS[:1, place : place + 1], past_key_values=cache, attention_mask=mask
        )
        parts.append(step.logits.detach())
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    alone = logits(model, TOKENS[:1, 4:5])  # a first token is dense
    densify_inputs(model)
    torch.testing.assert_close(alone, logits(model, TOKENS[:1, 4:5]))
    assert not torch.allclose(whole, logits(model, TOKENS[:1]), atol=1e-3)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_with_the_state_of_a_recurrent_model_only_the_text_has_a_first_token(kind: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 259, "hidden_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_heads": 6, "head_dim": 8, "n_groups": 2} if kind == "mamba2" else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    rules = {layer.name: Threshold(0.4) for layer in find_layers(model, ["*.in_proj"])}
    sparsify_inputs(model, rules)
    whole = logits(model, TOKENS[:1])
    first = model(input_ids=TOKENS[:1, :4], use_cache=True)
    parts, cache = [first.logits.detach()], first.cache_params
    for place in range(4, 10):
        mask = torch.ones(1, 1) if place % 2 else None
        token = TOKENS[:1, place : place + 1]
        step = model(input_ids=token, cache_params=cache, attention_mask=mask, use_cache=True)
        parts.append(step.logits.detach())
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    densify_inputs(model)
    assert not torch.allclose(whole, logits(model, TOKENS[:1]), atol=1e-3)


def test_a_pass_begins_anew_after_one_that_was_interrupted() -> None:
    """torch calls no hook after KeyboardInterrupt."""
    model = sparse(small())
    expected = model.base_model(input_ids=TOKENS[:2, :5]).last_hidden_state
    for outer, inner in ((model, model.base_model), (model.base_model, model)):
        handle = model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            outer(input_ids=TOKENS)
        handle.remove()
        found = inner(input_ids=TOKENS[:2, :5], output_hidden_states=True)
        assert torch.equal(found.hidden_states[-1], expected)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_padding_before_a_text_does_not_move_its_first_token() -> None:
    model = sparse(small())
    padded = functional.pad(TOKENS[:2], (3, 0), value=0)
    mask = (torch.arange(13) >= 3).long().expand(2, 13)
    positions = (torch.arange(13) - 3).clamp(min=0).expand(2, 13)
    found = logits(model, padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(found[:, 3:], logits(model, TOKENS[:2]), rtol=1e-4, atol=1e-5)


def test_a_walk_through_the_blocks_is_the_model() -> None:
    model = sparse(tiny_model("llama"))
    walk = BlockWalk(model, [{"input_ids": part} for part in TOKENS.split(2)])
    while not walk.done:
        walk.advance()
    with torch.no_grad():
        expected = model.base_model(input_ids=TOKENS, output_hidden_states=True)
    normed = model.get_submodule("model.norm")(torch.cat(walk.hidden))
    torch.testing.assert_close(normed, expected.last_hidden_state)
    layer = find_layers(model, ["*.0.mlp.up_proj"])[0].module
    with pytest.raises(RuntimeError, match="only the model"):
        layer(torch.ones(2, 24))
    with on_trial(model), torch.no_grad():
        dense = model(input_ids=TOKENS).logits
    assert not torch.allclose(dense, logits(model), atol=1e-3)


def expanded(value: float) -> tuple[PreTrainedModel, torch.Tensor]:
    """Return a model whose up_proj has experts and sparse inputs, and its true output there."""
    model = small()
    (layer,) = find_layers(model, ["*.up_proj"])
    rows: list[torch.Tensor] = []
    handle = layer.module.register_forward_pre_hook(lambda _, args: rows.append(args[0].clone()))
    logits(model)
    handle.remove()
    many = rows[0].flatten(0, 1).repeat(20, 1)
    router = fit_router(many + 0.1 * torch.randn(many.shape), 3, components=0)
    assert router.experts > 1
    weight = torch.randn(router.experts, layer.neurons, layer.inputs)
    weight[torch.rand(weight.shape) < 0.7] = 0
    bias: Any = layer.module.bias
    entangle_layer = ExpertLinear(weight, bias.detach(), router, [1] * router.experts)
    model.set_submodule(layer.name, entangle_layer)
    sparsify_inputs(model, {layer.name: Threshold(value)})
    inputs = rows[0]
    keep = inputs.abs() >= value
    keep[:, 0] = True
    chosen = router.assign(inputs.flatten(0, 1))  # by the dense inputs
    masked = torch.where(keep, inputs, 0).flatten(0, 1)
    true = torch.stack([weight[e] @ x for e, x in zip(chosen, masked, strict=True)]) + bias
    return model, true.detach()


@pytest.mark.parametrize("packed", [False, True])
def test_the_router_reads_the_dense_inputs(packed: bool) -> None:
    model, true = expanded(0.9)
    if packed:
        pack_layers(model, find_layers(model, ["*.up_proj"]))
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(module, PackedLinear if packed else ExpertLinear)
    seen: list[torch.Tensor] = []
    module.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    logits(model)
    torch.testing.assert_close(seen[0].flatten(0, 1), true, rtol=1e-4, atol=1e-5)
    cache = model(input_ids=TOKENS[:1, :9], use_cache=True).past_key_values  # then one token
    model(input_ids=TOKENS[:1, 9:], past_key_values=cache)
    torch.testing.assert_close(seen[2].flatten(), true[9], rtol=1e-4, atol=1e-5)


def test_a_saved_model_keeps_its_rules_and_transformers_cannot_load_it(tmp_path: Path) -> None:
    for place, model in enumerate((sparse(small()), expanded(0.9)[0])):
        folder = tmp_path / str(place)
        save_model(model, tiny_tokenizer(), folder)
        check_saved(model, folder, TOKENS[:1], tmp_path)
        for packed in (False, True):
            again = load_model(folder, packed=packed)
            torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="sparse inputs" if place == 0 else "expanded"):
            entangle.plan(folder, "a text")
        with pytest.raises(OSError, match=r"model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(folder)
        hook = next(iter(input_hooks(model).values()))
        hook.rule = Threshold(7.0)
        with pytest.raises(OSError, match="threshold"):
            check_saved(model, folder, TOKENS[:1], tmp_path)
    offloaded = load_model(tmp_path / "0", offload=tmp_path / "blocks")
    torch.testing.assert_close(logits(offloaded), logits(load_model(tmp_path / "0")))
    densify_inputs(model)
    save_model(model, None, folder)  # into the same folder
    assert not (folder / INPUTS).exists()
    assert not input_hooks(load_model(folder))


def test_files_that_are_missing_or_of_another_model_are_told(tmp_path: Path) -> None:
    model = expanded(0.9)[0]
    save_model(model, None, tmp_path / "experts")
    (tmp_path / "experts" / INPUTS).unlink()
    with pytest.raises(ValueError, match=INPUTS):
        load_model(tmp_path / "experts")
    plain = sparse(small())
    save_model(plain, None, tmp_path / "plain")
    file = tmp_path / "plain" / INPUTS
    assert [*load_file(file)]
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + b"!")
    with pytest.raises(ValueError, match=f"damaged.*{INPUTS}"):
        load_model(tmp_path / "plain")
    file.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_model(tmp_path / "plain")


def test_it_is_another_model_than_with_dense_inputs() -> None:
    model = small()
    dense = weights_hash(model)
    hashes = [weights_hash(sparse(copy.deepcopy(model), value)) for value in (0.4, 0.5)]
    assert len({dense, *hashes}) == 3
    sparse(model)
    before = logits(model)
    assert weights_hash(model) == hashes[0]
    densify_inputs(model)
    assert weights_hash(model) == dense
    assert not any(module._forward_pre_hooks for module in model.modules())
    sparse(model)
    assert torch.equal(logits(model), before)


def test_a_model_with_sparse_inputs_is_not_pruned_in_any_layer_and_keeps_its_rules() -> None:
    from tests.pruning.test_sparsifying import random_windows

    model, windows = sparse(small()), random_windows(4)
    before = logits(model)
    run = entangle.measure(model, windows)
    calls: list[Any] = [
        lambda layers: entangle.sparsify(model, windows, sparsity=0.5, layers=layers),
        lambda layers: entangle.sweep(
            model, windows, random_windows(3, seed=7), sparsity=0.5, layers=layers
        ),
        lambda layers: entangle.choose_budget(
            model, windows, by="search", sparsity=0.5, layers=layers
        ),
        lambda layers: entangle.ablate(
            model, windows, random_windows(3, seed=7), run=run, layers=layers
        ),
        lambda layers: entangle.disentangle(
            model, windows, random_windows(3, seed=7), run=run, layers=layers, experts=2
        ),
    ]
    for layers in ("*", "*.o_proj"):  # o_proj has dense inputs
        for call in calls:
            with pytest.raises(ValueError, match="q_proj has sparse inputs already"):
                call(layers)
    assert torch.equal(logits(model), before)
