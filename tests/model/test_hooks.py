"""What is heard is what the layers put out, padding aside; and afterwards no hook is left."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from entangle.model.hooks import (
    BatchCounter,
    on_trial,
    recording_rows,
    replacing_outputs,
    unheard_layers,
)
from entangle.model.layers import LinearLayer, find_layers
from entangle.model.sides import Recordable
from tests.tiny_models import tiny_llama4, tiny_mamba, tiny_model, tiny_vision_model

Heard = dict[str, list[torch.Tensor]]
IDS = torch.arange(3, 27).reshape(2, 12)


class Listening:
    """A model, some of its layers, and what `recording_rows` gives of them."""

    def __init__(self, name: str = "llama", pattern: str = "*.mlp.*") -> None:
        self.model = tiny_model(name)
        self.layers = find_layers(self.model, pattern)
        self.heard: Heard = {layer.name: [] for layer in self.layers}

    def start(self, **options: Any) -> Any:
        return recording_rows(self.model, self.layers, self.on_rows, **options)

    def hear(self, *actions: Callable[[], Any], **options: Any) -> None:
        """Do this while outputs are recorded; by default, run the model once."""
        with self.start(**options):
            for action in actions or [lambda: self.model(IDS)]:
                action()

    def on_rows(self, layer: Recordable, rows: torch.Tensor, places: torch.Tensor | None) -> None:
        self.heard[layer.name].append(rows.clone() if places is None else rows[places])

    def outputs(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Run the model with hooks of this test's own: (windows, length, neurons) each."""
        outputs: dict[str, torch.Tensor] = {}
        handles = [
            layer.module.register_forward_hook(
                lambda _, __, output, key=layer.name: outputs.update({key: output.clone()})
            )
            for layer in self.layers
        ]
        with torch.no_grad():
            self.model(*args, **kwargs)
        for handle in handles:
            handle.remove()
        return outputs


@pytest.fixture
def ear() -> Listening:
    return Listening()


def hooks_left(model: nn.Module) -> int:
    kinds = [kind for kind in vars(nn.Module()) if kind.endswith(("_hooks", "_hooks_with_kwargs"))]
    assert len(kinds) >= 5
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


# Which rows are heard.


def counted(mask: torch.Tensor, skip_first: int) -> torch.Tensor:
    """Choose the tokens that count, window by window and token by token."""
    keep = torch.zeros_like(mask, dtype=torch.bool)
    for window, row in enumerate(mask.tolist()):
        real = [position for position, value in enumerate(row) if value]
        keep[window, real[skip_first:]] = True
    return keep


RIGHT = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
LEFT = torch.tensor([[0] * 9 + [1] * 3, [0] * 2 + [1] * 10])
HOLES = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0], [1] * 12])


@pytest.mark.parametrize("skip_first", [0, 1, 4])
@pytest.mark.parametrize("mask", [RIGHT, LEFT, HOLES, RIGHT.bool(), LEFT.float()])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_are_the_outputs_of_the_tokens_that_count(
    name: str, mask: torch.Tensor, skip_first: int
) -> None:
    ear = Listening(name)
    with ear.start(skip_first=skip_first) as counter, torch.no_grad():
        ear.model(IDS, attention_mask=mask)
    keep = counted(mask, skip_first)
    for key, outputs in ear.outputs(IDS, attention_mask=mask).items():
        (rows,) = ear.heard[key]
        assert torch.equal(rows, outputs[keep])
    numbers = (counter.batches, counter.tokens, counter.padding, counter.skipped)
    real = int((mask != 0).sum())
    assert numbers == (1, int(keep.sum()), 24 - real, real - int(keep.sum()))


def test_without_a_mask_all_rows_count_and_several_batches_add_up(ear: Listening) -> None:
    with ear.start(skip_first=2) as counter, torch.no_grad():
        ear.model(IDS)
        ear.model(input_ids=IDS[:1, :5])
        ear.model(inputs_embeds=torch.randn(3, 4, 24))
    assert (counter.batches, counter.tokens, counter.skipped) == (3, 20 + 3 + 6, 4 + 2 + 6)
    assert [len(rows) for rows in ear.heard["model.layers.0.mlp.up_proj"]] == [20, 3, 6]
    for key, outputs in ear.outputs(IDS).items():
        assert torch.equal(ear.heard[key][0], outputs[:, 2:].reshape(20, -1))


@pytest.mark.parametrize(
    ("name", "entrance"),
    [("llama", ""), ("llama", "model"), ("opt", ""), ("opt", "model"), ("opt", "model.decoder")],
)
def test_a_pass_may_begin_at_the_model_or_at_its_backbone(name: str, entrance: str) -> None:
    ear = Listening(name, "*")  # OPT calls its decoder past its backbone
    with ear.start() as counter, torch.no_grad():
        ear.model.get_submodule(entrance)(IDS, attention_mask=RIGHT)
        ear.model(IDS)
    assert (counter.batches, counter.tokens, counter.padding) == (2, 43, 5)
    for key, outputs in ear.outputs(IDS).items():
        assert torch.equal(ear.heard[key][1], outputs.reshape(24, -1))


def test_the_text_of_a_model_for_text_and_images_is_heard() -> None:
    ear = Listening()
    ear.model = tiny_vision_model()
    ear.layers = find_layers(ear.model, "*.mlp.*")
    ear.heard = {layer.name: [] for layer in ear.layers}
    with ear.start() as counter, torch.no_grad():
        ear.model(IDS, attention_mask=LEFT)
    assert (counter.batches, counter.tokens, counter.padding) == (1, 13, 11)
    for key, outputs in ear.outputs(IDS, attention_mask=LEFT).items():
        assert torch.equal(ear.heard[key][0], outputs[LEFT == 1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3", "bloom", "falcon"])
@pytest.mark.parametrize("masked", [True, False])
def test_with_a_cache_each_token_counts_once(name: str, masked: bool) -> None:
    ear = Listening(name, "*mlp*")
    mask = torch.ones_like(IDS) if masked else None
    if mask is not None:
        mask[0, :2] = 0  # padding on the left, which the cache then holds
    cache = None
    with ear.start(skip_first=5) as counter, torch.no_grad():
        for begin, end in ((0, 4), (4, 9), (9, 10), (10, 12)):
            part = {"attention_mask": mask[:, :end]} if mask is not None else {}
            cache = ear.model(
                IDS[:, begin:end], past_key_values=cache, use_cache=True, **part
            ).past_key_values
    expected = 24 - 10 - (2 if masked else 0)
    assert (counter.tokens, counter.batches) == (expected, 4)
    assert {sum(map(len, heard)) for heard in ear.heard.values()} == {expected}


def test_generating_counts_the_prompts_and_each_new_token_but_the_last_once(ear: Listening) -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    with ear.start() as counter:
        ear.model.generate(  # type: ignore[operator]
            IDS, attention_mask=mask, min_new_tokens=6, max_new_tokens=6, do_sample=False
        )
    assert (counter.batches, counter.tokens, counter.padding) == (6, 12 + 8 + 2 * 5, 4)


@pytest.mark.parametrize(
    ("mask", "given"),
    [
        (torch.ones(2, 1, 12, 12), r"\(2, 1, 12, 12\)"),
        (torch.ones(1, 12), r"\(1, 12\)"),
        (torch.ones(12), r"\(12,\)"),
        (torch.ones(2, 13), r"\(2, 13\)"),
        ({"full_attention": None}, "dict"),
    ],
)
def test_a_mask_that_does_not_tell_padding_is_refused(
    ear: Listening, mask: Any, given: str
) -> None:
    message = rf"attention_mask.* \(2, 12\).* {given}"
    with pytest.raises(ValueError, match=message), ear.start():
        ear.model(IDS, attention_mask=mask)
    assert hooks_left(ear.model) == 0


def test_a_batch_without_tokens_is_refused(ear: Listening) -> None:
    with (
        pytest.raises(ValueError, match=r"input_ids.*inputs_embeds"),
        ear.start(),
    ):
        ear.model.base_model()


# What cannot be trusted is an error.


def test_a_layer_that_did_not_run_is_an_error(ear: Listening) -> None:
    class Lazy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    message = r"3 of 9 .* 2 batches, .*model\.layers\.1\.mlp\.gate_proj \(0 times\)"
    ear.model.model.layers[1].mlp = Lazy()
    with pytest.raises(RuntimeError, match=message):
        ear.hear(lambda: ear.model(IDS), lambda: ear.model(IDS))
    assert hooks_left(ear.model) == 0


def test_a_layer_that_ran_twice_in_a_pass_is_an_error(ear: Listening) -> None:
    layers: Any = ear.model.model.layers
    layers[1].mlp = layers[0].mlp
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.mlp\.gate_proj \(2 times\)"):
        ear.hear()


def test_a_layer_that_runs_outside_a_pass_is_an_error(ear: Listening) -> None:
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.gate_proj .*outside .*forward pass"):
        ear.hear(lambda: ear.model(IDS), lambda: ear.layers[0].module(torch.randn(12, 24)))


def test_a_layer_whose_rows_are_no_tokens_is_an_error(ear: Listening) -> None:
    up = ear.model.get_submodule("model.layers.0.mlp.up_proj")
    up.register_forward_pre_hook(lambda _, args: (args[0][:, :7],))
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.up_proj .*\b14 rows.*\b24 tokens"):
        ear.hear()


def explode(error: BaseException) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        raise error

    return hook


def test_a_pass_that_broke_off_is_refused_even_if_its_error_was_swallowed(ear: Listening) -> None:
    message = r"forward pass .*\bend\b"
    handle = ear.layers[4].module.register_forward_hook(explode(OSError("disk")))

    def break_off_and_go_on() -> None:
        with ear.start() as counter:
            with pytest.raises(OSError, match="disk"):
                ear.model(IDS)
            handle.remove()
            with pytest.raises(RuntimeError, match=message):
                counter.check()
            with pytest.raises(RuntimeError, match=message):
                ear.model(IDS)

    with pytest.raises(RuntimeError, match=message):  # and in the end, for those who never asked
        break_off_and_go_on()
    assert hooks_left(ear.model) == 0


def test_a_pass_that_broke_off_at_once_does_not_lend_its_mask_to_the_next(ear: Listening) -> None:
    def break_off_and_go_on() -> None:
        with ear.start(), torch.no_grad():
            with pytest.raises(IndexError):
                ear.model(IDS + 1000, attention_mask=RIGHT)  # before any layer has run
            ear.model.base_model(IDS)

    with pytest.raises(RuntimeError, match=r"forward pass .*\bend\b"):
        break_off_and_go_on()


def test_leaving_out_a_negative_number_of_tokens_is_refused(ear: Listening) -> None:
    with pytest.raises(ValueError, match=r"skip_first.* -1$"):
        ear.start(skip_first=-1).__enter__()
    assert hooks_left(ear.model) == 0


# Hooks are gone after every exit.


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("where", ["in a layer", "in what listens", "beside the model"])
def test_hooks_are_gone_after_any_error_and_the_error_is_the_same(
    ear: Listening, error: BaseException, where: str
) -> None:
    if where == "in a layer":
        handle = ear.layers[4].module.register_forward_pre_hook(explode(error))
    elif where == "in what listens":
        ear.on_rows = explode(error)  # type: ignore[method-assign]

    def fail() -> None:
        assert hooks_left(ear.model) > len(ear.layers)
        ear.model(IDS)
        raise error

    with pytest.raises(type(error)) as caught:
        ear.hear(fail)
    assert caught.value is error
    if where == "in a layer":
        handle.remove()
    assert hooks_left(ear.model) == 0


@pytest.mark.parametrize("how", ["close", "forget"])
def test_hooks_are_gone_after_a_generator_left_half_way(ear: Listening, how: str) -> None:
    def batches() -> Iterator[BatchCounter]:
        with ear.start() as counter:
            for _ in range(3):
                ear.model(IDS)
                yield counter

    walk = batches()
    assert next(walk).batches == 1
    if how == "close":
        walk.close()  # type: ignore[attr-defined]
    else:
        del walk
        gc.collect()
    assert hooks_left(ear.model) == 0


def test_hooks_are_gone_if_they_could_not_all_be_set(
    ear: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = ear.layers[-1].module
    monkeypatch.setattr(last, "register_forward_hook", explode(MemoryError()))
    with pytest.raises(MemoryError):
        ear.start().__enter__()
    assert hooks_left(ear.model) == 0


def test_the_users_own_hooks_stay(ear: Listening) -> None:
    ear.layers[0].module.register_forward_hook(lambda *_: None)
    with ear.start(), torch.no_grad():
        ear.model(IDS)
    assert hooks_left(ear.model) == 1


def test_two_may_listen_at_once_and_leave_in_any_order(ear: Listening) -> None:
    other = Listening()
    other.model, other.layers = ear.model, find_layers(ear.model, "*.up_proj")
    first, second = ear.start(), other.start(skip_first=3)
    with torch.no_grad():
        first.__enter__()
        ear.model(IDS)
        second.__enter__()
        ear.model(IDS)
        first.__exit__(None, None, None)
        ear.model(IDS)
        second.__exit__(None, None, None)
    assert hooks_left(ear.model) == 0
    for key, outputs in other.outputs(IDS).items():
        assert [len(rows) for rows in ear.heard[key]] == [24, 24]
        assert torch.equal(ear.heard[key][1], outputs.flatten(0, 1))
        assert [len(rows) for rows in other.heard[key]] == [18, 18]
        assert torch.equal(other.heard[key][0], outputs[:, 3:].flatten(0, 1))


# Models that others have changed.


def compiled_outside(model: PreTrainedModel) -> Any:
    return torch.compile(model, backend="eager")


def compiled_inside(model: PreTrainedModel) -> Any:
    model.compile(backend="eager")
    return model


def compiled_forward(model: PreTrainedModel) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_block(model: PreTrainedModel) -> Any:
    model.model.layers[1].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "compiled", [compiled_outside, compiled_inside, compiled_forward, compiled_block]
)
def test_a_compiled_model_is_refused(
    ear: Listening, compiled: Callable[[PreTrainedModel], Any]
) -> None:
    ear.model = compiled(ear.model)
    with pytest.raises(ValueError, match=r"torch\.compile"):
        ear.start().__enter__()
    assert hooks_left(ear.model) == 0


def test_a_model_that_accelerate_has_wrapped_is_heard_and_an_offloaded_one_too() -> None:
    ear = Listening()
    plain = ear.outputs(IDS)
    accelerate.dispatch_model(ear.model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    with ear.start(skip_first=1) as counter, torch.no_grad():
        ear.model(IDS, attention_mask=RIGHT)
    assert (counter.tokens, counter.padding) == (17, 5)
    for key, rows in ear.heard.items():
        assert torch.equal(rows[0][:11], plain[key][0, 1:])
    accelerate.hooks.remove_hook_from_submodules(ear.model)
    accelerate.cpu_offload(ear.model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in ear.model.parameters())
    ear.heard = {key: [] for key in plain}
    with ear.start(skip_first=1), torch.no_grad():
        ear.model(IDS, attention_mask=RIGHT)
    for key, rows in ear.heard.items():
        assert torch.equal(rows[0][:11], plain[key][0, 1:])
    bare = Listening()
    bare.model.to(torch.device("meta"))  # type: ignore[arg-type]  # as it is declared
    with pytest.raises(ValueError, match=r"weights.*not loaded"):
        bare.start().__enter__()


# Layers that are given other outputs.


def doubled(layer: LinearLayer, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    return outputs * 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_goes_on_with_the_outputs_that_it_is_given(name: str) -> None:
    ear = Listening(name)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def change(layer: LinearLayer, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        seen[layer.name] = inputs.clone(), outputs.clone()
        return outputs * 2

    with torch.no_grad():
        dense = ear.model(IDS).logits
        with replacing_outputs(ear.layers, change) as fired:
            assert set(fired.values()) == {0}
            found = ear.model(IDS).logits
            assert fired == {layer.name: 1 for layer in ear.layers}
            ear.model(IDS[:1])
        assert fired == {layer.name: 2 for layer in ear.layers}
        assert torch.equal(ear.model(IDS).logits, dense)
        assert hooks_left(ear.model) == 0
        for layer in ear.layers:
            inputs, outputs = seen[layer.name]
            assert inputs.shape == (1, 12, layer.inputs)
            assert torch.equal(layer.module(inputs), outputs)
            for parameter in layer.module.parameters():
                parameter.mul_(2)
        torch.testing.assert_close(found, ear.model(IDS).logits)
    assert not torch.allclose(found, dense, atol=1e-2)


def test_only_the_chosen_layers_change_and_inputs_passed_by_name_are_seen(ear: Listening) -> None:
    layer, other = ear.layers[0], ear.layers[1]
    rows = torch.randn(2, 3, layer.inputs)
    seen = []

    def change(_: LinearLayer, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs)
        return outputs + inputs[..., :1]

    with torch.no_grad():
        expected, untouched = layer.module(rows) + rows[..., :1], other.module(rows)
        with replacing_outputs([layer], change) as fired:
            assert torch.equal(layer.module(input=rows), expected)
            assert torch.equal(layer.module(rows), expected)
            assert torch.equal(other.module(rows), untouched)
    assert all(inputs is rows for inputs in seen)
    assert fired == {layer.name: 2}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("where", ["in what changes", "beside the model"])
def test_after_an_error_nothing_intervenes_any_more(
    ear: Listening, error: BaseException, where: str
) -> None:
    def fail() -> None:
        change: Any = doubled if where == "beside the model" else explode(error)
        with replacing_outputs(ear.layers, change):
            assert hooks_left(ear.model) >= len(ear.layers)
            ear.model(IDS)
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert hooks_left(ear.model) == 0


def test_nothing_intervenes_if_not_all_hooks_could_be_set(
    ear: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(ear.layers[-1].module, "register_forward_hook", fail)
    with pytest.raises(MemoryError):
        replacing_outputs(ear.layers, doubled).__enter__()
    assert hooks_left(ear.model) == 0


def test_what_is_heard_after_an_intervention_was_set_is_what_it_gave(ear: Listening) -> None:
    plain = ear.outputs(IDS)
    with replacing_outputs(ear.layers[:1], doubled), torch.no_grad():
        ear.hear()
    name = ear.layers[0].name
    assert torch.equal(ear.heard[name][0], plain[name].flatten(0, 1) * 2)


# Layers that cannot be heard.


def deaf(model: PreTrainedModel) -> dict[str, str]:
    return unheard_layers(model, find_layers(model), IDS[:1])


def test_a_layer_whose_weight_is_read_and_one_that_returns_a_tuple_are_not_heard() -> None:
    found = deaf(tiny_mamba())
    assert [*found] == [f"backbone.layers.{block}.mixer.dt_proj" for block in (0, 1)]
    assert all("did not run" in reason for reason in found.values())
    found = deaf(tiny_llama4())
    assert [*found] == [f"model.layers.{block}.feed_forward.router" for block in (0, 1)]
    assert all("tuple" in reason for reason in found.values())


class Several(nn.Module):
    """Two layers in the place of one: the first runs three times, the second on some tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.often, self.expert = nn.Linear(24, 24), nn.Linear(24, 37)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.often(self.often(self.often(x)))
        return torch.cat(
            [self.expert(hidden[:, :3]), hidden.new_zeros(*hidden[:, 3:].shape[:2], 37)], 1
        )


def test_a_layer_that_runs_often_or_on_some_tokens_is_not_heard() -> None:
    model: Any = tiny_model()
    model.model.layers[1].mlp.up_proj = Several()
    found = deaf(model)
    assert [*found] == [f"model.layers.1.mlp.up_proj.{name}" for name in ("often", "expert")]
    often, expert = found.values()
    assert "3 times" in often
    assert "1 x 3 x 37" in expert


def test_other_layers_are_heard_and_no_hook_is_left(ear: Listening) -> None:
    assert deaf(ear.model) == {}
    assert all(not module._forward_hooks for module in ear.model.modules())


def test_a_trial_is_in_no_recording(ear: Listening) -> None:
    def trial() -> None:
        with on_trial(ear.model), torch.no_grad():
            ear.model(IDS)

    with ear.start() as counter:
        trial()
        ear.model(IDS)
        assert deaf(ear.model) == {}
    assert (counter.batches, counter.tokens) == (1, IDS.numel())
    assert all(len(rows) == 1 for rows in ear.heard.values())
    with replacing_outputs(ear.layers, lambda _, __, outputs: outputs) as fired:
        trial()
        ear.model(IDS)
    assert {*fired.values()} == {1}


@pytest.mark.parametrize("first", [False, True])
def test_a_trial_leaves_transformers_own_hooks_as_they_were(first: bool) -> None:
    """They are installed at the first pass that needs them."""
    model = tiny_model("mixtral", output_router_logits=True)
    if first:
        model(IDS)
    assert deaf(model) == {}
    assert len(model(IDS).router_logits) == 2


def test_a_trial_leaves_rotary_embeddings_as_they_were() -> None:
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model, other = (tiny_model(rope_parameters=scaled) for _ in range(2))
    long = torch.arange(3, 103)[None]
    for one in (model, other):
        one(long)  # longer than the context: they grow
    deaf(model)
    assert torch.equal(model(IDS).logits, other(IDS).logits)
