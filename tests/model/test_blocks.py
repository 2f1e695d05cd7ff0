"""Block by block, a model is what it is as a whole, bit for bit; or it is an error."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch.utils import _pytree
from transformers import PreTrainedModel

from entangle.model.blocks import BlockWalk
from entangle.model.layers import LinearLayer, find_blocks, find_layers, weight_of, write_weight
from tests.model.test_hooks import HOLES, IDS, LEFT, RIGHT, counted, explode, hooks_left
from tests.tiny_models import ARCHITECTURES, tiny_model, tiny_vision_model

Batch = dict[str, torch.Tensor]
Rows = dict[str, list[torch.Tensor]]  # by a layer's name, one of each batch

THREE = torch.tensor([[0] * 5 + [1] * 7, [1] * 12, [0] * 2 + [1] * 10])


def ids(windows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 259, (windows, length), generator=torch.Generator().manual_seed(seed))


BATCHES: list[Batch] = [
    {"input_ids": ids(3, 12, 0), "attention_mask": THREE},
    {"input_ids": ids(3, 12, 1), "attention_mask": THREE.flip(1)},
    {"input_ids": ids(2, 9, 2)},
    {"input_ids": ids(1, 12, 3), "attention_mask": torch.ones(1, 12, dtype=torch.long)},
    {"input_ids": ids(2, 9, 4)},
]


def model_of(name: str) -> PreTrainedModel:
    return tiny_vision_model() if name == "vision" else tiny_model(name)


def layers_of(model: PreTrainedModel, block: int, pattern: str = "*") -> list[LinearLayer]:
    return [layer for layer in find_layers(model, pattern) if layer.block == block]


# The truth, by hooks of this test's own.


@dataclasses.dataclass
class Run:
    """One run of a block: what it gave, and what else than hidden states it was called with."""

    block: int
    output: torch.Tensor
    leaves: list[Any]
    named: bool  # whether the hidden states were given by name


@contextmanager
def spying(model: PreTrainedModel) -> Iterator[list[Run]]:
    """Note each run of a block."""
    runs: list[Run] = []

    def hook_of(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            leaves = _pytree.tree_leaves((args[1:], rest))
            runs.append(Run(index, hidden.clone(), leaves, "hidden_states" in kwargs))

        return hook

    handles = [
        block.register_forward_hook(hook_of(index), with_kwargs=True)
        for index, block in enumerate(find_blocks(model)[1])
    ]
    yield runs
    for handle in handles:
        handle.remove()


def run_whole(model: PreTrainedModel, batch: Batch) -> None:
    with torch.no_grad():
        model(**batch, use_cache=False)


def whole_outputs(model: PreTrainedModel, batches: Sequence[Batch]) -> list[list[torch.Tensor]]:
    """Return for each block what it gives for each batch while the whole model runs."""
    with spying(model) as runs:
        for batch in batches:
            run_whole(model, batch)
    depth = len(find_blocks(model)[1])
    assert [run.block for run in runs] == [*range(depth)] * len(batches)
    return [[run.output for run in runs[block::depth]] for block in range(depth)]


def whole_inputs(
    model: PreTrainedModel,
    layers: Sequence[LinearLayer],
    batches: Sequence[Batch],
    skip_first: int = 0,
) -> Rows:
    """Return the counted input rows of layers while the whole model runs."""
    inputs: Rows = {layer.name: [] for layer in layers}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _, args, key=layer.name: inputs[key].append(args[0].clone())
        )
        for layer in layers
    ]
    for batch in batches:
        run_whole(model, batch)
    for handle in handles:
        handle.remove()
    for rows in inputs.values():
        for number, batch in enumerate(batches):
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            keep = counted(mask, skip_first)
            rows[number] = rows[number].reshape(*keep.shape, -1)[keep]
    return inputs


def outputs_of(model: PreTrainedModel, step: Callable[[], object]) -> list[torch.Tensor]:
    """Do a step of a walk; return what its block gives for each batch."""
    with spying(model) as runs:
        step()
    assert len({run.block for run in runs}) == 1
    return [run.output for run in runs]


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# What is carried on.


def by_listening(walk: BlockWalk, layers: Sequence[LinearLayer]) -> None:
    walk.record_inputs(layers, lambda *_: None, advance=True)


def by_advancing(walk: BlockWalk, _: Sequence[LinearLayer]) -> None:
    walk.advance()


@pytest.mark.parametrize("step", [by_listening, by_advancing])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "vision"])
def test_every_block_gives_what_it_gives_in_the_whole_model(
    name: str, step: Callable[[BlockWalk, Sequence[LinearLayer]], None]
) -> None:
    model = model_of(name)
    truth = whole_outputs(model, BATCHES)
    walk = BlockWalk(model, iter(BATCHES))
    for block, outputs in enumerate(truth):
        assert (walk.block, walk.done) == (block, False)
        layers = layers_of(model, block)
        assert same(outputs_of(model, lambda: step(walk, layers)), outputs)  # noqa: B023
    assert (walk.block, walk.done) == (len(truth), True)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "vision"])
def test_listening_alone_changes_nothing_and_may_be_done_again(name: str) -> None:
    model = model_of(name)
    walk = BlockWalk(model, BATCHES)
    for block, outputs in enumerate(whole_outputs(model, BATCHES)):
        layers = layers_of(model, block)
        for chosen in (layers, layers[-1:], []):
            heard = outputs_of(model, lambda: walk.record_inputs(chosen, lambda *_: None))  # noqa: B023
            assert same(heard, outputs)
            assert walk.block == block
        assert same(outputs_of(model, walk.advance), outputs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon", "opt"])
def test_after_weights_are_changed_all_is_as_in_the_changed_model(name: str) -> None:
    model = tiny_model(name)
    generator = torch.Generator().manual_seed(0)
    walk = BlockWalk(model, BATCHES)
    carried = []
    while not walk.done:
        layers = layers_of(model, walk.block)
        heard = Ear(walk, layers)
        # All blocks before this one are changed by now, and this one is not yet.
        assert heard.equal(whole_inputs(model, layers, BATCHES))
        for layer in layers:
            kept = torch.rand(layer.neurons, 1, generator=generator) > 0.5
            write_weight(layer, weight_of(layer) * kept)
        carried.append(outputs_of(model, walk.advance))
    assert all(map(same, carried, whole_outputs(model, BATCHES)))
    assert not any(map(same, carried, whole_outputs(tiny_model(name), BATCHES)))


def test_weights_changed_after_listening_with_advance_come_too_late() -> None:
    model, untouched = tiny_model("gpt2"), tiny_model("gpt2")
    walk = BlockWalk(model, BATCHES)
    by_listening(walk, layers_of(model, 0))
    for layer in layers_of(model, 0):
        write_weight(layer, torch.zeros(layer.neurons, layer.inputs))
    heard = Ear(walk, layers_of(model, 1))
    assert heard.equal(whole_inputs(untouched, layers_of(untouched, 1), BATCHES))
    assert not heard.equal(whole_inputs(model, layers_of(model, 1), BATCHES))


# What is heard.


class Ear:
    """What a block's layers are heard to receive, and with which one each shares it."""

    def __init__(
        self, walk: BlockWalk, layers: Sequence[LinearLayer], *, advance: bool = False
    ) -> None:
        self.heard: Rows = {}
        self.first = walk.record_inputs(layers, self.on_inputs, advance=advance)

    def on_inputs(self, layer: LinearLayer, rows: torch.Tensor) -> None:
        self.heard.setdefault(layer.name, []).append(rows.clone())

    def equal(self, truth: Rows) -> bool:
        """Tell whether each layer, by itself or by the one it shares with, hears the truth."""
        assert self.heard.keys() == set(self.first.values())
        assert self.first.keys() == truth.keys()
        return all(same(self.heard[self.first[name]], rows) for name, rows in truth.items())


@pytest.mark.parametrize("skip_first", [0, 1, 4])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "vision"])
def test_rows_are_the_inputs_of_the_tokens_that_count(name: str, skip_first: int) -> None:
    model = model_of(name)
    batches = [*BATCHES, {"input_ids": IDS, "attention_mask": HOLES}]
    truth = whole_inputs(model, find_layers(model), batches, skip_first)
    walk = BlockWalk(model, batches, skip_first=skip_first)
    kept = [len(rows) for rows in next(iter(truth.values()))]
    assert [batch.counted for batch in walk.counted] == kept
    assert walk.tokens == sum(kept)
    while not walk.done:
        layers = layers_of(model, walk.block)
        heard = Ear(walk, layers, advance=True)
        assert heard.equal({layer.name: truth[layer.name] for layer in layers})


@pytest.mark.parametrize(
    ("mask", "skip_first", "tokens"),
    [(None, 0, 24), (None, 5, 14), (RIGHT, 0, 19), (RIGHT, 8, 4), (LEFT, 3, 7), (HOLES, 12, 0)],
)
def test_tokens_are_those_that_count(
    mask: torch.Tensor | None, skip_first: int, tokens: int
) -> None:
    batch = {"input_ids": IDS} | ({} if mask is None else {"attention_mask": mask})
    assert BlockWalk(tiny_model(), [batch, batch], skip_first=skip_first).tokens == 2 * tokens


SHARING = {
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "falcon": ["query_key_value dense_h_to_4h", "dense", "dense_4h_to_h"],
    "falcon-alibi": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "gpt-j": ["k_proj v_proj q_proj fc_in", "out_proj", "fc_out"],
    "gpt-neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["k_proj v_proj q_proj", "out_proj", "fc1", "fc2"],
    "phi": ["q_proj k_proj v_proj fc1", "dense", "fc2"],
}
LLAMA_LIKE = ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]


@pytest.mark.parametrize("name", [*ARCHITECTURES, "vision"])
def test_layers_that_receive_the_same_tensor_are_heard_once(name: str) -> None:
    model = model_of(name)
    layers = layers_of(model, 0)
    heard = Ear(BlockWalk(model, BATCHES), layers)
    groups = {
        frozenset(layer.name for layer in layers if heard.first[layer.name] == name)
        for name in heard.heard
    }
    expected = [group.split() for group in SHARING.get(name, LLAMA_LIKE)]
    assert sorted(sorted(key.split(".")[-1] for key in group) for group in groups) == sorted(
        map(sorted, expected)
    )
    assert [len(rows) for rows in heard.heard.values()] == [len(BATCHES)] * len(expected)
    for name, first in heard.first.items():
        assert heard.first[first] == first, name  # a layer that is heard itself


def test_only_the_layers_asked_for_are_heard() -> None:
    model = tiny_model()
    heard = Ear(BlockWalk(model, BATCHES), layers_of(model, 0, "*.[vo]_proj"))
    value, out = (f"model.layers.0.self_attn.{letter}_proj" for letter in "vo")
    assert heard.first == {value: value, out: out}
    assert heard.equal(whole_inputs(model, layers_of(model, 0, "*.[vo]_proj"), BATCHES))
    assert Ear(BlockWalk(model, BATCHES), []).first == {}


# What cannot be trusted is an error.


def test_a_layer_that_never_runs_is_an_error() -> None:
    class Lazy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    model = tiny_model()
    layers = layers_of(model, 1)
    model.model.layers[1].mlp = Lazy()
    walk = BlockWalk(model, BATCHES)
    by_advancing(walk, [])
    message = r"3 of 7 .* 5 batches, .*model\.layers\.1\.mlp\.gate_proj \(0 times\)"
    with pytest.raises(RuntimeError, match=message):
        Ear(walk, layers)
    assert hooks_left(model) == 0
    assert Ear(walk, layers[:4]).first.keys() == {layer.name for layer in layers[:4]}


def test_a_layer_that_runs_twice_is_an_error() -> None:
    model = tiny_model()
    mlp: Any = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + forward(x)
    with pytest.raises(RuntimeError, match=r"3 of 7 .* 5 batches, .*gate_proj \(10 times\)"):
        Ear(BlockWalk(model, BATCHES), layers_of(model, 0))
    assert hooks_left(model) == 0


def test_a_layer_whose_rows_are_no_tokens_is_an_error() -> None:
    model = tiny_model()
    up = model.get_submodule("model.layers.0.mlp.up_proj")
    walk = BlockWalk(model, BATCHES)
    handle = up.register_forward_pre_hook(lambda _, args: (args[0][:, :7],))
    message = r"model\.layers\.0\.mlp\.up_proj .*\b21 rows.*\b36 tokens"
    with pytest.raises(RuntimeError, match=message):
        Ear(walk, layers_of(model, 0))
    handle.remove()
    assert hooks_left(model) == 0


@pytest.mark.parametrize("apart", [[0, 2], [3], [1, 2, 3, 4]])
def test_a_layer_that_shares_its_input_in_some_batches_only_is_an_error(apart: list[int]) -> None:
    model = tiny_model()
    walk = BlockWalk(model, BATCHES)
    runs = iter(range(len(BATCHES)))
    key = model.get_submodule("model.layers.0.self_attn.k_proj")
    handle = key.register_forward_pre_hook(
        lambda _, args: (args[0].clone(),) if next(runs) in apart else None
    )
    key_name, query = (rf"model\.layers\.0\.self_attn\.{letter}_proj" for letter in "kq")
    with pytest.raises(RuntimeError, match=f"{key_name} shares .*{query} .*some batches"):
        Ear(walk, layers_of(model, 0))
    handle.remove()
    assert hooks_left(model) == 0


def compiled(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[1].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("change", "batches", "skip_first", "message"),
    [
        (compiled, BATCHES, 0, r"torch\.compile"),
        (lambda model: model.to("meta"), BATCHES, 0, r"weights.*not loaded"),
        (lambda model: model, BATCHES, -1, r"skip_first.* -1$"),
        (lambda model: model, [], 0, "no batch"),
        (
            lambda model: model,
            [{"input_ids": IDS, "attention_mask": RIGHT[:, None, None].repeat(1, 1, 12, 1)}],
            0,
            r"attention_mask.* \(2, 12\).* \(2, 1, 12, 12\)",
        ),
    ],
)
def test_what_cannot_be_walked_is_refused(
    change: Callable[[PreTrainedModel], PreTrainedModel],
    batches: list[Batch],
    skip_first: int,
    message: str,
) -> None:
    model = change(tiny_model())
    with pytest.raises(ValueError, match=message):
        BlockWalk(model, batches, skip_first=skip_first)
    assert_untouched(model)


# Afterwards the model is as it was.


def assert_untouched(model: PreTrainedModel) -> None:
    assert hooks_left(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


def test_nothing_is_left_on_the_model_after_any_step() -> None:
    model = tiny_model()
    walk = BlockWalk(model, BATCHES)
    assert_untouched(model)
    Ear(walk, layers_of(model, 0))
    assert_untouched(model)
    by_listening(walk, layers_of(model, 0))
    assert_untouched(model)
    by_advancing(walk, [])
    assert_untouched(model)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("advance", [True, False])
def test_nothing_is_left_after_an_error_of_what_listens(
    error: BaseException, advance: bool
) -> None:
    model = tiny_model()
    walk = BlockWalk(model, BATCHES)
    with pytest.raises(type(error)) as caught:
        walk.record_inputs(layers_of(model, 0), explode(error), advance=advance)
    assert caught.value is error
    assert_untouched(model)


@pytest.mark.parametrize("number", [0, 2])
def test_nothing_is_left_after_an_error_within_the_model(number: int) -> None:
    model = tiny_model()
    batches = list(BATCHES)
    batches[number] = {"input_ids": IDS + 1000}
    with pytest.raises(IndexError):
        BlockWalk(model, batches)
    assert_untouched(model)
    handle = model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(
        explode(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):
        BlockWalk(model, BATCHES)
    handle.remove()
    assert_untouched(model)


def test_nothing_is_left_if_not_all_hooks_could_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    layers = layers_of(model, 0)
    walk = BlockWalk(model, BATCHES)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(layers[-1].module, "register_forward_pre_hook", fail)
    with pytest.raises(MemoryError):
        Ear(walk, layers)
    assert hooks_left(model) == 0


@pytest.mark.parametrize("vocabulary", [0, 1000])
def test_a_forward_that_a_block_already_had_is_used_and_stays(vocabulary: int) -> None:
    model = tiny_model()
    block: Any = model.model.layers[1]
    plain = type(block).forward

    def own(*args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = 3 * plain(block, *args, **kwargs)
        return output

    block.forward = own
    if vocabulary:
        with pytest.raises(IndexError):
            BlockWalk(model, [BATCHES[0], {"input_ids": IDS + vocabulary}])
    else:
        truth = whole_outputs(model, BATCHES)
        walk = BlockWalk(model, BATCHES)
        assert all(same(outputs_of(model, walk.advance), outputs) for outputs in truth)
    assert vars(block)["forward"] is own
    others = [module for module in model.modules() if "forward" in vars(module)]
    assert others == [block]


def test_a_model_that_accelerate_has_wrapped_is_walked() -> None:
    model = tiny_model()
    truth = whole_outputs(model, BATCHES)
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    wrapped = {name: vars(module).get("forward") for name, module in model.named_modules()}
    assert wrapped["model.layers.1"] is not None
    walk = BlockWalk(model, BATCHES)
    assert all(same(outputs_of(model, walk.advance), outputs) for outputs in truth)
    assert wrapped == {name: vars(module).get("forward") for name, module in model.named_modules()}


# What is held.


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "falcon-alibi"])
def test_what_batches_have_in_common_is_held_once(name: str) -> None:
    def shared(runs: Sequence[Run], a: int, b: int) -> list[bool]:
        pairs = zip(runs[a].leaves, runs[b].leaves, strict=True)
        return [x is y for x, y in pairs if isinstance(x, torch.Tensor)]

    model = tiny_model(name)
    batches = [{"input_ids": ids(3, 12, i), "attention_mask": THREE} for i in range(3)]
    batches.append({"input_ids": ids(3, 12, 3), "attention_mask": THREE.flip(1)})
    with spying(model) as runs:
        for batch in batches:
            run_whole(model, batch)
    depth = len(find_blocks(model)[1])
    assert not all(shared(runs, 0, depth))
    walk = BlockWalk(model, batches)
    while not walk.done:
        with spying(model) as runs:
            walk.advance()
        assert len(shared(runs, 0, 1)) >= 2  # a mask and positions
        assert all(shared(runs, 0, 1))
        assert all(shared(runs, 0, 2))
        assert not all(shared(runs, 0, 3))


def test_hidden_states_are_copied_where_those_before_were_and_nothing_else_is_held() -> None:
    model = tiny_model()
    given: list[list[weakref.ref[torch.Tensor]]] = [[], [], []]
    for block, refs in zip(find_blocks(model)[1], given, strict=True):
        block.register_forward_hook(
            lambda _, __, output, refs=refs: refs.append(weakref.ref(output))
        )

    def held() -> list[int]:
        return [sum(ref() is not None for ref in refs) for refs in given]

    walk = BlockWalk(model, BATCHES)
    assert held() == [0, 0, 0]
    places = [hidden.data_ptr() for hidden in walk._hidden]
    assert len(set(places)) == len(BATCHES)
    Ear(walk, layers_of(model, 0))
    by_listening(walk, layers_of(model, 0))
    assert walk.block == 1
    walk.advance()
    by_listening(walk, layers_of(model, 2))
    assert walk.done
    assert all(len(refs) > len(BATCHES) for refs in given)
    assert held() == [0, 0, 0]
    assert [hidden.data_ptr() for hidden in walk._hidden] == places


def test_a_model_may_hold_on_to_the_hidden_states_that_it_begins_with() -> None:
    """As one does that hands the embeddings on to each block: what is carried on is a copy."""
    model = tiny_model()
    blocks = find_blocks(model)[1]
    embedded: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, __, output: embedded.append(output)
    )
    walk = BlockWalk(model, BATCHES)
    before = [tensor.clone() for tensor in embedded]
    for _ in blocks:
        walk.advance()
    assert all(map(torch.equal, embedded, before))


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda x: x.mT.contiguous().mT])
def test_hidden_states_of_another_form_take_the_place_of_those_before(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """A block is called with what the one before it returned: its dtype, and how it lies."""
    model = tiny_model()
    returned: list[torch.Tensor] = []

    def hook(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        returned.append(change(output))
        return returned[-1]

    walk = BlockWalk(model, [BATCHES[0]])
    walk.blocks[0].register_forward_hook(hook)
    walk.advance()
    hidden = walk._hidden[0]
    assert torch.equal(hidden, returned[0])
    assert (hidden.dtype, hidden.stride()) == (returned[0].dtype, returned[0].stride())


def test_while_listening_only_one_batch_is_held() -> None:
    model = tiny_model()
    layers = layers_of(model, 0)
    inputs: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def hook(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        held.append(sum(ref() is not None for ref in inputs))
        inputs.append(weakref.ref(args[0]))

    layers[-1].module.register_forward_pre_hook(hook)
    walk = BlockWalk(model, BATCHES)
    assert held == [0]  # in the run of the whole model
    Ear(walk, layers)
    assert held == [0] * 6


# Models of another make: blocks one after the other, or not simply so.

Wiring = Callable[[list[Any], torch.Tensor, torch.Tensor | None], Any]
Form = Callable[[torch.Tensor, torch.Tensor], Any]


class Block(nn.Module):
    """A block that takes numbers and tensors beside hidden states and returns some form of both."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)
        self.form = form

    def forward(self, hidden_states: torch.Tensor, *others: Any, **more: Any) -> Any:
        total = sum(other for other in _pytree.tree_leaves((others, more)) if other is not None)
        return self.form(hidden_states, self.linear(hidden_states + total))


def new(_: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return output


def wired(wiring: Wiring, form: Form = new) -> PreTrainedModel:
    """Return a model of three such blocks which runs them as ``wiring`` does."""
    model = tiny_model()
    backbone: Any = model.model
    backbone.layers = nn.ModuleList(Block(form) for _ in range(3))

    class Output:
        past_key_values = hidden_states = attentions = None

    def forward(input_ids: torch.Tensor, attention_mask: Any = None, **_: Any) -> Any:
        output: Any = Output()
        hidden = backbone.embed_tokens(input_ids)
        output.last_hidden_state = wiring(list(backbone.layers), hidden, attention_mask)
        return output

    backbone.forward = forward
    return model


def simply(blocks: list[Any], h: torch.Tensor, _: Any) -> torch.Tensor:
    for block in blocks:
        h = block(h)
    return h


def with_more_around(blocks: list[Any], h: torch.Tensor, mask: Any) -> torch.Tensor:
    return simply(blocks, 2 * h, mask) * 3


def by_name(blocks: list[Any], h: torch.Tensor, mask: Any) -> torch.Tensor:
    for block in blocks:
        h = block(masked=mask is None, hidden_states=h)
    return h


def with_the_embeddings(blocks: list[Any], h: torch.Tensor, _: Any) -> torch.Tensor:
    start = h
    for block in blocks:
        h = block(h, start)
    return h


def with_the_embeddings_by_name(blocks: list[Any], h: torch.Tensor, _: Any) -> torch.Tensor:
    start = h
    for block in blocks:
        h = block(hidden_states=h, start=start)
    return h


def with_nested_arguments(blocks: list[Any], h: torch.Tensor, mask: Any) -> torch.Tensor:
    zero = h[:1, :1, :1] * 0
    for i, block in enumerate(blocks):
        h = block(h, i, None, more={"numbers": [i, 2.5], "pair": (zero + i, mask is None)})
    return h


def with_the_mask_if_there_is_one(blocks: list[Any], h: torch.Tensor, mask: Any) -> torch.Tensor:
    more = {} if mask is None else {"mask": mask[..., None]}
    for block in blocks:
        h = block(h, **more)
    return h


def by_the_first_output(blocks: list[Any], h: torch.Tensor, _: Any) -> torch.Tensor:
    for block in blocks:
        h = block(h)[0]
    return h


@pytest.mark.parametrize(
    ("wiring", "form"),
    [
        (simply, new),
        (with_more_around, new),
        (by_name, new),
        (with_the_embeddings, new),
        (with_the_embeddings_by_name, new),
        (with_nested_arguments, new),
        (with_the_mask_if_there_is_one, new),
        (by_the_first_output, lambda _, h: (h,)),
        (by_the_first_output, lambda _, h: (h, h.sum(), None)),
        (by_the_first_output, lambda _, h: [h, h.sum()]),
        (simply, lambda given, h: given.add_(h)),  # over its input
        (simply, lambda _, h: h / 0 - h / 0),  # NaN
    ],
)
def test_blocks_one_after_the_other_are_walked(wiring: Wiring, form: Form) -> None:
    model = wired(wiring, form)
    truth = whole_outputs(model, BATCHES)
    walk = BlockWalk(model, BATCHES)
    for outputs in truth:
        Ear(walk, layers_of(model, walk.block))
        found = outputs_of(model, walk.advance)
        torch.testing.assert_close(found, outputs, rtol=0, atol=0, equal_nan=True)
    assert walk.done


@pytest.mark.parametrize(("wiring", "named"), [(by_name, True), (simply, False)])
def test_hidden_states_are_given_as_the_model_gives_them(wiring: Wiring, named: bool) -> None:
    model = wired(wiring)
    walk = BlockWalk(model, BATCHES)
    with spying(model) as runs:
        walk.advance()
    assert [run.named for run in runs] == [named] * len(BATCHES)


def test_numbers_of_another_type_are_not_taken_for_the_same() -> None:
    model = wired(with_the_mask_if_there_is_one)
    dtypes = [torch.int64, torch.float32, torch.bool]
    batches = [{"input_ids": IDS, "attention_mask": RIGHT.to(dtype)} for dtype in dtypes]
    walk = BlockWalk(model, batches)
    with spying(model) as runs:
        walk.advance()
    assert [run.leaves[0].dtype for run in runs] == dtypes


def test_the_output_embedding_does_not_run() -> None:
    model = tiny_model()
    model.get_submodule("lm_head").register_forward_pre_hook(explode(AssertionError()))
    walk = BlockWalk(model, BATCHES)
    while not walk.done:
        walk.advance()


def changed_between(blocks: list[Any], h: torch.Tensor, _: Any) -> torch.Tensor:
    for block in blocks:
        h = block(h) * 2
    return h


def changed_in_place_between(blocks: list[Any], h: torch.Tensor, _: Any) -> torch.Tensor:
    for block in blocks:
        h = block(h)
        h *= 2
    return h


def side_by_side(blocks: list[Any], h: torch.Tensor, _: Any) -> torch.Tensor:
    return torch.stack([block(h) for block in blocks]).sum(0)


def with_what_the_one_before_received(blocks: list[Any], h: torch.Tensor, _: Any) -> torch.Tensor:
    before = None
    for block in blocks:
        h, before = block(h, before), h
    return h


def with_what_the_one_before_gave_too(blocks: list[Any], h: torch.Tensor, _: Any) -> torch.Tensor:
    more = None
    for block in blocks:
        h, more = block(h, more=more)
    return h


def with_a_mean(blocks: list[Any], h: torch.Tensor, _: Any) -> torch.Tensor:
    for block in blocks:
        h = block(h, mean=h.mean())
    return h


def with_more_if_changed(blocks: list[Any], h: torch.Tensor, _: Any) -> torch.Tensor:
    start = h
    for block in blocks:
        h = block(h) if torch.equal(h, start) else block(h, changed=1)
    return h


def some(*order: int) -> Wiring:
    return lambda blocks, h, mask: simply([blocks[i] for i in order], h, mask)


def if_masked(wiring: Wiring) -> Wiring:
    return lambda blocks, h, mask: (simply if mask is None else wiring)(blocks, h, mask)


@pytest.mark.parametrize(
    ("wiring", "form", "reason"),
    [
        (changed_between, new, "before block 1"),
        (changed_in_place_between, new, "before block 1"),
        (side_by_side, new, "before block 1"),
        (with_what_the_one_before_received, new, r"arguments of block 2"),
        (with_what_the_one_before_gave_too, lambda _, h: (h, h.mean()), r"arguments of block 1"),
        (with_a_mean, new, r"arguments of block 1"),
        (with_more_if_changed, new, r"arguments of block 1"),
        (some(2, 1, 0), new, r"block 2 .*block 0 "),
        (some(0, 2, 1), new, r"block 2 .*block 1 "),
        (some(1, 2), new, r"block 1 .*block 0 "),
        (some(0, 1), new, r"\b2 of 3\b"),
        (some(), new, r"\b0 of 3\b"),
        (some(0, 0, 1, 2), new, r"block 0 .*block 1 "),
        (some(0, 1, 2, 2), new, r"block 2 .*block 3 "),
        (simply, lambda _, h: {"hidden_states": h}, r"block 0 returns .*\bdict\b"),
        (if_masked(changed_between), new, "before block 1"),
        (if_masked(changed_in_place_between), new, "before block 1"),
        (if_masked(some(0, 1)), new, r"\b2 of 3\b"),
        (if_masked(some(1, 0, 2)), new, r"block 1 .*block 0 "),
    ],
)
def test_what_is_not_simply_blocks_one_after_the_other_is_refused(
    wiring: Wiring, form: Form, reason: str
) -> None:
    model = wired(wiring, form)
    given = vars(model.model).pop("forward")  # which is the wiring
    assert_untouched(model)
    model.model.forward = given
    with pytest.raises(RuntimeError, match=f"blocks .*{reason}"):
        BlockWalk(model, [BATCHES[2], BATCHES[0]])
    del model.model.forward
    assert_untouched(model)


def test_a_block_that_stands_at_two_places_is_refused() -> None:
    model = wired(simply)
    layers: Any = model.model.layers
    layers[2] = layers[0]
    with pytest.raises(RuntimeError, match=r"blocks .*block 2 .*block "):
        BlockWalk(model, BATCHES)
    assert not any("forward" in vars(block) for block in layers)


@pytest.mark.parametrize("arguments", [((), {}), ((None,), {}), ((), {"h": IDS}), ((3,), {})])
def test_a_block_that_is_called_without_hidden_states_is_refused(arguments: Any) -> None:
    args, kwargs = arguments
    model = wired(lambda blocks, *_: blocks[0](*args, **kwargs))
    with pytest.raises(ValueError, match=r"block 0 .*without hidden states"):
        BlockWalk(model, BATCHES)
    assert not any("forward" in vars(block) for block in find_blocks(model)[1])
