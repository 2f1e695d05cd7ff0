"""Each expert's rows are the tokens that the router sent to it, multiplied by its matrix by hand."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from entangle.model.fused import FusedMatrix
from entangle.model.hooks import recording_rows, replacing_outputs, unheard_layers
from entangle.model.layers import LinearLayer, find_layers, skipped_parameters, weight_of
from entangle.model.sides import LayerInputs, Recordable, layer_of
from tests.tiny_mixtures import EXPERTS, HIDDEN, MIXTURES, tiny_mixture, without_tokens

IDS = torch.arange(5, 45).view(2, 20)
TRANSPOSED = ("gpt_oss", "llama4_text")  # these store (experts, inputs, neurons)


@dataclasses.dataclass
class Rows:
    """What one expert's matrix did in one pass."""

    tokens: torch.Tensor  # (rows,)
    inputs: torch.Tensor
    outputs: torch.Tensor

    def sorted(self) -> "Rows":
        order = self.tokens.argsort(stable=True)
        return Rows(self.tokens[order], self.inputs[order], self.outputs[order])


Heard = dict[str, Rows]


def experts_of(model: PreTrainedModel) -> list[LinearLayer]:
    return [layer for layer in find_layers(model) if isinstance(layer.module, FusedMatrix)]


def hear(model: PreTrainedModel, layers: list[LinearLayer], **inputs: Any) -> tuple[Heard, Any]:
    """Run the model; return what the hooks heard of the layers, and the logits."""
    heard: dict[str, dict[str, torch.Tensor]] = {layer.name: {} for layer in layers}

    def on_rows(one: Recordable, rows: torch.Tensor, places: torch.Tensor | None) -> None:
        layer = layer_of(one)
        assert isinstance(layer.module, FusedMatrix)
        which = slice(None) if places is None else places
        assert not {one.side} & {*heard[layer.name]}  # once
        heard[layer.name] |= {one.side: rows[which].clone(), "tokens": layer.module.tokens[which]}

    both: list[Recordable] = [*layers, *map(LayerInputs, layers)]
    skip = inputs.pop("skip_first", 0)
    with recording_rows(model, both, on_rows, skip_first=skip), torch.no_grad():
        logits = model(use_cache=False, **inputs).logits
    rows = {n: Rows(h["tokens"], h["input"], h["output"]).sorted() for n, h in heard.items()}
    return rows, logits


# By hand, from what the module with the experts receives in a pass of the model's own.


def by_hand(model: PreTrainedModel, name: str) -> Heard:
    found: Heard = {}
    handles = []

    def hook_on(path: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            given = [*args, *kwargs.values()]
            total = torch.zeros_like(output).view(-1, HIDDEN)
            for expert in range(EXPERTS):
                tokens, rows, weights = _sent(given, expert)
                parts = _matrices(module, name, expert)
                hidden = rows
                for key, weight, bias in parts[:-1]:
                    out = hidden @ weight.T + bias
                    found[f"{path}.{expert}.{key}"] = Rows(tokens, hidden, out)
                outs = [found[f"{path}.{expert}.{key}"].outputs for key, *_ in parts[:-1]]
                middle = _gated(name, outs)
                key, weight, bias = parts[-1]
                last = middle @ weight.T + bias
                found[f"{path}.{expert}.{key}"] = Rows(tokens, middle, last)
                if name == "llama4_text":
                    total.view(EXPERTS, -1, HIDDEN)[expert].index_add_(0, tokens, last)
                else:
                    total.index_add_(0, tokens, last * weights[:, None])
            # What was computed by hand is what the model's own implementation returns.
            torch.testing.assert_close(total, output.view(-1, HIDDEN), rtol=1e-4, atol=1e-5)

        return hook

    for path, module in model.named_modules():
        if type(module).__name__.endswith("Experts") and "Parallel" not in type(module).__name__:
            inner = f"{path}.mlp" if name == "dbrx" else path
            hook = hook_on(inner, module)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def _sent(given: list[Any], expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the tokens of an expert, their rows, and the router's weights."""
    if len(given) == 1:  # Llama 4: all tokens for each expert, multiplied by their scores
        rows = given[0].view(EXPERTS, -1, HIDDEN)[expert]
        tokens = (rows != 0).any(dim=1).nonzero().flatten()
        return tokens, rows[tokens], torch.ones(len(tokens))
    hidden, index, weights = given
    chosen = index == expert
    tokens = chosen.any(dim=1).nonzero().flatten()
    return tokens, hidden.view(-1, HIDDEN)[tokens], (weights * chosen).sum(dim=1)[tokens]


def _matrices(
    module: Any, name: str, expert: int
) -> list[tuple[str, torch.Tensor, torch.Tensor | float]]:
    """Return the names, weights (neurons, inputs) and biases of an expert; the last one is down."""
    if name == "dbrx":
        shape = EXPERTS, -1, HIDDEN
        w1, v1, w2 = (getattr(module.mlp, key).view(shape)[expert] for key in ("w1", "v1", "w2"))
        return [("w1", w1, 0.0), ("v1", v1, 0.0), ("w2", w2.T, 0.0)]
    found: list[tuple[str, torch.Tensor, torch.Tensor | float]] = []
    for key in ("gate_up_proj", "down_proj"):
        weight = getattr(module, key)[expert]
        bias = getattr(module, f"{key}_bias")[expert] if name == "gpt_oss" else 0.0
        found.append((key, weight.T if name in TRANSPOSED else weight, bias))
    return found


def _gated(name: str, outs: list[torch.Tensor]) -> torch.Tensor:
    if name == "gpt_oss":
        gate, up = outs[0][:, ::2].clamp(max=7.0), outs[0][:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = outs if len(outs) == 2 else outs[0].chunk(2, dim=1)
    return silu(gate) * up


SQUARE = {"intermediate_size": HIDDEN}  # no shape says which of a matrix's sides is the inputs'


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, {}) for name in MIXTURES if name != "jetmoe"]
    + [("mixtral", SQUARE), ("gpt_oss", SQUARE)],
)
def test_each_experts_rows_are_its_tokens_multiplied_by_hand(
    name: str, changes: dict[str, int]
) -> None:
    model = tiny_mixture(name, **changes)
    own = getattr(model.config, "_experts_implementation", None)
    layers = experts_of(model)
    truth = by_hand(model, name)
    heard, logits = hear(model, layers, input_ids=IDS)
    assert {*heard} == {*truth}
    for key, rows in truth.items():
        assert torch.equal(heard[key].tokens, rows.tokens), key
        torch.testing.assert_close(heard[key].inputs, rows.inputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heard[key].outputs, rows.outputs, rtol=1e-4, atol=1e-5)
    for block in {layer.block for layer in layers}:  # the share of an expert is that on average
        first = [one for one in layers if one.block == block and one.name[-9:] != "down_proj"]
        tokens = sum(
            len(truth[one.name].tokens) for one in first if one.name[-2:] not in {"v1", "w2"}
        )
        assert isinstance(first[0].module, FusedMatrix)
        assert tokens / IDS.numel() / EXPERTS == first[0].module.share < 1
    with torch.no_grad():
        torch.testing.assert_close(logits, model(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    assert getattr(model.config, "_experts_implementation", None) == own
    assert unheard_layers(model, layers, IDS) == {}
    owners = [layer.module.owner for layer in layers if isinstance(layer.module, FusedMatrix)]
    fused = {id(p) for owner in owners for p in owner.parameters(recurse=False)}
    named = {n for n, p in model.named_parameters() if id(p) in fused}
    assert not named & {*skipped_parameters(model)}


def test_in_bfloat16_the_rows_are_those_of_the_routers_choice() -> None:
    model = tiny_mixture().bfloat16()
    chosen: list[torch.Tensor] = []
    gate: Any = model.get_submodule("model.layers.1.mlp.gate")
    handle = gate.register_forward_hook(lambda _, __, out: chosen.append(out[2]))
    layers = find_layers(model, "*.1.mlp.experts.*")
    heard, _ = hear(model, layers, input_ids=IDS)
    handle.remove()
    for layer in layers:
        rows, expert = heard[layer.name], int(layer.name.split(".")[-2])
        assert rows.outputs.dtype == torch.bfloat16
        assert torch.equal(rows.tokens, (chosen[0] == expert).any(dim=1).nonzero().flatten())
        truth = rows.inputs.double() @ weight_of(layer).double().T
        assert len(rows.tokens) > 0
        torch.testing.assert_close(rows.outputs.double(), truth, rtol=1e-2, atol=1e-2)


def test_the_roles_that_there_are_name_no_expert() -> None:
    with pytest.raises(LookupError, match=r"mlp\.experts\.\*\.down_proj") as error:
        find_layers(tiny_mixture(), "nothing")
    assert "experts.3" not in str(error.value)


def test_the_mlp_of_jetmoe_is_heard_and_its_experts_of_attention_are_skipped_in_words() -> None:
    model = tiny_mixture("jetmoe")
    layers = experts_of(model)
    skipped = unheard_layers(model, layers, IDS)
    assert {*skipped} == {one.name for one in layers if "self_attention" in one.name}
    assert all("which tokens" in reason for reason in skipped.values())
    routes: list[Any] = []
    moe: Any = model.get_submodule("model.layers.1.mlp")
    handle = moe.router.register_forward_hook(lambda _, args, out: routes.append((args[0], out)))
    heard, _ = hear(model, [one for one in layers if one.name not in skipped], input_ids=IDS)
    handle.remove()
    hidden, (_, tokens, _, sizes, _) = routes[0]
    for expert, own in enumerate(tokens.split(sizes)):
        rows = heard[f"model.layers.1.mlp.input_linear.{expert}.weight"]
        assert torch.equal(rows.tokens, own.sort().values)
        truth = hidden[rows.tokens] @ moe.input_linear.weight[expert].T
        torch.testing.assert_close(rows.outputs, truth)
        after = heard[f"model.layers.1.mlp.output_linear.{expert}.weight"]
        gate, up = truth.chunk(2, dim=1)
        torch.testing.assert_close(after.inputs, silu(gate) * up)
        assert torch.equal(after.tokens, rows.tokens)


@pytest.mark.parametrize("name", ["mixtral", "llama4_text"])
def test_padding_and_skipped_tokens_are_left_out(name: str) -> None:
    model = tiny_mixture(name)
    layers = [layer for layer in experts_of(model) if layer.block == 0]
    mask = torch.ones_like(IDS)
    mask[0, :6] = mask[1, 15:] = 0
    everything, _ = hear(model, layers, input_ids=IDS, attention_mask=mask)
    counted, _ = hear(model, layers, input_ids=IDS, attention_mask=mask, skip_first=2)
    unmasked, _ = hear(model, layers, input_ids=IDS)
    keep = mask.bool().flatten()
    assert sum(len(one.tokens) for one in everything.values()) < sum(
        len(one.tokens) for one in unmasked.values()
    )
    for key, rows in everything.items():
        assert keep[rows.tokens].all()
        real = keep.clone()
        real[[6, 7, 20, 21]] = False  # the first two tokens of each window that are not padding
        assert torch.equal(counted[key].tokens, rows.tokens[real[rows.tokens]])
        assert torch.equal(counted[key].outputs, rows.outputs[real[rows.tokens]])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "dbrx"])
def test_replaced_outputs_are_those_that_the_model_goes_on_with(name: str) -> None:
    """Doubling an expert's last matrix is doubling its outputs, and leaves the others as they are."""
    model = tiny_mixture(name)
    last = [one for one in experts_of(model) if one.name.endswith(("1.down_proj", "1.w2"))]
    assert len(last) == 2

    def change(layer: LinearLayer, _: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        return 2 * outputs

    with replacing_outputs(last, change) as fired, torch.no_grad():
        found = model(IDS, use_cache=False).logits
    assert fired == dict.fromkeys((one.name for one in last), 1)
    with torch.no_grad():
        before = model(IDS, use_cache=False).logits
        for layer in last:
            weight_of(layer).mul_(2)
            if layer.module.bias is not None:
                assert isinstance(layer.module.bias, torch.Tensor)
                layer.module.bias.mul_(2)
        truth = model(IDS, use_cache=False).logits
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
    assert (before - truth).abs().max() > 0.01


def test_an_expert_without_tokens_is_called_with_no_rows() -> None:
    model = tiny_mixture()
    without_tokens(model, expert=2)
    layers = experts_of(model)
    heard, _ = hear(model, layers, input_ids=IDS)
    none = {key for key, rows in heard.items() if not len(rows.tokens)}
    assert none == {one.name for one in layers if ".experts.2." in one.name}
    assert heard["model.layers.0.mlp.experts.2.gate_up_proj"].outputs.shape == (0, 48)
    assert unheard_layers(model, layers, IDS) == {}


@pytest.mark.parametrize("name", ["mixtral", "llama4_text"])
def test_an_expert_alone_is_heard_as_it_is_among_all(name: str) -> None:
    model = tiny_mixture(name)
    if name == "mixtral":
        without_tokens(model, expert=2)
    truth, _ = hear(model, experts_of(model), input_ids=IDS)
    for expert in (2, 3):
        alone = find_layers(model, f"*.experts.{expert}.*")
        heard, _ = hear(model, alone, input_ids=IDS)
        assert unheard_layers(model, alone, IDS) == {}
        for key, rows in heard.items():
            assert torch.equal(rows.tokens, truth[key].tokens)
            assert torch.equal(rows.outputs, truth[key].outputs)
    unused = [key for key, rows in truth.items() if not len(rows.tokens)]
    assert name != "mixtral" or len(unused) == 4


# Modules of experts in other forms: which tokens an expert's rows are is told or not.


Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def with_experts(model: PreTrainedModel, multiply: Multiply) -> None:
    """Let all experts of a Mixtral compute ``multiply(hidden, chosen, weight)`` with gate and up.

    ``chosen`` (tokens, experts) says which tokens an expert has. What it returns is not used.
    """
    for path, module in model.named_modules():
        if path.endswith("mlp.experts"):
            owner: Any = module

            def forward(hidden: Any, index: Any, _: Any, owner: Any = owner) -> torch.Tensor:
                chosen = nn.functional.one_hot(index, EXPERTS).sum(dim=1)
                multiply(hidden, chosen, owner.gate_up_proj)
                return torch.zeros_like(hidden)

            owner.forward = forward


def gate_ups(model: PreTrainedModel) -> list[LinearLayer]:
    return find_layers(model, "*.experts.*.gate_up_proj")


def test_rows_that_are_gathered_twice_are_told() -> None:
    model = tiny_mixture()
    truth, _ = hear(model, find_layers(model, "*.layers.0.*.gate_up_proj"), input_ids=IDS)

    def multiply(hidden: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(len(hidden), generator=torch.manual_seed(0))
        sorted_rows = hidden[order]
        for expert in range(EXPERTS):
            rows = chosen[order][:, expert].nonzero().flatten()
            nn.functional.linear(sorted_rows.index_select(0, rows), weight[expert])
        return hidden

    with_experts(model, multiply)
    heard, _ = hear(model, gate_ups(model), input_ids=IDS)
    for key, rows in truth.items():
        assert torch.equal(heard[key].tokens, rows.tokens)
        torch.testing.assert_close(heard[key].outputs, rows.outputs)


def test_an_expert_whose_rows_are_padded_to_a_capacity_is_not_called_without_rows() -> None:
    """Three experts multiply the rows of their tokens, and one also rows of zeros."""
    model = tiny_mixture()

    def multiply(hidden: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        for expert in range(EXPERTS):
            rows = hidden[chosen[:, expert].nonzero().flatten()]
            rows = nn.functional.pad(rows, (0, 0, 0, 3)) if expert == 1 else rows
            nn.functional.linear(rows, weight[expert])
        return hidden

    with_experts(model, multiply)
    skipped = unheard_layers(model, gate_ups(model), IDS)
    assert {*skipped} == {one.name for one in gate_ups(model) if ".experts.1." in one.name}
    with pytest.raises(RuntimeError, match=r"experts\.1\."):
        hear(model, gate_ups(model), input_ids=IDS)


def by_keywords(hidden: torch.Tensor, _: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    index = torch.arange(len(hidden))
    rows = torch.index_select(input=hidden, dim=0, index=index)
    torch.split(tensor=rows, split_size_or_sections=1)
    return torch.add(input=nn.functional.linear(input=rows, weight=weight[0]), other=1)


def columns(hidden: torch.Tensor, _: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gather as many columns as there are tokens."""
    return hidden[:32].index_select(1, torch.arange(32)) @ weight[0].T


@pytest.mark.parametrize(
    "multiply",
    [
        by_keywords,
        columns,
        lambda hidden, _, weight: torch.matmul(hidden, weight.mT),
        lambda hidden, _, weight: torch.matmul(hidden[None], weight.mT),
        lambda hidden, _, weight: nn.functional.linear(hidden[None], weight[0]),
    ],
)
def test_experts_whose_tokens_are_not_told_are_skipped_in_words(multiply: Multiply) -> None:
    model = tiny_mixture()
    with_experts(model, multiply)
    skipped = unheard_layers(model, gate_ups(model), IDS)
    assert {*skipped} == {one.name for one in gate_ups(model)}


def test_experts_with_a_bias_of_another_name_are_no_layers() -> None:
    model = tiny_mixture("gpt_oss")
    owner: Any = model.get_submodule("model.layers.0.mlp.experts")
    owner.register_parameter("up_offset", nn.Parameter(torch.ones(EXPERTS, 48)))
    assert {one.block for one in experts_of(model)} == {1}
    names = {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias", "up_offset"}
    skipped = {f"model.layers.0.mlp.experts.{name}" for name in names}
    assert skipped <= {*skipped_parameters(model)}


def test_a_matrix_that_the_model_copies_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mixture()
    owner: Any = model.get_submodule("model.layers.1.mlp.experts")
    monkeypatch.setattr(owner, "down_proj", nn.Parameter(owner.down_proj.detach()))
    linear = nn.functional.linear
    copying = lambda x, w, b=None: linear(x, w.clone() if w.shape[1] == 24 else w, b)  # noqa: E731
    monkeypatch.setattr(nn.functional, "linear", copying)
    skipped = unheard_layers(model, experts_of(model), IDS)
    assert {*skipped} == {one.name for one in experts_of(model) if "down_proj" in one.name}


def test_two_recordings_hear_what_each_does_alone_and_neither_hears_a_trial() -> None:
    model = tiny_mixture()
    alone, _ = hear(model, experts_of(model), input_ids=IDS)
    outer = experts_of(model)
    heard: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in outer}

    def on_rows(layer: Recordable, rows: torch.Tensor, _: torch.Tensor | None) -> None:
        heard[layer.name].append(rows.clone())

    with recording_rows(model, outer, on_rows) as counter:
        inner, _ = hear(model, experts_of(model), input_ids=IDS)
        assert unheard_layers(model, experts_of(model), IDS) == {}
        assert counter.batches == 1
    for name, rows in alone.items():
        assert torch.equal(inner[name].outputs, rows.outputs)
        assert [len(one) for one in heard[name]] == [len(rows.tokens)]
        torch.testing.assert_close(heard[name][0].sum(0), rows.outputs.sum(0), rtol=1e-4, atol=1e-4)


def test_after_an_error_the_model_is_as_before() -> None:
    model = tiny_mixture()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    def run() -> None:
        with recording_rows(model, experts_of(model), fail):
            assert model.config._experts_implementation == "eager"
            model(IDS)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert model.config._experts_implementation == "grouped_mm"
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
